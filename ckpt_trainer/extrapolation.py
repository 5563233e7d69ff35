"""What probes would show of a size, from those of other sizes: where bytes grow evenly, nothing need be run again.

All were measured under the leanest plan, as the new one was. In backward a block that is recomputed holds all that it could
have stored. Where that is most of it, and grew as a line through two sizes says, or a parabola through three (where scores
or masks of attention are stored), what it would store under any action did too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import isclose, prod

from ckpt_trainer.costs import Levels, Probed, Sample, levels_of
from ckpt_trainer.measured import BlockBytes, StepBytes
from ckpt_trainer.plan import KEEP, Action
from ckpt_trainer.sizes import Size, is_like, terms

# By how much a block may do otherwise than expected: this share, and bytes that allocators round by.
_SHARE, _ROUNDED = 2e-3, 4096
# How many sizes a curve goes through, and how far beyond the largest it is followed, in parts of the way between the
# smallest and the largest. What was rounded grows with that, and by the square on a parabola.
_CURVES = ((2, 16.0), (3, 4.0))
# How many of the largest sizes are looked at.
_LOOKED_AT = 5

Probes = Mapping[str, Mapping[Action, Probed]]


def extrapolated_probes(size: Size, step: StepBytes, samples: Mapping[Size, Sample]) -> Probes:
    """What probes of blocks would show in a step of this size.

    Args:
        size: Of its inputs.
        step: What was measured of it under the leanest plan.
        samples: What was measured, and probed, of other sizes under the same plan.

    Returns:
        As `Sample.probes`; empty where other sizes do not tell.
    """
    like = sorted((o for o in samples if is_like(o, size) and _is_mostly_stored(samples[o])), key=terms)[-_LOOKED_AT:]
    for number, far in _CURVES:
        for chosen in combinations(reversed(like), number):
            weights, own = _weights(chosen, size, far), [samples[other] for other in chosen]
            if weights and _grows_evenly([sample.step for sample in own], step, weights):
                return _probes(own, step, weights)
    return {}


def _weights(chosen: Sequence[Size], size: Size, far: float) -> list[float]:
    """How much each of the chosen sizes counts at another (Lagrange); none where inputs do not grow together."""
    *ways, at = _ways([*chosen, size])
    if len(set(ways)) < len(ways) or not 0 <= at <= 1 + far:
        return []
    others = [[other for other in ways if other != way] for way in ways]
    return [prod((at - other) / (way - other) for other in rest) for way, rest in zip(ways, others, strict=True)]


def _ways(sizes: Sequence[Size]) -> list[float]:
    """How far each is on the way from the last but one, 0, to the first, 1, by the elements of each of its inputs."""
    numbers = [[prod(dims) for _, dims in each] for each in sizes]
    first, last = numbers[0], numbers[-2]
    found = []
    for own in numbers:
        rows = zip(own, first, last, strict=True)
        ways = [
            (n - low) / (high - low) if high != low else (None if n == low else float("nan")) for n, high, low in rows
        ]
        known = [way for way in ways if way is not None]
        is_one = bool(known) and all(isclose(known[0], way, rel_tol=1e-9, abs_tol=1e-12) for way in known)
        found.append(known[0] if is_one else float("nan"))
    return found


def _is_mostly_stored(sample: Sample) -> bool:
    """Whether what a block can store is most of what it holds in backward, so that growth there tells of it."""
    return all(
        2 * probes[KEEP].levels[0] >= probes[sample.plan[name]].levels[2] for name, probes in sample.probes.items()
    )


def _at(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True))


def _grows_evenly(others: Sequence[StepBytes], step: StepBytes, weights: Sequence[float]) -> bool:
    if any(other.blocks.keys() != step.blocks.keys() for other in others):
        return False
    pairs = (
        (own, _at(rest, weights))
        for name in step.blocks
        for own, *rest in zip(*(levels_of(each.blocks[name]) for each in (step, *others)), strict=True)
    )
    return all(abs(own - expected) <= _SHARE * abs(own) + _ROUNDED for own, expected in pairs)


def _probes(samples: Sequence[Sample], step: StepBytes, weights: Sequence[float]) -> Probes:
    known = [{name: set(actions) for name, actions in sample.probes.items()} for sample in samples]
    if any(own != known[0] for own in known):
        return {}
    found: dict[str, dict[Action, Probed]] = {}
    for name, actions in samples[0].probes.items():
        # Times need not grow as bytes do.
        expected = _at([_seconds(sample.step.blocks[name]) for sample in samples], weights)
        slower = _seconds(step.blocks[name]) / expected if expected > 0 else 1.0
        own = {action: [sample.probes[name][action] for sample in samples] for action in actions}
        found[name] = {action: _probed(probed, weights, slower) for action, probed in own.items()}
    return found


def _seconds(block: BlockBytes) -> float:
    return block.forward_seconds + block.backward_seconds


def _probed(probed: Sequence[Probed], weights: Sequence[float], slower: float) -> Probed:
    stored, forward, backward = (
        round(_at(levels, weights)) for levels in zip(*(p.levels for p in probed), strict=True)
    )
    levels: Levels = stored, forward, backward
    seconds, in_forward = ([getattr(p, name) for p in probed] for name in ("seconds", "forward_seconds"))
    return Probed(levels, slower * _at(seconds, weights), slower * _at(in_forward, weights))
