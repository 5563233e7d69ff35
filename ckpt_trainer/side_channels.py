"""Ways out of a block that the reentrant variant does not see, and refusing it where a block uses one.

It runs a block without a graph and connects only the tensors that the block returns. What leaves by another way, into a
container or onto a module, is cut from the graph without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def refuse_containers(name: str, values: Sequence[Any]) -> None:
    """Raises ValueError if an argument of block `name` is a dict, or a list that holds something."""
    for value in values:
        full = isinstance(value, MutableSequence) and any(item is not None for item in value)
        if isinstance(value, Mapping) or full:
            raise _refusal(name, f"is handed a {type(value).__name__}, through which blocks can pass tensors")


@contextmanager
def refuse_attributes(name: str, modules: Sequence[nn.Module], first: bool) -> Iterator[None]:
    """Around a forward of block `name`: raises ValueError if it leaves a new tensor on one of its modules.

    Args:
        name: The block.
        modules: It and all below it.
        first: Whether this is its first forward; later ones are not looked at.
    """
    before = _attributes(modules) if first else {}
    yield
    if first and (new := [key for key, tensor in _attributes(modules).items() if before.get(key) is not tensor]):
        raise _refusal(name, f"leaves a tensor on itself as {new[0][1]!r}")


def refuse_outputs(name: str, others: Sequence[Any], tensors: Sequence[Tensor], trainable: bool) -> None:
    """Raises ValueError if what block `name` returned cannot carry its gradients.

    Args:
        name: The block.
        others: What it returned that is no tensor.
        tensors: What it returned that is.
        trainable: Whether it has parameters that need a gradient.
    """
    strange = [value for value in others if not isinstance(value, (bool, int, float, str, type(None)))]
    if strange:
        raise _refusal(name, f"returns a {type(strange[0]).__name__}, in which tensors are not seen")
    if trainable and not any(tensor.requires_grad for tensor in tensors):
        raise _refusal(name, "has trainable parameters, and nothing that it returns needs a gradient")


def _attributes(modules: Sequence[nn.Module]) -> dict[tuple[int, str], Tensor]:
    return {
        (place, key): value
        for place, module in enumerate(modules)
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def _refusal(name: str, what: str) -> ValueError:
    return ValueError(
        f"checkpointing_use_reentrant=True gives wrong gradients here: block {name!r} {what}, and the reentrant variant "
        "cuts those from the graph. Set checkpointing_use_reentrant=False."
    )
