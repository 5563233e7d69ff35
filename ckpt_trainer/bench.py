"""What training a model needs in every mode, measured on this machine with random weights and random tokens."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers

from ckpt_trainer.budgets import budget_bytes
from ckpt_trainer.comparison import Row, as_data, format_rows
from ckpt_trainer.flag_values import read_budget
from ckpt_trainer.measured_rows import (
    EXACT,
    Advance,
    Measured,
    Way,
    Work,
    auto_label,
    budgets_between,
    close,
    digest_of,
    measure_bytes,
    measure_seconds,
    reference,
    row_of,
    timed_reference,
    way_of,
    way_of_transformers,
)
from ckpt_trainer.memory import format_bytes, own_bytes
from ckpt_trainer.model_configs import DTYPES, batch_of, build_model, config_of, with_lora
from ckpt_trainer.optimizers import optimizer_named
from ckpt_trainer.out_of_memory import is_out_of_memory
from ckpt_trainer.plan import Settings
from ckpt_trainer.predicted_rows import AUTO, FIXED_MODES, modes_named
from ckpt_trainer.prepare import UseCache
from ckpt_trainer.streams import why_not

TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Bench:
    """What `bench` found. Prints as a table with what there is to say about it.

    Args:
        title: The model, the sizes and the optimizer, in a line.
        machine: What it ran on, and with which versions.
        rows: One for each mode.
        exact: Label -> whether every loss and gradient was that of the first mode; None where the mode did not run.
        seconds: Label -> those of forward and backward, of each round.
        budget_bytes: What mode `auto` had, if it had one budget.
        notes: What else there is to know.
    """

    title: str
    machine: str
    rows: tuple[Row, ...]
    exact: Mapping[str, bool | None]
    seconds: Mapping[str, Sequence[float]]
    budget_bytes: int | None = None
    notes: tuple[str, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """All of it as what JSON can hold; bytes are bytes. A row has `exact` and `seconds` besides those of `Row`."""
        more = [{"exact": self.exact[row.label], "seconds": list(self.seconds[row.label])} for row in self.rows]
        return {
            "title": self.title,
            "machine": self.machine,
            "budget_bytes": self.budget_bytes,
            "rows": [row | own for row, own in zip(as_data(self.rows), more, strict=True)],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [self.title, self.machine, "", format_rows(self.rows), ""]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])


def bench(
    model: Any,
    batch: int = 1,
    seq: int = 512,
    *,
    task: str | None = None,
    dtype: str = "bf16",
    optimizer: str = "adamw_fused",
    lora: int | None = None,
    lora_targets: Sequence[str] | str | None = None,
    accumulate: bool = False,
    budget: float | int | str | None = None,
    attention: str | None = None,
    modes: Sequence[str] | None = None,
    rounds: int = 10,
    advance: Advance = lambda _: None,
    expect: Callable[[int], None] = lambda _: None,
) -> Bench:
    """Measure what a training step needs in each mode, and how long it takes; the arguments are those of `estimate`.

    Args:
        rounds: Timed steps of each mode.
        advance: Called with a mode before each of its steps.
        expect: Called with the number of modes, again where there are more.

    Raises:
        ValueError: One of the arguments is unknown or impossible, or not even weights, gradients and the state of the
            optimizer have room.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} was asked for. Give 1 or more.")
    chosen, read = _modes(modes), None if budget is None else read_budget("budget", budget, Settings.budget)
    work = _work(model, task, dtype, optimizer, lora, lora_targets, accumulate, attention, (batch, seq))
    allowed = None if read is None else budget_bytes(read, work.device, own_bytes(work.model, *work.state_tensors))
    with UseCache(work.model).set_to(False):
        every = _measured(work, chosen, allowed, rounds, advance, expect)
    work.model.zero_grad()
    weights = [*work.model.parameters(), *work.model.buffers(), *work.batch.values()]
    held = {"weights": own_bytes(*weights), "optimizer": own_bytes(*work.state_tensors)}
    size = f"batch {batch} x {seq}, {dtype}, {optimizer}"
    return Bench(
        title=", ".join([type(_inner(work)).__name__, size, *(["a later micro-batch"] if accumulate else [])]),
        machine=_machine(work.device),
        rows=tuple(_in_budget(row_of(every, measured, held), allowed) for measured in every),
        exact={measured.label: measured.is_exact if not measured.note else None for measured in every},
        seconds={measured.label: measured.seconds for measured in every},
        budget_bytes=allowed,
        notes=_notes(every),
    )


def _in_budget(row: Row, allowed: int | None) -> Row:
    """Says of `auto` where no plan fitted what was asked for."""
    if row.label != AUTO or allowed is None or row.peak_bytes is None or row.peak_bytes <= allowed:
        return row
    return replace(
        row, note=f"{row.note}; {format_bytes(row.peak_bytes - allowed)} above the budget, which no plan fits"
    )


def _measured(
    work: Work,
    chosen: Sequence[str],
    allowed: int | None,
    rounds: int,
    advance: Advance,
    expect: Callable[[int], None],
) -> list[Measured]:
    ways = {label: partial(_way, work, label) for label in chosen if label != AUTO}
    expect(len(ways) + (AUTO in chosen))
    every = measure_bytes(work, ways, advance=advance)
    if AUTO in chosen:
        budgets = {AUTO: allowed} if allowed is not None else {auto_label(b): b for b in budgets_between(every)}
        expect(len(ways) + len(budgets))
        ways = {label: partial(way_of, work, label, Settings(AUTO, budget=b)) for label, b in budgets.items()}
        every += measure_bytes(work, ways, every, advance)
    measure_seconds(work, every, rounds, advance)
    close(every)
    return every


def _modes(names: Sequence[str] | None) -> list[str]:
    """In the order of the rows: `none` first, which others are compared with, then what transformers does."""
    known = modes_named(None if names is None else [name for name in names if name != TRANSFORMERS])
    theirs = [TRANSFORMERS] if names is None or TRANSFORMERS in names else []
    return list(dict.fromkeys(["none", *theirs, *known]))


def _way(work: Work, label: str) -> Way:
    if label == TRANSFORMERS:
        return way_of_transformers(work, label)
    why = why_not(work.device) if label == "offload" else None
    if why:
        raise ValueError(f"nothing to move, since {why}")
    return way_of(work, label, FIXED_MODES[label])


def _work(
    model: Any,
    task: str | None,
    dtype: str,
    optimizer: str,
    lora: int | None,
    lora_targets: Sequence[str] | str | None,
    accumulate: bool,
    attention: str | None,
    size: tuple[int, int],
) -> Work:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    weights, autocast = DTYPES[dtype]
    make = optimizer_named(optimizer)
    # A build of torch for an accelerator names it even where there is none.
    device = (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device(
        "cpu"
    )
    torch.manual_seed(0)
    try:
        built = build_model(config_of(model), task, weights, attention, device)
        built = with_lora(built, lora, lora_targets)
        drawn = batch_of(built, *size, torch.Generator().manual_seed(0))
        batch = {name: tensor.to(device) for name, tensor in drawn.items()}
        stepping = make([p for p in built.parameters() if p.requires_grad]) if make is not None else None
        if stepping is not None:
            _fill_state(stepping, optimizer)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            "weights, gradients and the state of the optimizer have no room on this device. Take a smaller model, --lora, "
            "or an optimizer with less state."
        ) from error
    return Work(built, batch, stepping, autocast, accumulate)


def _fill_state(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Let the state be there from the first step on, and the weights stay as they are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    before = digest_of(parameters)
    optimizer.step()
    if digest_of(parameters) != before:
        raise ValueError(
            f"optimizer {name!r} changes weights with a learning rate of 0, too, and modes are compared on the same "
            "weights. Take another one, or none."
        )
    for parameter in parameters:
        parameter.grad = None


def _inner(work: Work) -> Any:
    model: Any = work.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _machine(device: torch.device) -> str:
    if device.type == "cpu":
        name = f"{platform.processor() or platform.machine()} (CPU, {torch.get_num_threads()} threads)"
    else:
        module = torch.get_device_module(device.type)
        name = module.get_device_name() if hasattr(module, "get_device_name") else device.type
    return f"Measured on {name}; torch {torch.__version__}, transformers {transformers.__version__}."


def _notes(every: Sequence[Measured]) -> tuple[str, ...]:
    first, timed = reference(every), timed_reference(every)
    if first is None:
        return ("No mode ran.",)
    notes = [
        f"{EXACT}: every loss and gradient is bitwise that of {first.label}.",
        "Activations: here all but weights and the state of the optimizer, gradients and logits too.",
    ]
    if timed is not None:
        notes.append(
            f"Slowdown: median of the times of forward and backward, each divided by that of {timed.label} in the same "
            f"round. {timed.label}: {1000 * median(timed.seconds):.4g} ms."
        )
    return tuple(notes)
