"""A model without its weights: while they are away, fake ones stand in their place, which have shapes and no data.

A step then runs in no time and needs no memory, and makes tensors of the same sizes. Only what has a weight's values in it
is fake: token ids, masks and positions stay real, and what is decided by them comes out as in a real step. (With everything
fake, transformers takes itself for traced and makes a mask and repeated keys that it does without else.) Masks that have
grown large are fake again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode, fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# What is computed of real tensors is fake from this number of elements on: two rows of 32k tokens are a mask of 2**30.
_LARGE = 2**24
# Integer tables up to this size keep their values: they are what is looked up by.
_TABLE_BYTES = 2**20

# What an op raises that has no shape to give without values, or that cannot run on fake tensors at all.
_REFUSALS = tuple(
    getattr(fake_tensor, name)
    for name in (
        "DataDependentOutputException",
        "DynamicOutputShapeException",
        "UnsupportedFakeTensorException",
        "UnsupportedOperatorException",
    )
    if hasattr(fake_tensor, name)
)


class NeedsValues(RuntimeError):
    """A step of this model depends on values, so that it cannot be followed by shapes alone."""


@contextmanager
def without_weights(model: nn.Module) -> Iterator[None]:
    """While entered, the parameters and buffers of a model are fake ones on the host; its own are put back at the end.

    The model may be on any device, on `meta` too. What trains and what not stays as it is; weights that are shared stay
    shared. A device of the host's kind, since autograd refuses fake tensors of others where torch is built without them.

    Raises:
        NeedsValues: Of a weight that is no plain tensor (quantised, sharded), or within, where an op needs values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    places = [place for module in model.modules() for place in _places(module)]
    own = [(holder, name, holder[name]) for holder, name in places]
    fakes: dict[int, Tensor] = {}
    try:
        for holder, name, tensor in own:
            if id(tensor) not in fakes:
                fakes[id(tensor)] = _stand_in(tensor, mode, name, model)
            holder[name] = fakes[id(tensor)]
        with _FakeIfLarge(mode):
            yield
    except _REFUSALS as error:
        raise NeedsValues(
            f"a step of {type(model).__name__} cannot be followed without data: {type(error).__name__}: {error}. "
            "Measure it live: run the step on real weights."
        ) from error
    finally:
        for holder, name, tensor in own:
            holder[name] = tensor


def _places(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a module holds its tensors; plain attributes only where they would be of no device."""
    for holder in (module._parameters, module._buffers):
        yield from ((holder, name) for name, tensor in holder.items() if tensor is not None)
    for name, value in vars(module).items():
        if isinstance(value, Tensor) and value.device.type == "meta":
            yield vars(module), name


def _stand_in(tensor: Tensor, mode: FakeTensorMode, name: str, model: nn.Module) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter, FakeTensor):
        raise NeedsValues(
            f"weight {name!r} of {type(model).__name__} is a {type(tensor).__name__}, which is more than a tensor of a "
            "shape. Measure it live: run the step on real weights."
        )
    is_table = not (tensor.is_floating_point() or tensor.is_complex())
    if (
        is_table
        and tensor.device.type == "cpu"
        and tensor.nbytes <= _TABLE_BYTES
        and not isinstance(tensor, FakeTensor)
    ):
        return tensor.clone()
    with mode:
        fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake.requires_grad_(tensor.requires_grad)


class _FakeIfLarge(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs ops on real tensors with a large result, such as a mask of all tokens by all tokens, without data."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "prim" and _is_large(args, kwargs):
            with self._mode:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _is_large(args: Any, kwargs: Any) -> bool:
    if any(isinstance(value, FakeTensor) for value in args):
        return False  # fake anyway
    tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return False
    if not tensors:  # a size, where there is one, stands first
        size = args[0] if args and isinstance(args[0], (list, tuple)) else args
        return all(isinstance(n, int) for n in size) and prod(size) >= _LARGE
    if max(tensor.numel() for tensor in tensors) >= _LARGE:
        return True
    try:
        return prod(torch.broadcast_shapes(*(tensor.shape for tensor in tensors))) >= _LARGE  # type: ignore[no-untyped-call]
    except RuntimeError:  # of other ops than pointwise ones
        return False
