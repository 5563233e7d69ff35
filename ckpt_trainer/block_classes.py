"""Which blocks of a model cost the same, and how to run a few of each class in place of all.

Blocks of one class have the same modules with the same settings and the same shapes, trainable or frozen alike. Its
first, its second and its last are run: the first may prepare something for the others, the last is followed by something
else. All others are `passed_over`: they hand on what they are given, and cost what the second costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ckpt_trainer.blocks import Block

# Names of numbers that differ from block to block and mean nothing but its place.
_PLACE_WORDS = ("idx", "index", "number", "depth")


def stand_ins(blocks: Sequence[Block]) -> dict[str, str]:
    """Name of each block -> name of the one that is run in its place, or its own."""
    instead = {block.name: block.name for block in blocks}
    for names in _classes(blocks):
        instead.update(dict.fromkeys(names[2:-1], names[1] if len(names) > 1 else ""))
    return instead


def kinds_of(blocks: Sequence[Block]) -> dict[str, str]:
    """Name of each block -> name of the one that tells of its class: the second, which has a neighbour on each side."""
    return {name: names[min(1, len(names) - 1)] for names in _classes(blocks) for name in names}


def _classes(blocks: Sequence[Block]) -> list[list[str]]:
    classes: dict[Any, list[str]] = {}
    for block in blocks:
        classes.setdefault((block.stack, _class_of(block.module)), []).append(block.name)
    return list(classes.values())


def _class_of(module: nn.Module) -> Any:
    return tuple((name, type(sub), _settings(sub), _tensors(sub)) for name, sub in module.named_modules())


def _tensors(module: nn.Module) -> Any:
    held = {**module._parameters, **module._buffers}
    return tuple((n, t.shape, t.dtype, t.requires_grad) for n, t in held.items() if t is not None)


def _settings(module: nn.Module) -> Any:
    """Plain values of a module, such as its window or rate of dropout."""
    return tuple(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, (str, bool, int, float)) and not any(word in name for word in _PLACE_WORDS)
    )


@contextmanager
def passed_over(blocks: Sequence[Block], instead: Mapping[str, str]) -> Iterator[Mapping[str, int]]:
    """While entered, blocks that another stands in for hand on what they are given, in a result like that of the other.

    Yields:
        Name of each block that was called, passed over or not -> its place in the order of their first calls.
    """
    modules = {block.name: block.module for block in blocks}
    replaced = {name: other for name, other in instead.items() if name != other}
    results = {other: _Result(number) for other, number in Counter(replaced.values()).items()}
    hooks = [modules[other].register_forward_hook(result.note) for other, result in results.items()]
    places: dict[str, int] = {}
    hooks += [block.module.register_forward_pre_hook(partial(_note_place, places, block.name)) for block in blocks]
    theirs = {name: vars(modules[name]).get("forward") for name in replaced}
    try:
        for name, other in replaced.items():
            vars(modules[name])["forward"] = results[other].hand_on
        yield places
    finally:
        for hook in hooks:
            hook.remove()
        for name, forward in theirs.items():
            vars(modules[name]).pop("forward", None)
            if forward is not None:
                vars(modules[name])["forward"] = forward


def _note_place(places: dict[str, int], name: str, module: nn.Module, args: Any) -> None:
    places.setdefault(name, len(places))


class _Result:
    """What one block returned, for those that it stands in for.

    Args:
        users: How many those are. After the last it is forgotten, so that nothing lives longer for it.
    """

    def __init__(self, users: int) -> None:
        self._users = users
        self._left = 0
        self._leaves: list[Any] = []

    def note(self, module: nn.Module, args: Any, output: Any) -> None:
        self._leaves, self._structure = tree_flatten(output)
        self._main = next(place for place, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor))
        self._leaves[self._main] = None
        self._left = self._users

    def hand_on(self, *args: Any, **kwargs: Any) -> Any:
        leaves = list(self._leaves)
        leaves[self._main] = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self._left -= 1
        if not self._left:
            self._leaves = []
        return tree_unflatten(leaves, self._structure)
