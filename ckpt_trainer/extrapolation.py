"""What probes would show of a size, from those of two other sizes: where bytes grow evenly, nothing need run again.

Both were measured under the leanest plan, as the new one was. In backward a block that is recomputed holds all that it
could have stored, so that where this grew in proportion to the inputs, what it would store under any action did too.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from math import isclose, prod

from ckpt_trainer.costs import Levels, Probed, Sample, levels_of
from ckpt_trainer.measured import StepBytes
from ckpt_trainer.plan import Action
from ckpt_trainer.sizes import Size, is_like, terms

# By how much a block may do otherwise than in proportion: this share, and bytes that allocators round by.
_SHARE, _ROUNDED = 2e-3, 4096
# How far beyond the larger of two sizes, in steps from one to the other; rounding grows with it.
_FAR = 16.0

Probes = Mapping[str, Mapping[Action, Probed]]


def extrapolated_probes(size: Size, step: StepBytes, samples: Mapping[Size, Sample]) -> Probes:
    """What probes of blocks would show in a step of this size.

    Args:
        size: Of its inputs.
        step: What was measured of it under the leanest plan.
        samples: What was measured, and probed, of other sizes under the same plan.

    Returns:
        As `Sample.probes`; empty where two sizes do not tell.
    """
    like = sorted((other for other in samples if is_like(other, size)), key=terms, reverse=True)
    for high, low in combinations(like, 2):
        way = _way(low, high, size)
        if way is not None and _grows_evenly(samples[low].step, samples[high].step, step, way):
            return _probes(samples[low], samples[high], step, way)
    return {}


def _way(low: Size, high: Size, size: Size) -> float | None:
    """How far a size is on the way from one to another, by the elements of each of its inputs; None off that way."""
    numbers = [[prod(dims) for _, dims in each] for each in (low, high, size)]
    ways = {(own - bottom) / (top - bottom) for bottom, top, own in zip(*numbers, strict=True) if top != bottom}
    stay = all(own == bottom for bottom, top, own in zip(*numbers, strict=True) if top == bottom)
    first = next(iter(ways), None)
    if first is None or not stay or not 0 <= first <= _FAR:
        return None
    return first if all(isclose(first, way, rel_tol=1e-9) for way in ways) else None


def _at(low: float, high: float, way: float) -> float:
    return low + way * (high - low)


def _grows_evenly(low: StepBytes, high: StepBytes, step: StepBytes, way: float) -> bool:
    if not step.blocks.keys() == low.blocks.keys() == high.blocks.keys():
        return False
    pairs = (
        (own, _at(bottom, top, way))
        for name in step.blocks
        for own, bottom, top in zip(*(levels_of(each.blocks[name]) for each in (step, low, high)), strict=True)
    )
    return all(abs(own - expected) <= _SHARE * abs(own) + _ROUNDED for own, expected in pairs)


def _probes(low: Sample, high: Sample, step: StepBytes, way: float) -> Probes:
    if {name: set(its) for name, its in low.probes.items()} != {name: set(its) for name, its in high.probes.items()}:
        return {}
    return {
        name: {
            action: _probed(
                low.probes[name][action], high.probes[name][action], way, _slower(low, high, step, name, way)
            )
            for action in actions
        }
        for name, actions in high.probes.items()
    }


def _slower(low: Sample, high: Sample, step: StepBytes, name: str, way: float) -> float:
    """Times need not grow as bytes do: by how much this block's did otherwise."""
    own, bottom, top = (each.blocks[name] for each in (step, low.step, high.step))
    seconds, before, after = (block.forward_seconds + block.backward_seconds for block in (own, bottom, top))
    expected = _at(before, after, way)
    return seconds / expected if expected > 0 else 1.0


def _probed(low: Probed, high: Probed, way: float, slower: float) -> Probed:
    stored, forward, backward = (round(_at(*both, way)) for both in zip(low.levels, high.levels, strict=True))
    levels: Levels = stored, forward, backward
    seconds = slower * _at(low.seconds, high.seconds, way)
    return Probed(levels, seconds, slower * _at(low.forward_seconds, high.forward_seconds, way))
