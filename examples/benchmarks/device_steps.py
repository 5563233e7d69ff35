"""What `gpu.py` measures of a variant: bytes, gradients, time, copies, and whether they stay the same over many steps.

Nothing here ends a run: what does not fit or fails becomes the status of its row.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ckpt_trainer import host_memory
from ckpt_trainer.memory import current_bytes, peak_bytes, reset_peak

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import time_in_turns
from overlap import idle_seconds, overlap, read_trace
from variants import FULL, LARGE, Batch, Missing, Stack, Variant, make_variant, random_batch

# Steps that are timed at least, after one for bytes.
MIN_ROUNDS = 2
# How the time of a step grows with its tokens: more than they do, since attention grows with their square.
GROWTH = 1.6


@dataclass
class Row:
    """What was measured of one variant at one length.

    Args:
        status: Why numbers are missing; empty where none is.
        seconds: Of its steps, one per round.
        ratios: Of these to those of `full` in the same round.
        setup: Seconds of all that came before: first steps, gradients, bytes.
        stored: Bytes on the device that the end of forward leaves for backward.
        peak: Most bytes on the device in a step, weights included.
        is_exact: Its gradients are those of `full`, bit for bit, with deterministic kernels; None where not looked at.
        report: What the variant tells about itself.
    """

    name: str
    side: str = ""
    status: str = ""
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    setup: float = 0.0
    stored: int | None = None
    peak: int | None = None
    is_exact: bool | None = None
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def time(self) -> float | None:
        return median(self.seconds) if self.seconds else None

    @property
    def ratio(self) -> float | None:
        return median(self.ratios) if self.ratios else None


def device_of(stack: Stack) -> torch.device:
    return next(stack.parameters()).device


def run(
    stack: Stack, batch: Batch, variant: Variant, after_forward: Callable[[], Any] = lambda: None, timed: bool = False
) -> float:
    """One step from no gradients; `after_forward` sees the loss and nothing else of the forward alive.

    Returns:
        Seconds of forward and backward, if `timed`.
    """
    stack.zero_grad(set_to_none=True)

    def step() -> None:
        with variant.step():
            loss = stack(**batch)["loss"]
            after_forward()
            loss.backward()

    with variant.setting():
        if timed:
            return seconds_of(step, device_of(stack))
        step()
        return 0.0


def seconds_of(step: Callable[[], Any], device: torch.device) -> float:
    """How long a step takes, between two events of an accelerator; else by the processor's clock."""
    if device.type == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    before, after = (torch.Event(device=device, enable_timing=True) for _ in range(2))
    torch.accelerator.synchronize()
    before.record()
    step()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1000


@contextmanager
def failing_into(row: Row) -> Iterator[None]:
    """What does not fit, or fails, becomes the status of a row; the memory that it held is given back."""
    try:
        yield
    except Missing as error:
        row.status = str(error)
    except Exception as error:  # of other packages too, on machines that nobody has seen
        row.status = reason_of(error)
        if not row.status.startswith(OUT_OF_MEMORY):
            print(f"\n{row.name}: {''.join(traceback.format_exception(error))}", file=sys.stderr)
        # They hold the tensors of the step, and the one who called this holds them.
        traceback.clear_frames(error.__traceback__)
    if row.status:
        free_memory()


OUT_OF_MEMORY = "out of memory"


def reason_of(error: BaseException) -> str:
    """In a few words, for a table."""
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    if isinstance(error, RuntimeError) and "out of memory" in str(error).lower():
        return f"{OUT_OF_MEMORY}: {first[:80]}"  # mostly of pinned memory of the host
    return f"failed: {type(error).__name__}: {first[:80]}"


def free_memory() -> None:
    """Give back what the allocators of device and host hold and nobody uses."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
        torch.accelerator.empty_cache()
        empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
        if empty is not None:
            empty()


def count_bytes(stack: Stack, batch: Batch, variant: Variant, row: Row) -> None:
    """Bytes of a step; None where no allocator counts them."""
    device = device_of(stack)
    stack.zero_grad(set_to_none=True)
    gc.collect()
    before, at_end = current_bytes(device), []
    reset_peak(device)
    run(stack, batch, variant, after_forward=lambda: at_end.append(current_bytes(device)))
    row.peak = peak_bytes(device)
    row.stored = None if before is None else at_end[0] - before


def gradients(stack: Stack, batch: Batch, variant: Variant) -> list[Tensor]:
    """Those of a step, with kernels that give the same bits each time."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        torch.manual_seed(0)
        run(stack, batch, variant)
    finally:
        torch.use_deterministic_algorithms(was)
    found = [parameter.grad for parameter in stack.parameters() if parameter.requires_grad]
    stack.zero_grad(set_to_none=True)
    return [gradient for gradient in found if gradient is not None]


def are_equal(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return len(mine) == len(theirs) > 0 and all(torch.equal(a, b) for a, b in zip(mine, theirs))


def warm(stack: Stack, batch: Batch, variant: Variant) -> None:
    """A short step: what is learned in a first one is used from the second on."""
    run(stack, {name: value[:, :_WARM_TOKENS] for name, value in batch.items()}, variant)


_WARM_TOKENS = 512


def predicted_costs(rows: Sequence[Row], growth: float) -> dict[str, float]:
    """Variant -> seconds that it takes to measure it with `growth` times the tokens."""
    # What did not fit, or failed, takes as long to do so again.
    return {row.name: (row.setup + MIN_ROUNDS * (row.time or 0.0)) * growth**GROWTH for row in rows}


def affordable(names: Sequence[str], costs: Mapping[str, float], left: float) -> list[str]:
    """The first of these variants that can be measured in the time that is left."""
    fitting, spent = [], 0.0
    for name in names:
        # The large ones are timed beside `full` again.
        spent += costs.get(name, 0.0) + (costs.get(FULL, 0.0) if name in LARGE else 0.0)
        if spent > left:
            break
        fitting.append(name)
    return fitting


def groups_of(names: Sequence[str]) -> list[list[str]]:
    """Variants that are timed in turns; each group begins with `full`. The large ones have one of their own each."""
    others = [name for name in names if name != FULL]
    small = [name for name in others if name not in LARGE]
    return [[FULL, *small], *([FULL, name] for name in others if name in LARGE)]


def measure_length(
    stack: Stack,
    tokens: int,
    names: Sequence[str],
    options: Namespace,
    left: Callable[[], float],
    exact: bool,
    make: Callable[..., Variant] = make_variant,
) -> list[Row]:
    """A row for each variant.

    Args:
        left: Seconds until the rounds should be over.
        exact: Compare gradients, too.
        make: Makes a variant; as `make_variant`.
    """
    rows: dict[str, Row] = {}
    groups = groups_of(names)
    for number, group in enumerate(groups, 1):
        limit = left() / (len(groups) - number + 1)
        for row in measure_group(stack, tokens, group, options, limit, exact, make):
            rows.setdefault(row.name, row)
    return [rows[name] for name in names if name in rows]


def measure_group(
    stack: Stack,
    tokens: int,
    names: Sequence[str],
    options: Namespace,
    limit: float,
    exact: bool,
    make: Callable[..., Variant] = make_variant,
) -> list[Row]:
    """Bytes, gradients and times of variants, all of them live at once; `limit`: seconds for all of it."""
    batch, start = random_batch(stack, tokens), time.monotonic()
    rows, live, reference = [], {}, None
    for name in names:
        print(f"  {tokens} tokens: {name:24}", flush=True)
        rows.append(row := Row(name))
        began = time.monotonic()
        with failing_into(row):
            variant = make(name, stack, options, tokens, host_memory.available_bytes())
            row.side = variant.side
            warm(stack, batch, variant)
            if exact:
                found = gradients(stack, batch, variant)
                reference = found if name == FULL else reference
                row.is_exact = are_equal(found, reference) if reference else None
                del found
            count_bytes(stack, batch, variant, row)
            live[name] = variant
        row.setup = time.monotonic() - began
        variant = None
    # A step takes no longer than all that came before it.
    slowest = sum(row.setup for row in rows if row.name in live)
    rounds = number_of_rounds(options.rounds, slowest, limit - (time.monotonic() - start))
    time_rounds(stack, batch, [row for row in rows if row.name in live], live, rounds)
    for row in rows:
        row.report = live[row.name].report() if row.name in live else {}
    live.clear()
    free_memory()
    return rows


def number_of_rounds(wanted: int, seconds: float, left: float) -> int:
    """As many as wanted if there is time, of which one takes so many seconds at most."""
    return max(min(MIN_ROUNDS, wanted), min(wanted, int(left / seconds) if seconds else wanted))


def time_rounds(stack: Stack, batch: Batch, rows: list[Row], live: dict[str, Variant], rounds: int) -> None:
    """One step of each variant per round, from another on in each; who fails is left out from then on."""

    def seconds(row: Row) -> float:
        if row.name in live:
            with failing_into(row):
                return run(stack, batch, live[row.name], timed=True)
            del live[row.name]
        return float("nan")

    # All have run at this length. Where there is time for it, a round is thrown away nevertheless.
    found = time_in_turns([lambda row=row: seconds(row) for row in rows], rounds, num_warmup=int(rounds > MIN_ROUNDS))
    full = next((own for row, own in zip(rows, found) if row.name == FULL and FULL in live), None)
    for row, own in zip(rows, found):
        if row.name in live:
            row.seconds, row.ratios = own, [mine / other for mine, other in zip(own, full or ())]


def profile_step(stack: Stack, tokens: int, name: str, options: Namespace) -> dict[str, Any]:
    """Copies of one step and how much of their time a kernel ran beside them; `status` where there is nothing to see."""
    row, found = Row(name), {"name": name, "tokens": tokens}
    with failing_into(row):
        batch = random_batch(stack, tokens)
        variant = make_variant(name, stack, options, tokens, host_memory.available_bytes())
        for _ in range(2):
            run(stack, batch, variant)
        found |= read_step(lambda: run(stack, batch, variant))
        row.status = "" if found["kernels"] else "the profiler saw no kernels"
    free_memory()
    return {**found, "status": row.status}


def read_step(step: Callable[[], Any]) -> dict[str, Any]:
    """What the profiler sees on the device while a step runs."""
    activities = torch.profiler.supported_activities()
    if torch.accelerator.is_available():
        # What the host does is not looked at, and would be most of the trace.
        activities = activities - {torch.profiler.ProfilerActivity.CPU}
        torch.accelerator.synchronize()
    with torch.profiler.profile(activities=list(activities)) as profiler:
        step()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        spans = read_trace(path)
    directions = {kind: overlap(spans, kind) for kind in ("out", "in")}
    return {
        "kernels": sum(span.kind == "kernel" for span in spans),
        "idle_seconds": idle_seconds(spans),
        **{kind: {**vars(found), "share": found.share} for kind, found in directions.items()},
    }


def watch_steps(stack: Stack, lengths: Sequence[int], steps: int, name: str, options: Namespace) -> dict[str, Any]:
    """Bytes held after each of many steps, whose lengths take turns."""
    row, held = Row(name), []
    with failing_into(row):
        batches = [random_batch(stack, tokens) for tokens in lengths]
        variant = make_variant(name, stack, options, max(lengths), host_memory.available_bytes())
        for number in range(steps):
            print(f"\r  step {number + 1} of {steps}", end="", flush=True)
            run(stack, batches[number % len(batches)], variant)
            held.append(bytes_held(device_of(stack), variant))
        print()
    free_memory()
    return {"name": name, "lengths": list(lengths), "steps": len(held), "status": row.status, **growth_of(held)}


def bytes_held(device: torch.device, variant: Variant) -> dict[str, int | None]:
    """Bytes that allocators hold: of the device, in tensors on it, and of the host's memory."""
    counted = current_bytes(device)
    return {
        "reserved": None if counted is None else torch.accelerator.memory_reserved(device),
        "allocated": counted,
        "host": variant.report().get("host_held_bytes"),
    }


def growth_of(held: Sequence[Mapping[str, int | None]]) -> dict[str, Any]:
    """What is held after the first tenth of the steps, and how much more at any time after that."""
    after = held[len(held) // 10 :]
    found: dict[str, Any] = {}
    for key in ("reserved", "allocated", "host"):
        values = [sample[key] for sample in after if sample[key] is not None]
        found[key] = values[0] if values else None
        found[f"{key}_growth"] = max(values) - values[0] if values else None
    return found
