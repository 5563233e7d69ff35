"""Modes side by side, measured: one model, one batch, and a few steps in each mode, with mode `none` as the measure.

Each mode first runs steps that are counted and compared, then all of them take turns while time is taken. The optimizer
steps, too, with a learning rate of 0: weights stay as they are, so that losses and gradients of all modes can be equal to
the bit.

NOTE [what a mode that fails does]
One that runs out of memory, or that this model or machine has not, is a row that says so; what it held is given back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ckpt_trainer.comparison import Row
from ckpt_trainer.engine import Checkpointing
from ckpt_trainer.memory import format_bytes, meter_of
from ckpt_trainer.out_of_memory import drop_frames, is_out_of_memory, release_memory
from ckpt_trainer.plan import Plan, Settings
from ckpt_trainer.step_costs import BudgetTooSmall

OUT_OF_MEMORY = "out of memory"
EXACT = "exact"
# What a mode learns in its first steps it uses from then on.
NUM_WARMUP = 3
_SILENT = 100
# Views as integers, of which sums do not depend on the order.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Advance = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """What every mode does.

    Args:
        model: In training, on its device.
        batch: On the same device, with labels.
        optimizer: Of the model's parameters, with its state; None: there is none.
        autocast: Dtype of mixed precision; None: there is none.
        gradients_are_there: A later micro-batch of an accumulation, in which every gradient exists from the start.
    """

    model: nn.Module
    batch: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer | None = None
    autocast: torch.dtype | None = None
    gradients_are_there: bool = False

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.model.parameters()).device

    @property
    def state_tensors(self) -> list[Tensor]:
        """The state of the optimizer."""
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]


@dataclass(frozen=True)
class Way:
    """A way to run a step.

    Args:
        label: For its row.
        step: Around a forward and backward.
        setting: Around a step, and not timed: what is turned on once for a whole training.
        plan: What is done to each block, asked at the end.
        release: Called when the way is not needed any more.
    """

    label: str
    step: Callable[[], AbstractContextManager[Any]] = nullcontext
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext
    plan: Callable[[], Plan | None] = lambda: None
    release: Callable[[], None] = lambda: None


@dataclass
class Measured:
    """What is known of one way so far.

    Args:
        label: Of its row.
        way: None where there is none, or no more; `note` says why.
        note: Why it ended.
        loss: Of a step.
        digest: Of all gradients of that step.
        is_exact: Every step gave the loss of the first way, and the digest of its gradients.
        phase_bytes: Phase -> its peak.
        seconds: Of each round, of forward and backward.
        plan: As of `Way`.
    """

    label: str
    way: Way | None = None
    note: str = ""
    loss: Tensor | None = None
    digest: tuple[int | None, ...] = ()
    is_exact: bool = True
    phase_bytes: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    plan: Plan | None = None


def way_of(work: Work, label: str, settings: Settings) -> Way:
    """The way of this package, held as a trainer holds it.

    Raises:
        ValueError: The settings ask for something that this model cannot do.
    """
    state = Checkpointing(work.model, settings, _SILENT)
    return Way(label, state.step, plan=lambda: state.plan, release=state.release)


def way_of_transformers(work: Work, label: str) -> Way:
    """The checkpointing of transformers itself, all layers.

    Raises:
        ValueError: The model does not support it.
    """
    model: Any = work.model
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"{type(model).__name__} does not support it")
    return Way(label, setting=partial(_switched_on, model))


@contextmanager
def _switched_on(model: Any) -> Iterator[None]:
    # transformers 5 renamed them.
    names = ("activation_checkpointing", "gradient_checkpointing")
    name = next(name for name in names if hasattr(model, f"{name}_enable"))
    getattr(model, f"{name}_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()
        if hasattr(model, "_require_grads_hook"):
            model.disable_input_require_grads()


def measure_bytes(
    work: Work,
    ways: Mapping[str, Callable[[], Way]],
    before: Sequence[Measured] = (),
    advance: Advance = lambda _: None,
) -> list[Measured]:
    """Run the first steps of each way: what they need, and whether they give what the first one gives.

    Args:
        work: What is run.
        ways: Label -> what makes the way.
        before: What was measured before, which these are compared with.
        advance: Called with the label before each step.

    Returns:
        One for each way, in order; the ways of those that ran are still open, for `measure_seconds` and `close`.
    """
    found: list[Measured] = []
    for label, make in ways.items():
        measured = Measured(label)
        found.append(measured)
        with _ending(work, measured):
            measured.way = make()
            for _ in range(NUM_WARMUP):
                advance(label)
                loss = run_step(work, measured.way)
                _compare([*before, *found], measured, loss, digest_of(p.grad for p in work.model.parameters()))
            advance(label)
            measured.phase_bytes = count_peaks(work, measured.way)
    return found


def measure_seconds(work: Work, every: Sequence[Measured], rounds: int, advance: Advance = lambda _: None) -> None:
    """Time steps of all ways that still run, one of each per round, from another way on each round, as heat drifts."""
    for number in range(rounds):
        for place in range(len(every)):
            measured = every[(place + number) % len(every)]
            if measured.way is not None:
                advance(measured.label)
                with _ending(work, measured):
                    seconds, loss = time_step(work, measured.way)
                    measured.seconds.append(seconds)
                    _compare(every, measured, loss, measured.digest)


def close(every: Sequence[Measured]) -> None:
    """Let go of the ways."""
    for measured in every:
        _close(measured)


def _close(measured: Measured) -> None:
    way, measured.way = measured.way, None
    if way is not None:
        measured.plan = way.plan()
        way.release()


def _compare(every: Sequence[Measured], measured: Measured, loss: Tensor, digest: tuple[int | None, ...]) -> None:
    if measured.loss is None:
        measured.loss, measured.digest = loss, digest
    first = reference(every) or measured
    assert first.loss is not None
    same = torch.equal(first.loss, loss) and first.digest == digest
    measured.is_exact = measured.is_exact and same


def reference(every: Sequence[Measured]) -> Measured | None:
    """What others are compared with: the first that ran, which is mode `none` where it fits."""
    return next((measured for measured in every if measured.loss is not None), None)


def timed_reference(every: Sequence[Measured]) -> Measured | None:
    """What times are compared with: the first that was timed."""
    return next((measured for measured in every if measured.seconds), None)


@contextmanager
def _ending(work: Work, measured: Measured) -> Iterator[None]:
    """See NOTE [what a mode that fails does]."""
    failed: BaseException | None = None
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if not isinstance(error, ValueError) and not is_out_of_memory(error):
            raise
        failed = error
    if failed is None:
        return
    measured.note = OUT_OF_MEMORY if is_out_of_memory(failed) else _why(failed)
    measured.seconds.clear()
    # After the except block, since until its end the error holds the frames, and they the graph.
    drop_frames(failed)
    failed = None
    _close(measured)
    work.model.zero_grad()
    release_memory(work.device)


def _why(error: BaseException) -> str:
    if isinstance(error, BudgetTooSmall):
        return f"nothing fits: the least is {format_bytes(error.least.bytes)}"
    return " ".join(str(error).split())


# One step.


def run_step(work: Work, way: Way, note: Callable[[str], None] = lambda _: None) -> Tensor:
    """Forward, backward and optimizer, with the same random numbers each time.

    Args:
        work: What is run.
        way: How.
        note: Called with `start`, and at the end of `forward`, `backward` and `optimizer`.

    Returns:
        The loss, on the host. Gradients are those of the step.
    """
    work.model.zero_grad()
    torch.manual_seed(0)
    with way.setting():
        if work.gradients_are_there:
            with way.step():
                _loss(work).backward()  # type: ignore[no-untyped-call]
        note("start")
        # With the optimizer within, as in a loop of one's own: mode `auto` looks at what it needs.
        with way.step():
            loss = _loss(work)
            note("forward")
            loss.backward()  # type: ignore[no-untyped-call]
            note("backward")
            if work.optimizer is not None:
                work.optimizer.step()
                note("optimizer")
    return loss.detach().cpu()


def time_step(work: Work, way: Way) -> tuple[float, Tensor]:
    """Seconds of forward and backward, and the loss."""
    times = {}

    def note(phase: str) -> None:
        if phase in ("start", "backward"):
            times[phase] = _time_now(work.device)

    loss = run_step(work, way, note)
    return times["backward"] - times["start"], loss


def count_peaks(work: Work, way: Way) -> dict[str, int]:
    """The most bytes in each phase of a step: those of the device's allocator, else live ones."""
    found: dict[str, int] = {}
    work.model.zero_grad()
    with meter_of(work.device, work.model, *work.batch.values(), *work.state_tensors) as meter:

        def note(phase: str) -> None:
            if phase != "start":
                found[phase] = meter.peak
            meter.reset_peak()

        run_step(work, way, note)
    return found


def _loss(work: Work) -> Tensor:
    kind = work.device.type
    with torch.autocast(kind, work.autocast) if work.autocast is not None else nullcontext():
        loss: Tensor = work.model(**work.batch)["loss"]
    return loss


def _time_now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def digest_of(tensors: Iterable[Tensor | None]) -> tuple[int | None, ...]:
    """A sum over the bits of each tensor, taken where it is: what is not equal to the bit has another one."""
    sums: list[Tensor | None] = []
    for tensor in tensors:
        if tensor is None:
            sums.append(None)
            continue
        flat = tensor.detach().contiguous().view(-1)
        sums.append(flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64))
    return tuple(None if total is None else int(total) for total in sums)


# What it comes to.


def row_of(every: Sequence[Measured], measured: Measured, held_bytes: Mapping[str, int]) -> Row:
    """A row of the table.

    Args:
        every: All of them; the first that ran is the measure, of times the first that was timed.
        measured: One of them.
        held_bytes: What is there all the time: `weights`, and the state of the `optimizer`.
    """
    first = reference(every)
    if measured.loss is None or not measured.phase_bytes or first is None or measured.note:
        return Row(measured.label, note=measured.note)
    where, peak = max(measured.phase_bytes.items(), key=lambda entry: entry[1])
    timed = timed_reference(every)
    ratios = [own / other for own, other in zip(measured.seconds, timed.seconds, strict=True)] if timed else []
    return Row(
        measured.label,
        peak_bytes=peak,
        where=where,
        phase_bytes=measured.phase_bytes,
        part_bytes={**held_bytes, "activations": peak - sum(held_bytes.values())},
        slowdown=median(ratios) if ratios else None,
        plan=measured.plan,
        note=EXACT if measured.is_exact else f"NOT EXACT: {_difference(first, measured)}",
    )


def _difference(first: Measured, measured: Measured) -> str:
    assert first.loss is not None
    assert measured.loss is not None
    if torch.equal(first.loss, measured.loss):
        return "other gradients"
    return f"loss {measured.loss.item():.8g} instead of {first.loss.item():.8g}"


def budgets_between(every: Sequence[Measured], shares: Sequence[float] = (0.75, 0.5, 0.25)) -> list[int]:
    """Budgets between the leanest and the largest peak that was measured; none where all peaks are equal."""
    peaks = [max(measured.phase_bytes.values()) for measured in every if measured.phase_bytes]
    least, most = min(peaks, default=0), max(peaks, default=0)
    return [int(least + share * (most - least)) for share in shares] if most > least else []


def auto_label(budget_bytes: int) -> str:
    """How mode `auto` is called where there are several budgets."""
    return f"auto, {format_bytes(budget_bytes)}"
