"""What autograd holds in place of a saved tensor that may be elsewhere: where it lies, and how it looks.

A handle owns all that it needs. It knows the version of the tensor, so that a change in place raises as it does without
hooks, which make autograd look away; also where the tensor is on the host by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ckpt_trainer.chunks import mark_of, seen

# A view with gaps takes its whole storage along, if that is not more than so many times its own size.
_WHOLE = 8
# Where a tensor begins in memory, modulo this, is the same after it came back: some kernels add up in another order else.
_ALIGNED = 512


@dataclass(frozen=True)
class Place:
    """Where the bytes of a storage are now.

    Args:
        storage: The storage itself, or memory that a part of it was brought back to.
        start: Which byte of the storage this one begins with.
        mark: Counts versions with what else lies in memory that was brought back; None in the storage itself.
    """

    storage: torch.UntypedStorage
    start: int
    mark: Tensor | None


class Source(Protocol):
    """Gives the bytes that a handle lies in."""

    def take(self) -> Place:
        """Where they are, ready for computation on the live stream."""


class _Marked:
    """What a tensor looked like when it was packed, and a tensor without data that counts its versions."""

    __slots__ = ("__weakref__", "_mark", "_size", "_stride", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._size = tensor.size()
        self._stride = tensor.stride()
        self._mark = mark_of(tensor)
        self._version = tensor._version

    @property
    def changed(self) -> bool:
        """Whether the tensor was changed in place since."""
        return self._mark._version != self._version


class Moved(_Marked):
    """A saved tensor that may have left the device."""

    __slots__ = ("_dtype", "_source", "_start")

    def __init__(self, tensor: Tensor, source: Source) -> None:
        super().__init__(tensor)
        self._source = source
        self._dtype = tensor.dtype
        self._start = int(tensor.storage_offset()) * tensor.element_size()

    def get(self) -> Tensor:
        """The tensor, on its device, with the strides that it had, and without a graph.

        Raises:
            RuntimeError: It was changed in place since it was packed.
        """
        if self.changed:
            raise _changed(self._mark, self._size, self._version)
        place = self._source.take()
        mark = self._mark if place.mark is None else place.mark
        return seen(mark, place.storage, self._dtype, self._size, self._stride, self._start - place.start)


class Kept:
    """A saved tensor that stays where it is."""

    __slots__ = ("__weakref__", "_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        # Detached, because the result of an op that saves it would else hold the op that holds it.
        self._tensor = tensor if tensor.is_leaf else tensor.detach()
        self._version = None if tensor.is_inference() else tensor._version

    @property
    def changed(self) -> bool:
        """Whether the tensor was changed in place since."""
        return self._version is not None and self._tensor._version != self._version

    def get(self) -> Tensor:
        """The tensor. Raises RuntimeError if it was changed in place since it was packed."""
        if self.changed:
            raise _changed(self._tensor, self._tensor.size(), self._version)
        return self._tensor


class Sharded(_Marked):
    """A `DTensor`, of which the local part may have left the device.

    The version is that of the whole: the local part counts none, since what is written to it is written below autograd.
    """

    __slots__ = ("_context", "_others", "_parts")

    def __init__(self, tensor: DTensor, pack: Callable[[Tensor], Handle]) -> None:
        super().__init__(tensor)
        names, self._context = tensor.__tensor_flatten__()  # type: ignore[no-untyped-call]
        parts = {name: getattr(tensor, name) for name in names}
        # Its mesh may be among them.
        self._others = {name: part for name, part in parts.items() if not isinstance(part, Tensor)}
        self._parts = {name: pack(_arrived(part)) for name, part in parts.items() if isinstance(part, Tensor)}

    def get(self) -> Tensor:
        """The tensor. Raises RuntimeError if it was changed in place since it was packed."""
        if self.changed:
            raise _changed(self._mark, self._size, self._version)
        parts = {**self._others, **{name: part.get() for name, part in self._parts.items()}}
        tensor: Tensor = DTensor.__tensor_unflatten__(parts, self._context, self._size, self._stride)  # type: ignore[no-untyped-call]
        return tensor.detach()


Handle = Moved | Kept | Sharded
Pack = Callable[[Tensor], Handle]


def unpack(handle: Handle) -> Tensor:
    """The hook that gives autograd the tensor."""
    return handle.get()


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """What an op returned, with `function` of each tensor in its place."""
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(mapped(function, item) for item in value) if isinstance(value, (tuple, list)) else value


def returned(value: Any) -> Any:
    """What an op returned, with each handle's tensor in its place."""
    if isinstance(value, (Moved, Kept, Sharded)):
        return value.get()
    return type(value)(returned(item) for item in value) if isinstance(value, (tuple, list)) else value


def handles_in(value: Any) -> list[Handle]:
    """The handles in what `mapped` gave."""
    if isinstance(value, (Moved, Kept, Sharded)):
        return [value]
    return [handle for item in value for handle in handles_in(item)] if isinstance(value, (tuple, list)) else []


def bytes_range(tensor: Tensor) -> tuple[int, int] | None:
    """First and last byte (exclusive) of what has to leave, so that the memory of a tensor becomes free.

    Returns:
        The bytes of the tensor and a few before it, or of its whole storage if it has gaps; None if it is a small part of
        that.
    """
    size, stride, item = tensor.size(), tensor.stride(), tensor.element_size()
    if tensor.numel() == 0:
        return None
    extent = 1 + sum((number - 1) * step for number, step in zip(size, stride, strict=True))
    distinct = prod(number for number, step in zip(size, stride, strict=True) if step)
    if distinct >= extent:
        start = int(tensor.storage_offset()) * item
        return start - start % _ALIGNED, start + extent * item
    # Other views of the storage come with it: query, key and value that one matmul made, for example.
    whole = tensor.untyped_storage().nbytes()
    return (0, whole) if distinct * item * _WHOLE >= whole else None


def is_of_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter, a view of one, or of the copy of one that autocast made and keeps."""
    # FSDP frees and refills the memory of a parameter, which need not be among those of the block.
    whole = tensor if tensor._base is None else tensor._base
    if isinstance(whole, nn.Parameter):
        return True
    node = whole.grad_fn
    before = node.next_functions[0][0] if node is not None and node.name() == "ToCopyBackward0" else None
    return before is not None and before.name() == "torch::autograd::AccumulateGrad"


def _arrived(tensor: Any) -> Tensor:
    # A local part may be the promise of a collective.
    local: Tensor = tensor.wait() if hasattr(tensor, "trigger_wait") else tensor
    return local


def _changed(now: Tensor, size: Sequence[int], version: int | None) -> RuntimeError:
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{str(now.dtype).removeprefix('torch.')} {list(size)}] is at version {now._version}; expected version {version} "
        "instead."
    )
