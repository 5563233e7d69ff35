"""What mode `auto` says: lines of text and plain data about its plans, what was predicted and what was measured."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ckpt_trainer.auto import Choice, Planner
from ckpt_trainer.memory import format_bytes
from ckpt_trainer.plan import Plan
from ckpt_trainer.sizes import Size, describe
from ckpt_trainer.step_costs import PHASES, Peak


def start_line(budget_bytes: int, asked: float | int, number: int) -> str:
    """At the start of training."""
    what = f"{asked:g} of what there is" if isinstance(asked, float) else "as asked for"
    return (
        f"auto: budget {format_bytes(budget_bytes)} ({what}) for {number} blocks to choose for; the first optimizer step "
        "stores the inputs of blocks only and is measured"
    )


def plan_line(choice: Choice) -> str:
    """A plan that was made: for what, what it does, and the peak that is expected of it."""
    if choice.least is not None:
        least = choice.least.least
        return (
            f"auto, {_sizes(choice.size)}: no plan fits {_room(choice)}; the leanest is used, which needs {_peak(least)}. "
            f"{_what_lowers(choice, least)}"
        )
    assert choice.solution is not None
    there = ", later micro-batch" if choice.gradients_are_there else ""
    line = (
        f"auto, {_sizes(choice.size)}{there}: {counts(choice.plan)}; predicted peak {_peak(choice.solution.peak)} of "
        f"{_room(choice)}"
    )
    if choice.solution.peak_is_elsewhere and choice.plan.is_active:
        line += f", which no plan lowers; {PHASES[choice.solution.peak.phase]} would"
    return line


def above_line(size: Size, peak_bytes: int, allowed: int) -> str:
    """A micro-batch of a size that was not known ran on the leanest plan and took more than there is."""
    return (
        f"auto, {describe(size)}: measured {format_bytes(peak_bytes)} on the leanest plan, "
        f"{format_bytes(peak_bytes - allowed)} above the budget"
    )


def _sizes(size: Size) -> str:
    return f"up to {describe(size)}"


def _what_lowers(choice: Choice, least: Peak) -> str:
    if choice.floor_bytes > choice.budget_bytes:
        return (
            f"Weights, gradients and optimizer state alone take {format_bytes(choice.floor_bytes)}. What lowers that: "
            f"{PHASES['optimizer']}"
        )
    return f"What lowers it there: {PHASES[least.phase]}"


def _room(choice: Choice) -> str:
    """What a plan was made for, and why that is not the whole budget."""
    why = f" (the budget less {format_bytes(choice.lost_bytes)}, as earlier steps taught)" if choice.lost_bytes else ""
    return format_bytes(choice.budget_bytes) + why


def measured_line(choice: Choice, size: Size, is_planned_anew: bool) -> str:
    """What was measured of a plan, in a micro-batch of a size that it is for, beside what was predicted."""
    assert choice.measured_bytes is not None
    left = choice.budget_bytes - choice.measured_bytes
    room = f"{format_bytes(left)} of the budget left" if left >= 0 else f"{format_bytes(-left)} above the budget"
    return (
        f"auto, {describe(size)}: predicted {format_bytes(choice.step_bytes)}, measured "
        f"{format_bytes(choice.measured_bytes)}, {room}" + ("; planned anew" if is_planned_anew else "")
    )


def explain_out_of_memory(choice: Choice, allowed: int, fits: float | None) -> str:
    """No plan was lean enough: what was needed and what would fit.

    Args:
        choice: What the micro-batch ran on last.
        allowed: The budget in bytes.
        fits: Share of the micro-batch whose leanest plan would fit that, if it is known.
    """
    needed = f", which was expected to need {_peak(choice.peak)}" if choice.peak is not None else ""
    text = (
        f"a micro-batch of {describe(choice.size)} does not fit, with {counts(choice.plan)}{needed}; the budget is "
        f"{format_bytes(allowed)}."
    )
    if fits is not None and fits < 1:
        text += f" About {fits:.0%} of such a micro-batch would fit: lower per_device_train_batch_size or the length."
    elif fits is not None:
        text += " By the figures it fits: others use the device, or its memory is fragmented."
    phase = choice.peak.phase if choice.peak is not None else "head and loss"
    return f"{text} What else helps: {PHASES[phase]}; checkpointing_mode='offload'; a fused loss (use_liger_kernel)."


def as_data(planner: Planner, allowed: int) -> dict[str, Any]:
    """For a report: the budget, and of each size its plan, what was predicted and what was measured, in bytes."""
    return {
        "budget_bytes": allowed,
        "optimizer_state_bytes": planner.state_bytes,
        "sizes": [_entry(choice) for choice in planner.newest()],
    }


def _entry(choice: Choice) -> dict[str, Any]:
    return {
        "inputs": {name: list(dims) for name, dims in choice.size},
        "gradients_are_there": choice.gradients_are_there,
        "predicted_peak_bytes": choice.peak.bytes if choice.peak is not None else None,
        "peak_is_in": choice.peak.where if choice.peak is not None else None,
        # Without the step of the optimizer, as what was measured.
        "predicted_step_peak_bytes": choice.step_bytes or None,
        "measured_peak_bytes": choice.measured_bytes,
        "actions": dict(Counter(action.short for action in choice.plan.actions.values())),
    }


def counts(plan: Plan) -> str:
    """Such as `10 keep, 2 recompute`."""
    found = Counter(action.short for action in plan.actions.values())
    return ", ".join(f"{number} {what}" for what, number in found.items())


def _peak(peak: Peak) -> str:
    return f"{format_bytes(peak.bytes)} ({peak.where})"
