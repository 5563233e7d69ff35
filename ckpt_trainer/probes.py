"""What one block does to memory under an action, found on real data beside a step.

A call of a block is noted in a step, with all that it depends on. After the step's backward, `probe` runs its forward and
its backward once more, alone, under any action: nothing of it stays, neither gradients nor random numbers nor buffers.

NOTE on collectives. Gradients are asked for, not accumulated, so that nothing that waits for accumulated gradients (DDP)
is set going. Weights must be whole: sharded ones are not probed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten

from ckpt_trainer.arguments import is_cache
from ckpt_trainer.block_state import random_state, set_random_state
from ckpt_trainer.hooks import Hook
from ckpt_trainer.memory import meter_of, storages_of
from ckpt_trainer.roofline import Work, WorkCounter

Run = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Call:
    """One call of a block, to be made again.

    Args:
        module: The block.
        args: Its arguments; tensors are those of the step, without their graph.
        kwargs: Likewise.
        autocast: Device type -> dtype of mixed precision, where it was on.
        times: How often the block was called in the step.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    autocast: Mapping[str, torch.dtype]
    times: int = 1

    @property
    def device(self) -> torch.device:
        """That of its first tensor."""
        tensors = (leaf for leaf in tree_iter((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor))
        return next(tensors, torch.empty(0)).device

    @property
    def held_bytes(self) -> int:
        """Bytes of its inputs that would have been freed in backward, had they not been noted."""
        inputs = [leaf for leaf in tree_iter((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]
        storages = (storage for leaf in inputs if leaf.requires_grad for storage in storages_of(leaf))
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    @property
    def needs_graph(self) -> bool:
        """Whether autograd stores anything of it."""
        values = (*tree_iter((self.args, dict(self.kwargs))), *self.module.parameters())
        return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in values)

    @property
    def has_cache(self) -> bool:
        """Whether it got a key/value cache, which a second call would add to."""
        return any(is_cache(value) for value in (*self.args, *self.kwargs.values()))


class CallNotes:
    """Notes the calls of some blocks while it is entered; each keeps the tensors that the block got.

    Attributes:
        calls: By name of the block.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.calls: dict[str, Call] = {}
        self._modules = modules
        self._hooks: list[Any] = []

    def __enter__(self) -> CallNotes:
        for name, module in self._modules.items():

            def note(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                self._note(name, module, args, kwargs)

            self._hooks.append(module.register_forward_pre_hook(Hook(note), with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _note(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        if name in self.calls:
            self.calls[name] = replace(self.calls[name], times=self.calls[name].times + 1)
            return
        args, kwargs = _without_graph((args, kwargs))
        self.calls[name] = Call(module, args, kwargs, _autocast_of(self._device_types(args, kwargs)))

    @staticmethod
    def _device_types(args: Any, kwargs: Any) -> set[str]:
        return {leaf.device.type for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}


def _autocast_of(types: set[str]) -> dict[str, torch.dtype]:
    return {kind: torch.get_autocast_dtype(kind) for kind in types if torch.is_autocast_enabled(kind)}


def _without_graph(tree: Any) -> Any:
    leaves, structure = tree_flatten(tree)
    found = [leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return tree_unflatten(found, structure)


@dataclass(frozen=True)
class Probe:
    """What one call of a block does under an action.

    Args:
        stored: Bytes, as in `BlockBytes`.
        forward: Likewise.
        backward: Likewise.
        work: The ops that ran.
        forward_work: Those of its forward.
    """

    stored: int
    forward: int
    backward: int
    work: Work
    forward_work: Work

    @property
    def forward_ops(self) -> int:
        """How many ops ran in its forward."""
        return sum(self.forward_work.values())


def probe(call: Call, run: Run, forward: Callable[..., Any]) -> Probe:
    """Make a call again under an action, forward and backward.

    Args:
        call: The call.
        run: Runs a forward on arguments as the action says.
        forward: The forward of the block without an action.

    Raises:
        torch.OutOfMemoryError: There is no room for it.
    """
    with _as_it_was(call), WorkCounter() as counter, meter_of(call.device) as meter:
        given = _Arguments(call)
        start = meter.current
        meter.reset_peak()
        with torch.enable_grad(), _autocast(call.autocast):
            output = run(forward, *given.taken())
        peak, stored, forward_work = meter.peak - start, meter.current - start, counter.work.copy()
        leaves = [leaf for leaf in tree_iter(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        del output
        edges = [get_gradient_edge(leaf) for leaf in leaves]
        meter.reset_peak()
        gradients = [torch.ones_like(leaf) for leaf in leaves]
        leaves.clear()
        wanted = [*given.leaves, *(p for p in call.module.parameters() if p.requires_grad)]
        torch.autograd.grad(edges, wanted, gradients, allow_unused=True)
        return Probe(stored, peak, meter.peak - start, counter.work, forward_work)


class _Arguments:
    """The arguments of a call, anew: what needs a gradient is a copy that the block alone holds."""

    def __init__(self, call: Call) -> None:
        leaves, self._structure = tree_flatten((call.args, dict(call.kwargs)))
        # A copy, and not the leaf: a block may write to its input.
        self.leaves = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        self._values: list[Any] = [
            leaf.clone() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf for leaf in leaves
        ]

    def taken(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments; this holds them no longer."""
        values, self._values = self._values, []
        args, kwargs = tree_unflatten(values, self._structure)
        return tuple(args), kwargs


@contextmanager
def _autocast(dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
    if not dtypes:
        yield
        return
    kind, dtype = next(iter(dtypes.items()))
    with torch.autocast(kind, dtype), _autocast(dict(list(dtypes.items())[1:])):
        yield


@contextmanager
def _as_it_was(call: Call) -> Iterator[None]:
    """Random numbers and buffers are afterwards as they were before."""
    devices = {torch.device("cpu"), call.device}
    states = [(device, random_state(device)) for device in devices]
    python, numbers = random.getstate(), numpy.random.get_state()
    buffers = [(module, dict(module._buffers)) for module in call.module.modules() if module._buffers]
    for module, own in buffers:
        module._buffers.update({name: _copy(buffer) for name, buffer in own.items()})
    try:
        yield
    finally:
        for module, own in buffers:
            module._buffers.update(own)
        random.setstate(python)
        numpy.random.set_state(numbers)
        for device, state in states:
            set_random_state(device, state)


def _copy(buffer: Tensor | None) -> Tensor | None:
    return buffer.clone() if buffer is not None else None
