"""How large the inputs of one call of a model are, and what is known of one size from others.

The bytes of a step are taken to be a sum, with no negative term, of a constant, the numbers of elements of the inputs, and
those times the longest input (attention without a fused kernel). That bounds what lies between two measured sizes, and
what lies above one. Plain numbers: no tensor is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

# Name of an input -> its dimensions, in the order of the call.
Size = tuple[tuple[str, tuple[int, ...]], ...]

# Numbers that say of how many tokens there are logits.
_NUMBERS = ("logits_to_keep", "num_logits_to_keep")

# Dimensions below this are taken as they are; above it there are so many buckets in each power of two.
_EXACT, _BUCKETS = 64, 8


def size_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Size:
    """The size of a call, from its tensors: those among the arguments, and those in a list, tuple or dict of them."""
    return tuple((name, tuple(shape)) for name, shape in _shapes(enumerate(args), kwargs.items()))


def _shapes(*groups: Any) -> Iterator[tuple[str, Any]]:
    for name, value in (entry for group in groups for entry in group):
        shape = getattr(value, "shape", None)
        if name in _NUMBERS and isinstance(value, int):
            yield str(name), (value,)
        elif isinstance(shape, tuple):
            yield str(name), shape
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", shape) for inner, shape in _shapes(value.items()))
        elif isinstance(value, (list, tuple)):
            yield from ((f"{name}.{inner}", shape) for inner, shape in _shapes(enumerate(value)))


def bucket_of(size: Size, most: Size) -> Size:
    """The size that all sizes of a bucket are planned as: each dimension rounded up, but not beyond that of `most`."""
    return tuple(
        (name, tuple(min(_rounded_up(dim), limit) for dim, limit in zip(dims, limits, strict=True)))
        for (name, dims), (_, limits) in zip(size, most, strict=True)
    )


def _rounded_up(dim: int) -> int:
    if dim < _EXACT:
        return dim
    step: int = (1 << (dim.bit_length() - 1)) // _BUCKETS
    return -(-dim // step) * step


def is_like(one: Size, other: Size) -> bool:
    """Whether two sizes are of the same inputs with the same number of dimensions each, so that they compare."""
    return [(name, len(dims)) for name, dims in one] == [(name, len(dims)) for name, dims in other]


def covers(large: Size, small: Size) -> bool:
    """Whether no dimension of `small` is above that of `large`."""
    pairs = zip(large, small, strict=False)
    return is_like(large, small) and all(n >= m for (_, ns), (_, ms) in pairs for n, m in zip(ns, ms, strict=True))


def terms(size: Size) -> tuple[int, ...]:
    """What bytes may grow with; not with a number in a tensor, as Hugging Face's trainer hands to losses."""
    numbers = [prod(dims) for _, dims in size if dims]
    firsts = Counter(dims[0] for _, dims in size if dims)
    rows = max(firsts, key=lambda dim: (firsts[dim], dim), default=1)
    # The first dimension is the rows of the batch, but not of inputs that are packed into one.
    lengths = (dims[1:] if dims and dims[0] == rows else dims for _, dims in size)
    longest = max((dim for dims in lengths for dim in dims), default=1)
    return (*numbers, *(number * longest for number in numbers))


def share(low: Size | None, high: Size, size: Size) -> float:
    """How far `size` is at most on the way from `low` to `high`, from 0 to 1; None is a size of nothing."""
    tops, ours = terms(high), terms(size)
    bottoms = terms(low) if low is not None else (0,) * len(tops)
    found = zip(bottoms, ours, tops, strict=True)
    between = [(own - bottom) / (top - bottom) for bottom, own, top in found if top > bottom]
    return min(1.0, max(between, default=1.0))


def growth(low: Size, size: Size) -> float:
    """How many times the bytes of `low` those of a larger size are at most."""
    return max((own / bottom for bottom, own in zip(terms(low), terms(size), strict=True) if bottom), default=1.0)


def describe(size: Size) -> str:
    """For a line of text: the inputs with the most elements, such as `input_ids 8x512`."""
    several = sorted((entry for entry in size if entry[1]), key=lambda entry: -prod(entry[1]))
    chosen = dict.fromkeys("x".join(map(str, dims)) for _, dims in several)
    first = {shape: next(name for name, dims in size if "x".join(map(str, dims)) == shape) for shape in chosen}
    return ", ".join(f"{name} {shape}" for shape, name in list(first.items())[:2]) or "no tensors"
