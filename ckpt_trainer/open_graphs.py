"""Whether there is a graph of a forward that no backward has come to yet."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_iter


class OpenGraph:
    """The graph of one forward at a time, from `note` until it is gone or a backward comes to any result of the forward."""

    def __init__(self) -> None:
        self._graph: weakref.ref[_Graph] | None = None

    @property
    def is_there(self) -> bool:
        return self._graph is not None and self._graph() is not None

    def note(self, output: Any) -> None:
        """A forward gave this; nothing is noted while there is the graph of one before it."""
        if not self.is_there:
            graph = _Graph(self._close)
            self._graph = weakref.ref(graph)
            for result in _results(output):
                result.register_hook(graph)  # type: ignore[no-untyped-call]

    def _close(self, graph: _Graph) -> None:
        if self._graph is not None and self._graph() is graph:
            self._graph = None


class _Graph:
    """A hook on the results of a forward: it lives as long as the graph of any of them, which is what holds it.

    Args:
        when_backward: Called with this when backward comes to one of them.
    """

    __torch_unserializable__ = True  # so that torch.save has nothing to say of results that it is on

    def __init__(self, when_backward: Callable[[_Graph], None]) -> None:
        self._when_backward = when_backward

    def __call__(self, gradient: Tensor) -> None:
        self._when_backward(self)


def _results(output: Any) -> Iterator[Tensor]:
    """The tensors of an output that have a graph, those of an object of a class that nobody knows included."""
    for leaf in tree_iter(output):
        for value in (leaf,) if isinstance(leaf, Tensor) else tree_iter(getattr(leaf, "__dict__", None)):
            with suppress(RuntimeError):  # a view whose base was written to has no graph that could be asked for
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    yield value
