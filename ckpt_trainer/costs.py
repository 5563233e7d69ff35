"""What a step costs, found on real data while training goes on: the `live` source of `StepCosts`.

A step under the leanest plan tells what each block and all else do; probes of one block of each kind tell what other
actions do. A block that is measured under an action it was given tells what that really does there, which then counts.
Numbers only: measuring is for `spans` and `probes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckpt_trainer.measured import BlockBytes, StepBytes
from ckpt_trainer.plan import DEFAULT_SAVE, KEEP, Action, Plan
from ckpt_trainer.step_costs import BlockCost, Option, StepCosts

# Of what a block does: stored, most in forward, most in backward.
Levels = tuple[int, int, int]


@dataclass(frozen=True)
class Probed:
    """What a block does under one action, alone.

    Args:
        levels: Bytes.
        seconds: Of forward and backward.
        forward_seconds: Of the forward, of those.
    """

    levels: Levels
    seconds: float
    forward_seconds: float = 0.0


@dataclass(frozen=True)
class Link:
    """The way to host memory; `bytes_per_second` is 0 where there is none."""

    bytes_per_second: float = 0.0
    host_bytes: int = 0
    prefetch: int = 1


@dataclass(frozen=True)
class Sample:
    """One step under the leanest plan.

    Args:
        plan: That plan.
        step: What was measured.
        kinds: Name of each block -> name of the one that was probed for it.
        probes: Name of a block that was probed -> action -> what it did.
        bare_bytes: There when it began, without gradients and optimizer state.
        gradients_are_there: Whether all gradients existed when it began.
        seen: Block name -> action -> what the block did under it in later steps of the same size.
    """

    plan: Plan
    step: StepBytes
    kinds: Mapping[str, str]
    probes: Mapping[str, Mapping[Action, Probed]]
    bare_bytes: int
    gradients_are_there: bool
    seen: Mapping[str, Mapping[Action, Levels]] = field(default_factory=dict)

    def with_seen(self, plan: Plan, step: StepBytes) -> Sample:
        """With what a step under another plan did; of two steps under the same actions, the more, as data may differ."""
        seen = {name: dict(levels) for name, levels in self.seen.items()}
        for name, block in step.blocks.items():
            known = seen.setdefault(name, {}).get(plan[name], levels_of(block))
            seen[name][plan[name]] = _higher(known, levels_of(block))
        head, head_backward = max(self.step.head, step.head), max(self.step.head_backward, step.head_backward)
        return replace(self, step=replace(self.step, head=head, head_backward=head_backward), seen=seen)


def levels_of(block: BlockBytes) -> Levels:
    """What a block did, as levels."""
    return block.stored, block.forward, block.backward


# Seconds of the host for what is not in an op, as measured ("Bookkeeping alone" in examples/benchmarks/frontier.md): for
# each replay, for each op of the forward whose saved tensors are looked at, and for each that goes through a dispatch mode,
# twice.
_REPLAY_SECONDS, _LOOK_SECONDS, _DISPATCH_SECONDS = 1.3e-3, 9e-6, 28e-6


def bookkeeping_seconds(action: Action, forward_ops: int) -> float:
    """Time of the host that carrying out an action on a block takes, in one forward and backward of so many ops."""
    if action.kind == "keep":
        return 0.0
    if action.kind == "recompute":
        return _REPLAY_SECONDS
    if action.save == DEFAULT_SAVE:
        return _LOOK_SECONDS * forward_ops
    return _REPLAY_SECONDS + _DISPATCH_SECONDS * forward_ops


def live_costs(sample: Sample, gradients: StepBytes, names: Sequence[str], link: Link | None = None) -> StepCosts:
    """The costs of a step like the sample.

    Args:
        sample: The step.
        gradients: A step that began without gradients, for how many bytes they are.
        names: All blocks; those that did not run cost nothing.
        link: Where what is stored can go.
    """
    link = link or Link()
    step, corrections = sample.step, _corrections(sample)
    shared: dict[tuple[Option, ...], tuple[Option, ...]] = {}
    blocks = []
    for name in [*step.blocks, *(name for name in names if name not in step.blocks)]:
        options = _options(sample, name, corrections, link)
        probed = sample.probes.get(sample.kinds.get(name, ""), {}).get(KEEP)
        forward = probed.forward_seconds if probed is not None else 0.0
        grown = gradients.blocks[name].gradients if name in gradients.blocks else 0
        total = probed.seconds if probed is not None else 0.0
        blocks.append(BlockCost(name, shared.setdefault(options, options), grown, forward, total - forward))
    moved = [option.link_bytes for options in shared for option in options]
    return StepCosts(
        tuple(blocks),
        before_bytes=step.before,
        head_forward_bytes=step.head,
        head_backward_bytes=step.head_backward,
        head_gradient_bytes=gradients.head_gradients,
        before_backward_bytes=step.before_backward,
        before_gradient_bytes=gradients.before_gradients,
        staging_bytes=bytes_in_flight(moved, link.prefetch),
        gradients_are_there=sample.gradients_are_there,
        host_budget_bytes=link.host_bytes,
        link_bytes_per_second=link.bytes_per_second,
        other_seconds=step.other_seconds,
    )


def bytes_in_flight(moved: Sequence[int], prefetch: int) -> int:
    """The most that copies hold on the device, of blocks that move so much each.

    When a forward ends, the newest block's is still there and that of the block before is on its way out; in backward
    those that are brought back ahead.
    """
    return max(moved, default=0) * max(2, prefetch)


def _options(sample: Sample, name: str, corrections: _Corrections, link: Link) -> tuple[Option, ...]:
    if name not in sample.step.blocks:  # it did not run, which others of its kind did: it may the next time
        ran = (
            own for own, kind in sample.kinds.items() if kind == sample.kinds.get(name) and own in sample.step.blocks
        )
        other = next(ran, None)
        if other is None:
            return (Option(sample.plan.actions.get(name, KEEP), 0, 0, 0),)
        return _options(sample, other, corrections, link)
    real, lean = levels_of(sample.step.blocks[name]), sample.plan[name]
    probes = sample.probes.get(sample.kinds.get(name, ""))
    if not probes:  # it is given one action, or stores nothing
        return (Option(lean, *real),)
    found, seen = [], sample.seen.get(name, {})
    for action, probed in probes.items():
        levels = _higher(real, seen.get(action, real)) if action == lean else _levels(sample, name, action, corrections)
        option = Option(action, *levels, max(0.0, probed.seconds - probes[KEEP].seconds))
        found += [option, *_moved(option, link)]
    return tuple(found)


def _moved(option: Option, link: Link) -> list[Option]:
    if not link.bytes_per_second or option.stored_bytes <= 0:
        return []
    stored, moved = option.stored_bytes, replace(option.action, place="host")
    return [replace(option, action=moved, stored_bytes=0, host_bytes=stored, link_bytes=stored)]


# (probed block, action) -> what is added to what the probe and the leanest step say together.
_Corrections = Mapping[tuple[str, Action], Levels]


def _levels(sample: Sample, name: str, action: Action, corrections: _Corrections) -> Levels:
    seen = sample.seen.get(name, {}).get(action)
    if seen is not None:
        return seen
    return _sum(_expected(sample, name, action), corrections.get((sample.kinds[name], action), (0, 0, 0)))


def _expected(sample: Sample, name: str, action: Action) -> Levels:
    """What the probe of its kind did, and what this block did otherwise than that under the leanest plan."""
    probes = sample.probes[sample.kinds[name]]
    own = _less(levels_of(sample.step.blocks[name]), probes[sample.plan[name]].levels)
    return _sum(probes[action].levels, own)


def _corrections(sample: Sample) -> _Corrections:
    """What blocks did otherwise than expected holds for others of their kind that have not been seen yet."""
    found: dict[tuple[str, Action], list[Levels]] = {}
    for name, actions in sample.seen.items():
        probes = sample.probes.get(sample.kinds.get(name, ""), {})
        for action, levels in actions.items():
            if action in probes:
                other = _less(levels, _expected(sample, name, action))
                found.setdefault((sample.kinds[name], action), []).append(other)
    return {key: (_most(several, 0), _most(several, 1), _most(several, 2)) for key, several in found.items()}


def _most(several: Sequence[Levels], which: int) -> int:
    # Not less than expected: the first block of a stack may store less than all others.
    return max(0, *(levels[which] for levels in several))


def _higher(one: Levels, other: Levels) -> Levels:
    return max(one[0], other[0]), max(one[1], other[1]), max(one[2], other[2])


def _sum(one: Levels, other: Levels) -> Levels:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def _less(one: Levels, other: Levels) -> Levels:
    return one[0] - other[0], one[1] - other[1], one[2] - other[2]


def between(low: StepCosts | None, high: StepCosts, share: float) -> StepCosts:
    """Costs of a step whose size is a share of the way from one to another; `share` above 1 is beyond `high`.

    Args:
        low: None for a step on no data, of which nothing but gradients is left.
    """
    made: dict[tuple[int, int, int], tuple[Option, ...]] = {}
    lows = {block.name: block for block in low.blocks} if low is not None else {}

    def mixed(block: BlockCost) -> BlockCost:
        under = lows.get(block.name)
        own = under.options if under is not None and len(under.options) == len(block.options) else ()
        key = id(block.options), id(own), block.gradient_bytes
        if key not in made:
            made[key] = tuple(_mixed(o, own[i] if own else None, block, share) for i, o in enumerate(block.options))
        times = share * block.forward_seconds, share * block.backward_seconds
        return replace(block, options=made[key], forward_seconds=times[0], backward_seconds=times[1])

    none = StepCosts((), head_backward_bytes=high.head_gradient_bytes, before_backward_bytes=high.before_gradient_bytes)
    least = low if low is not None else none if not high.gradients_are_there else StepCosts(())
    return replace(
        high,
        blocks=tuple(mixed(block) for block in high.blocks),
        before_bytes=_mix(least.before_bytes, high.before_bytes, share),
        head_forward_bytes=_mix(least.head_forward_bytes, high.head_forward_bytes, share),
        head_backward_bytes=_mix(least.head_backward_bytes, high.head_backward_bytes, share),
        before_backward_bytes=_mix(least.before_backward_bytes, high.before_backward_bytes, share),
        staging_bytes=_mix(least.staging_bytes, high.staging_bytes, share),
    )


def _mix(least: int, most: int, share: float) -> int:
    return least + round(share * (most - least))


def _mixed(high: Option, low: Option | None, block: BlockCost, share: float) -> Option:
    gradients = min(block.gradient_bytes, high.backward_bytes)
    low = low or replace(
        high, stored_bytes=0, forward_bytes=0, backward_bytes=gradients, host_bytes=0, link_bytes=0, seconds=0.0
    )

    return replace(
        high,
        stored_bytes=_mix(low.stored_bytes, high.stored_bytes, share),
        forward_bytes=_mix(low.forward_bytes, high.forward_bytes, share),
        backward_bytes=_mix(low.backward_bytes, high.backward_bytes, share),
        seconds=low.seconds + share * (high.seconds - low.seconds),
        host_bytes=_mix(low.host_bytes, high.host_bytes, share),
        link_bytes=_mix(low.link_bytes, high.link_bytes, share),
    )
