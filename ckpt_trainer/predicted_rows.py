"""From what a step costs to one row for each mode: the peak and what it consists of, the time, and what is not worth it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckpt_trainer.blocks import Block
from ckpt_trainer.comparison import Row
from ckpt_trainer.memory import format_bytes
from ckpt_trainer.plan import TIERS, Action, Plan, Settings
from ckpt_trainer.policies import make_plan
from ckpt_trainer.solver import solve
from ckpt_trainer.step_costs import BudgetTooSmall, Option, Peak, StepCosts, extra_seconds, peak_of, phase_peaks

# Each mode that stands for itself -> its settings. Every second block is what `every_n_layers=2` of transformers does.
FIXED_MODES: dict[str, Settings] = {
    "none": Settings(mode="none"),
    **{f"selective:{tier}": Settings(mode="selective", save=(tier,)) for tier in TIERS},
    "full": Settings(mode="full"),
    "full:every_2": Settings(mode="full", every_n=2),
    "offload": Settings(mode="offload"),
}
AUTO = "auto"
# A peak that is lower by a smaller share than this is no gain.
_NO_GAIN = 0.01
ALL_MODES = (*FIXED_MODES, AUTO)


def modes_named(names: Sequence[str] | None) -> tuple[str, ...]:
    """Modes by their names, or by what stands after the colon; all of them for None.

    Raises:
        ValueError: There is none of that name.
    """
    short = {label.rpartition(":")[2]: label for label in ALL_MODES}
    found = []
    for name in ALL_MODES if names is None else names:
        label = name if name in ALL_MODES else short.get(name)
        if label is None:
            near = difflib.get_close_matches(name, [*short, *ALL_MODES], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"mode {name!r} is not one of {', '.join(short)}.{hint}")
        found.append(label)
    return tuple(dict.fromkeys(found))


def plans_of(modes: Sequence[str], blocks: Sequence[Block]) -> dict[str, Plan]:
    """Mode -> its plan, of those that have one for themselves."""
    return {mode: make_plan(blocks, FIXED_MODES[mode]) for mode in modes if mode != AUTO}


def options_under(plan: Plan, costs: StepCosts) -> tuple[Option, ...]:
    """Each block's option for its action; a block that did not run in the step has only one."""
    return tuple(_option(block.options, plan[block.name]) for block in costs.blocks)


def rows_of(
    costs: StepCosts, plans: Mapping[str, Plan], modes: Sequence[str], budget_bytes: int, weight_bytes: int
) -> list[Row]:
    """One row for each mode.

    Args:
        costs: Of the step, with every action that the plans have.
        plans: From `plans_of`.
        modes: In the order of the rows.
        budget_bytes: What `auto` has to fit.
        weight_bytes: How much of what is always there is weights, buffers and the batch; the rest is of the optimizer.
    """
    rows = []
    for mode in modes:
        if mode in plans:
            rows.append(_row(mode, costs, options_under(plans[mode], costs), plans[mode], weight_bytes))
            continue
        try:
            solution = solve(costs, budget_bytes)
            rows.append(_row(mode, costs, solution.options, solution.plan, weight_bytes))
        except BudgetTooSmall as error:
            rows.append(Row(mode, note=f"nothing fits: the least is {format_bytes(error.least.bytes)}"))
    return [replace(row, note="; ".join(filter(None, (row.note, _no_better(row, rows))))) for row in rows]


def _option(options: Sequence[Option], action: Action) -> Option:
    if len(options) == 1:
        return options[0]
    return next(option for option in options if option.action.short == action.short)


def _row(label: str, costs: StepCosts, options: Sequence[Option], plan: Plan, weight_bytes: int) -> Row:
    peak = peak_of(costs, options)
    whole = sum(block.forward_seconds + block.backward_seconds for block in costs.blocks) + costs.other_seconds
    host_bytes = sum(option.host_bytes for option in options)
    return Row(
        label,
        peak_bytes=peak.bytes,
        where=peak.where,
        phase_bytes={phase: found.bytes for phase, found in phase_peaks(costs, options).items()},
        part_bytes=_parts(costs, peak, weight_bytes),
        slowdown=1 + extra_seconds(costs, options) / whole if whole else None,
        plan=plan,
        note=f"{format_bytes(host_bytes)} on the host" if host_bytes else "",
    )


def _parts(costs: StepCosts, peak: Peak, weight_bytes: int) -> dict[str, int]:
    """What a peak consists of.

    Gradients are those that were there when the phase or the block began; temporaries count as what they are of.
    """
    grown = dict(zip((block.name for block in costs.blocks), costs.grown_bytes(), strict=True))
    gradients = costs.gradient_bytes if costs.gradients_are_there or peak.phase == "optimizer" else 0
    if not costs.gradients_are_there and peak.phase == "backward":
        gradients = grown[peak.block]
    elif not costs.gradients_are_there and peak.phase == "embeddings":
        gradients = costs.gradient_bytes - costs.before_gradient_bytes
    optimizer = costs.resident_bytes - weight_bytes + (costs.optimizer_bytes if peak.phase == "optimizer" else 0)
    logits = costs.head_bytes if peak.phase == "head and loss" else 0
    rest = peak.bytes - weight_bytes - gradients - optimizer - logits
    return {
        "weights": weight_bytes,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": rest,
        "logits and loss": logits,
    }


def _no_better(row: Row, rows: Sequence[Row]) -> str:
    """Which row takes less time than this one, and no more memory."""
    if row.peak_bytes is None or row.slowdown is None:
        return ""
    better = [
        other
        for other in rows
        if other.peak_bytes is not None and other.slowdown is not None and other.label != AUTO
        if other.peak_bytes <= (1 + _NO_GAIN) * row.peak_bytes and other.slowdown < row.slowdown
    ]
    best = min(better, key=lambda other: (other.slowdown, other.peak_bytes), default=None)
    return f"no gain over {best.label}" if best is not None else ""
