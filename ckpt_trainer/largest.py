"""The largest batch and the longest sequence that fit, from a few steps of other sizes and what lies between them.

Bytes grow with the batch along straight lines, with the sequence along parabolas. Where another op takes over as the
largest they bend upwards: between measured sizes a straight line is then too high, never too low.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ckpt_trainer.step_costs import BlockCost, Option, StepCosts

# Peak of one mode under some costs.
PeakUnder = Callable[[StepCosts], int]

_OF_STEP = (
    "resident_bytes",
    "before_bytes",
    "head_forward_bytes",
    "head_backward_bytes",
    "before_backward_bytes",
    "staging_bytes",
)
_OF_OPTION = ("stored_bytes", "forward_bytes", "backward_bytes", "host_bytes", "link_bytes")
_Costs = TypeVar("_Costs", Option, StepCosts)

# How often a size is measured beyond those at the start.
_EXTENSIONS = 3


@dataclass(frozen=True)
class Axis:
    """A size that varies.

    Args:
        costs_at: Measures a step of a size.
        asked: The size that was asked for, at which the costs are known.
        step: Results are multiples of it.
        most: Sizes end there.
        degree: Of the curves: 1 or 2.
    """

    costs_at: Callable[[int], StepCosts]
    asked: int
    step: int
    most: int
    degree: int


def largest_sizes(axis: Axis, costs: StepCosts, peaks: Sequence[PeakUnder], budget_bytes: int) -> list[int]:
    """For each mode the largest size that fits, a multiple of the axis' step; 0 where none does.

    Args:
        axis: What varies.
        costs: Of the size that was asked for.
        peaks: Of each mode.
        budget_bytes: What has to hold the peak.
    """
    known = {axis.asked: costs}
    for size in _first_sizes(axis, any(peak(costs) > budget_bytes for peak in peaks)):
        known.setdefault(size, axis.costs_at(size))
    for _ in range(_EXTENSIONS):
        found = [_largest(axis, known, peak, budget_bytes) for peak in peaks]
        beyond = max(found, default=0)
        if beyond <= max(known):
            break
        known[beyond] = axis.costs_at(beyond)
    return [_largest(axis, known, peak, budget_bytes) for peak in peaks]


def costs_between(known: dict[int, StepCosts], size: int, degree: int) -> StepCosts:
    """The costs of a size, on the curves through those of the sizes nearest to it."""
    if size in known:
        return known[size]
    sizes = _neighbours(sorted(known), size, degree + 1)
    factors = _weights(sizes, size)
    points = [known[other] for other in sizes]
    shared: dict[int, tuple[Option, ...]] = {}
    blocks = []
    for number, block in enumerate(points[0].blocks):
        own = [point.blocks[number].options for point in points]
        if id(own[0]) not in shared:
            shared[id(own[0])] = tuple(_mixed(options, factors, _OF_OPTION) for options in zip(*own, strict=True))
        blocks.append(BlockCost(block.name, shared[id(own[0])], block.gradient_bytes))
    return replace(_mixed(points, factors, _OF_STEP), blocks=tuple(blocks))


def _first_sizes(axis: Axis, some_do_not_fit: bool) -> list[int]:
    """Besides the one that was asked for: a larger one, a third for parabolas, and a small one where sizes must shrink."""
    sizes = [2 * axis.asked] if 2 * axis.asked <= axis.most else [axis.most]
    if axis.degree > 1 or sizes[0] == axis.asked:
        sizes.append(axis.asked // 2)
    if some_do_not_fit:
        sizes.append(max(axis.step, axis.asked // 8))
    return [size for size in sizes if size > 0]


def _largest(axis: Axis, known: dict[int, StepCosts], peak: PeakUnder, budget_bytes: int) -> int:
    def fits(steps: int) -> bool:
        return peak(costs_between(known, steps * axis.step, axis.degree)) <= budget_bytes

    low, high, most = 0, 1, axis.most // axis.step
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * axis.step


def _neighbours(sizes: list[int], size: int, number: int) -> list[int]:
    """As many sizes in a row as a curve needs, with the wanted one within where it can be."""
    below = sum(other < size for other in sizes)
    first = min(max(0, below - number // 2), max(0, len(sizes) - number))
    return sizes[first : first + number]


def _weights(sizes: Sequence[int], size: int) -> list[float]:
    """How much of each point makes the point of a size (Lagrange)."""
    weights = []
    for own in sizes:
        weight = 1.0
        for other in sizes:
            weight *= (size - other) / (own - other) if other != own else 1.0
        weights.append(weight)
    return weights


def _mixed(points: Sequence[_Costs], weights: Sequence[float], names: Sequence[str]) -> _Costs:
    values: dict[str, Any] = {
        name: round(sum(weight * getattr(point, name) for weight, point in zip(weights, points, strict=True)))
        for name in names
    }
    return replace(points[0], **values)
