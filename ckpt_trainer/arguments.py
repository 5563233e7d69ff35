"""The arguments of a call: tensors are taken out, so that autograd sees them, and put back; caches are found."""

from __future__ import annotations

from collections.abc import MutableMapping, MutableSequence, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class _Hole:
    """Where in the arguments of a call a tensor was taken out."""

    index: int


def lift(value: Any, tensors: list[Tensor]) -> Any:
    """Move the tensors of a value to a list, leaving holes. Only into tuples: others may be shared and written."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Hole(len(tensors) - 1)
    if _is_plain_tuple(value):
        return _tuple_like(value, [lift(item, tensors) for item in value])
    return value


def fill(value: Any, tensors: Sequence[Tensor]) -> Any:
    """The value with tensors where `lift` left holes."""
    if type(value) is _Hole:
        return tensors[value.index]
    if _is_plain_tuple(value):
        return _tuple_like(value, [fill(item, tensors) for item in value])
    return value


def _is_plain_tuple(value: Any) -> bool:
    return type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_fields"))


def _tuple_like(value: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    return tuple(items) if type(value) is tuple else type(value)(*items)


def copy_of(value: Any) -> Any:
    """A value that others may change without changing this one: of a container, a copy of what it holds now."""
    return copy(value) if isinstance(value, (MutableSequence, MutableMapping)) else value


def is_cache(value: Any) -> bool:
    """Whether a value is one of the key/value caches of transformers or of remote code, which a forward appends to."""
    if value is None or isinstance(value, (Tensor, tuple, bool, int, float, str)):
        return False
    return any("Cache" in cls.__name__ for cls in type(value).__mro__)


def fill_each(values: dict[str, Any], tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The same for each of the keyword arguments."""
    return {key: fill(value, tensors) for key, value in values.items()}


def require_grad_of_one(tensors: list[Tensor]) -> None:
    """Let the first floating tensor require grad, if none does; an alias, so that the caller's tensor stays as it is."""
    if any(tensor.requires_grad for tensor in tensors):
        return
    for index, tensor in enumerate(tensors):
        if tensor.is_floating_point():
            # A clone may be changed in place by the block; a leaf that requires grad may not.
            tensors[index] = tensor.detach().requires_grad_().clone()
            return
