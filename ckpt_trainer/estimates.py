"""What training a model would need, in every mode, from its config alone: no device, no weights, no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ckpt_trainer.blocks import find_blocks
from ckpt_trainer.comparison import Row, as_data, format_rows
from ckpt_trainer.fake_costs import ACTIONS, Conditions
from ckpt_trainer.flag_values import read_budget
from ckpt_trainer.memory import format_bytes
from ckpt_trainer.model_configs import DTYPES, batch_of, build_model, config_of, with_lora
from ckpt_trainer.optimizers import optimizer_named
from ckpt_trainer.plan import Action, Plan
from ckpt_trainer.predicted_rows import AUTO, modes_named, plans_of, rows_of
from ckpt_trainer.roofline import Device, device_named
from ckpt_trainer.solver import solve
from ckpt_trainer.step_costs import PHASES, BudgetTooSmall, StepCosts
from ckpt_trainer.study import Study, with_largest

DEFAULT_DEVICE = "H100"
DEFAULT_BUDGET = 0.9
# What is at its peak in these does not change with what is done to blocks.
_NOT_OF_BLOCKS = ("embeddings", "optimizer")
# Not known of another machine; what a plan takes of it is said.
_ANY_HOST = 2**60


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found. Prints as a table with what there is to say about it.

    Args:
        title: The model, the sizes and the optimizer, in a line.
        device: Whose time and link it is.
        budget_bytes: What has to hold the peak.
        parameters: How many the model has.
        trainable_parameters: How many of them train.
        rows: One for each mode.
        costs: What they were made from.
        plan: What `auto` would choose; None where nothing fits, or it was not asked for.
        problem: Why nothing fits and what would help; empty where something does.
        notes: What else there is to know.
    """

    title: str
    device: Device
    budget_bytes: int
    parameters: int
    trainable_parameters: int
    rows: tuple[Row, ...]
    costs: StepCosts = field(repr=False)
    plan: Plan | None = None
    problem: str = ""
    notes: tuple[str, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """All of it but the costs as what JSON can hold; bytes are bytes."""
        return {
            "title": self.title,
            "device": self.device.name,
            "budget_bytes": self.budget_bytes,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable_parameters,
            "rows": as_data(self.rows),
            "plan": self.plan.as_data()["blocks"] if self.plan is not None else None,
            "problem": self.problem,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        said = f"Budget {format_bytes(self.budget_bytes)}. Times are those of a roofline of {self.device.name}."
        parts = [f"{self.title}\n{said}", format_rows(self.rows), "\n".join(self.notes)]
        parts += [f"Nothing fits: {self.problem}"] if self.problem else []
        parts += [f"Plan of auto:\n{self.plan}"] if self.plan is not None else []
        return "\n\n".join(filter(None, parts))


def estimate(
    model: Any,
    batch: int | Mapping[str, Any] = 1,
    seq: int | None = None,
    *,
    task: str | None = None,
    dtype: str = "bf16",
    optimizer: str = "adamw_fused",
    lora: int | None = None,
    lora_targets: Sequence[str] | str | None = None,
    accumulate: bool = False,
    device: str | Device | None = None,
    budget: float | int | str | None = None,
    attention: str | None = None,
    modes: Sequence[str] | None = None,
    largest: bool = False,
    every_block: bool = False,
) -> Estimate:
    """Estimate what a training step needs in each mode, and how much longer it takes.

    Bytes are those of tensors. What an allocator adds, workspaces inside kernels and the device's own context are not in
    them, which is what the tenth is for that the default budget leaves. Times are those of a roofline: for comparing
    modes, not for promising the length of a step.

    Args:
        model: The name of a model on the hub, the path of its folder or of a JSON file, its config, or a module. Of a
            module the dtype and what trains are as they are.
        batch: Rows of the micro-batch; or a batch of your own, as the model is called with.
        seq: Tokens in a row; not for a batch of your own.
        task: What is trained for, one of `TASKS`; None: what the config says.
        dtype: One of `DTYPES`: of the weights; with `-mixed`, of autocast over fp32 weights.
        optimizer: One of `torch.optim`, with `_fused` for its fused variant, or `none`. Its state has their dtype.
        lora: Rank of LoRA adapters; None: all weights train.
        lora_targets: Modules that get them; None: what PEFT takes for this model.
        accumulate: A later micro-batch of an accumulation, in which all gradients are there from the start.
        device: A name of `roofline.DEVICES`, or numbers; None: an H100.
        budget: What has to hold the peak: a share of the device's memory (float), bytes (int), or text ("20GiB", "0.8").
            None: 0.9 of the device.
        attention: One of `ATTENTIONS`; None: what transformers takes, sdpa where it can.
        modes: Which ones to compare; None: all.
        largest: Find the largest batch and the longest sequence that fit, for each mode. Takes a few times as long.
        every_block: Run all blocks instead of a few of each kind: slower, and no better where blocks are alike.

    Raises:
        ValueError: One of these is unknown or impossible.
        NeedsValues: The model computes shapes from values, so that it has to be measured live.
    """
    on = device if isinstance(device, Device) else device_named(device or DEFAULT_DEVICE)
    budget_bytes = _budget_bytes(budget, on)
    chosen = modes_named(modes)
    built, autocast = _built(model, task, dtype, attention, lora, lora_targets)
    conditions = Conditions(
        optimizer=optimizer_named(optimizer),
        autocast=autocast,
        gradients_are_there=accumulate,
        host=True,
        host_budget_bytes=_ANY_HOST,
        every_block=every_block,
    )
    plans = plans_of(chosen, find_blocks(built))
    study = Study(built, _batch(built, batch, seq), _actions(plans, chosen), on, conditions)
    title = _title(study, dtype if not isinstance(model, nn.Module) else None, optimizer, accumulate)
    return _estimate_of(study, title, chosen, plans, budget_bytes, largest)


def _estimate_of(
    study: Study, title: str, modes: Sequence[str], plans: Mapping[str, Plan], budget_bytes: int, largest: bool
) -> Estimate:
    costs = study.costs()
    rows = rows_of(costs, plans, modes, budget_bytes, study.held_bytes)
    if largest:
        rows = with_largest(rows, study, costs, plans, budget_bytes)
    plan, problem = _chosen(costs, modes, budget_bytes)
    parameters = list(study.model.parameters())
    return Estimate(
        title=title,
        device=study.device,
        budget_bytes=budget_bytes,
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable_parameters=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        rows=tuple(rows),
        costs=costs,
        plan=plan,
        problem=problem,
        notes=_notes(rows, study, largest),
    )


def _budget_bytes(budget: float | int | str | None, device: Device) -> int:
    read = read_budget("budget", budget, DEFAULT_BUDGET)
    return int(read * device.memory_bytes) if isinstance(read, float) else read


def _built(
    model: Any,
    task: str | None,
    dtype: str,
    attention: str | None,
    lora: int | None,
    lora_targets: Sequence[str] | str | None,
) -> tuple[nn.Module, torch.dtype | None]:
    """The model, and the dtype of autocast."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    weights, autocast = DTYPES[dtype]
    if isinstance(model, nn.Module):
        return model, autocast
    built = build_model(config_of(model), task, weights, attention)
    return with_lora(built, lora, lora_targets), autocast


def _batch(model: nn.Module, batch: int | Mapping[str, Any], seq: int | None) -> Mapping[str, Any]:
    if isinstance(batch, Mapping):
        return batch
    if seq is None:
        raise ValueError("seq is missing: how many tokens a row has. Give seq=2048, or a batch of your own.")
    return batch_of(model, batch, seq)


def _actions(plans: Mapping[str, Plan], modes: Sequence[str]) -> list[Action]:
    """What has to be run; what is offloaded follows from what is stored."""
    named = {replace(action, reason="", place="device") for plan in plans.values() for action in plan.actions.values()}
    return [action for action in ACTIONS if AUTO in modes or action in named]


def _chosen(costs: StepCosts, modes: Sequence[str], budget_bytes: int) -> tuple[Plan | None, str]:
    """The plan of `auto`, or why there is none."""
    if AUTO not in modes:
        return None, ""
    try:
        return solve(costs, budget_bytes).plan, ""
    except BudgetTooSmall as error:
        return None, str(error)


def _title(study: Study, dtype: str | None, optimizer: str, accumulate: bool) -> str:
    tensors = [value for value in study.batch.values() if isinstance(value, Tensor)]
    shape = " x ".join(str(size) for size in tensors[0].shape) if tensors else "of its own"
    words = [type(study.inner_model).__name__, f"batch {shape}", *([dtype] if dtype else []), optimizer]
    return ", ".join([*words, *(["a later micro-batch"] if accumulate else [])])


def _notes(rows: Sequence[Row], study: Study, largest: bool) -> tuple[str, ...]:
    notes = []
    for phase in PHASES:
        labels = [row.label for row in rows if row.where.partition(" of ")[0] == phase]
        if labels and phase in _NOT_OF_BLOCKS:
            notes.append(
                f"Peak in: {phase}. Under {', '.join(labels)} no action on a block lowers it; {PHASES[phase]} would."
            )
    tokens, limit = study.tokens, study.position_limit
    if limit is not None and tokens is not None and tokens > limit:
        notes.append(f"Rows of {tokens} tokens are longer than the {limit} positions of the model's config.")
    if largest and limit is not None:
        notes.append(f"The longest sequence ends at the {max(limit, tokens or 0)} positions of the model's config.")
    if study.sizes_can_vary and getattr(getattr(study.inner_model, "config", None), "vision_config", None) is not None:
        notes.append("Rows are of text only. In Python, a batch of your own may have images, unless they need values.")
    if not study.sizes_can_vary and largest:
        notes.append("Of a batch of your own no other sizes are known, so there is no largest one.")
    return tuple(notes)
