"""Mode `auto` on a real device: is its peak what was predicted, and is it faster than what others offer in that memory?

Run by `gpu.py`, as its sections `auto` and `mixed`. The first has three budgets between the peaks of `full` and of plain
training; beside `auto` at each of them stand the variants of `gpu.py`, transformers' modes and an offload in the way of
Unsloth, of which the fastest that stays within the same memory counts. The second trains batches of different lengths
(`lengths.py`) with the memory that `full` needs for the longest, and a block's worth of activations more.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ckpt_trainer.memory import LiveBytes, device_bytes, format_bytes, peak_bytes, reset_peak

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from device_steps import Row, device_of, failing_into, free_memory, measure_length, run
from lengths import Training, draw_lengths
from lengths import table as throughput_table
from measure import markdown_table
from variants import (
    FULL,
    OFFLOAD,
    VARIANTS,
    Batch,
    Stack,
    Variant,
    hf_every_n,
    make_variant,
    ours,
    random_batch,
    unsloth_offload,
)

# Of the way from the peak of `full` to that of plain training.
SHARES = {"auto, 3/4": 0.75, "auto, 1/2": 0.5, "auto, 1/4": 0.25}
# Steps until plans are settled: two that are measured, and those that a plan may be made anew after.
WARMUP = 8
# Predicted and measured peak may differ by so much, and auto may take so much more time than another variant.
MAX_ERROR, MAX_RATIO, MIN_THROUGHPUT = 0.05, 1.03, 0.97
# The share of the device that plain training may have where it does not fit.
_MOST = 0.9

OTHERS: dict[str, Callable[..., Variant]] = {
    "HF full": partial(hf_every_n, every_n=1),
    **{f"HF every_n={n}": partial(hf_every_n, every_n=n) for n in (2, 3, 4)},
    "Unsloth-style offload": unsloth_offload,
}
_OF_VARIANTS = (
    FULL, OFFLOAD, "none", "HF offload", "HF offload, rebuilt", "TRL offload, recompute", "TRL offload, all",
)  # fmt: skip


@dataclass
class Aim:
    """What `auto` was given and what came of it.

    Args:
        budget: Bytes.
        predicted: The peak that its plan was made for.
        measured: That of a step after all others that it learnt from.
        plan: Action -> number of blocks.
        status: Why there is nothing of it.
    """

    name: str
    budget: int
    predicted: int | None = None
    measured: int | None = None
    plan: dict[str, int] = field(default_factory=dict)
    status: str = ""

    @property
    def error(self) -> float | None:
        """How much the prediction is above what was measured, as a share of that."""
        return self.predicted / self.measured - 1 if self.predicted and self.measured else None


def peak_of_step(stack: Stack, batch: Batch, variant: Variant) -> int:
    """Most bytes in a step, weights included: by the device's allocator, or of live tensors where none counts."""
    device = device_of(stack)
    stack.zero_grad(set_to_none=True)
    if device_bytes(device) is not None:
        reset_peak(device)
        run(stack, batch, variant)
        return peak_bytes(device) or 0
    with LiveBytes(stack, *batch.values()) as live:
        run(stack, batch, variant)
    return live.peak


def auto(name: str, stack: Stack, options: Namespace, budget: int, batches: Sequence[Batch]) -> Variant:
    """`auto` at a budget, after so many steps that its plans stay as they are."""
    made = ours(name, stack, options, mode="auto", budget=budget)
    for number in range(WARMUP):
        run(stack, batches[number % len(batches)], made)
    return made


def predicted_peak(variant: Variant, tokens: int) -> tuple[int | None, dict[str, int]]:
    """What the plan for so many tokens was made for, and its actions; the last of several."""
    found: tuple[int | None, dict[str, int]] = (None, {})
    for entry in variant.auto().get("sizes", ()):
        if entry["inputs"].get("input_ids") == [1, tokens] and not entry["gradients_are_there"]:
            found = entry["predicted_peak_bytes"], entry["actions"]
    return found


def measure_auto(stack: Stack, tokens: int, options: Namespace, left: Callable[[], float]) -> dict[str, Any]:
    """Rows as those of other sections, the peaks of all variants, and an `Aim` for each budget."""
    batch = random_batch(stack, tokens)
    peaks: dict[str, int] = {}
    ends = range_of(stack, batch, options)
    aims = {name: Aim(name, int(ends[0] + share * (ends[1] - ends[0]))) for name, share in SHARES.items()}
    # Those of gpu.py that can be had here come in its order, `full` first.
    names = [name for name in _OF_VARIANTS if name in options.variants] + [*OTHERS, *aims]

    def make(name: str, stack: Stack, options: Namespace, tokens: int, available: int) -> Variant:
        if name in aims:
            made = auto(name, stack, options, aims[name].budget, [batch])
            aims[name].measured = peaks[name] = peak_of_step(stack, batch, made)
            aims[name].predicted, aims[name].plan = predicted_peak(made, tokens)
            return made
        made = (
            OTHERS[name](name, stack, options)
            if name in OTHERS
            else make_variant(name, stack, options, tokens, available)
        )
        if name not in peaks:
            run(stack, batch, made)  # what is learnt in a first step holds from the second on
            peaks[name] = peak_of_step(stack, batch, made)
        return made

    rows = measure_length(stack, tokens, [FULL, *(name for name in names if name != FULL)], options, left, True, make)
    for row in rows:
        if row.name in aims:
            aims[row.name].status = row.status
    found = [asdict(row) | {"time": row.time, "ratio": row.ratio} for row in rows]
    told = [asdict(aim) | {"error": aim.error} for aim in aims.values()]
    return {"tokens": tokens, "rows": found, "peaks": peaks, "aims": told}


def range_of(stack: Stack, batch: Batch, options: Namespace) -> tuple[int, int]:
    """The peak of `full`, and that of plain training; where that does not fit, most of the device."""
    full, none = (VARIANTS[name](name, stack, options) for name in (FULL, "none"))
    run(stack, batch, full)
    least = peak_of_step(stack, batch, full)
    row, most = Row("none"), least
    with failing_into(row):
        most = peak_of_step(stack, batch, none)
    if row.status:
        seen = device_bytes(device_of(stack))
        most = max(least, int(_MOST * seen[1])) if seen is not None else least
    free_memory()
    return least, most


def fastest_within(entry: Mapping[str, Any], budget: int) -> Mapping[str, Any] | None:
    """The fastest of the other variants whose peak is within a budget."""
    own = {aim["name"] for aim in entry["aims"]}
    timed = [row for row in entry["rows"] if row["name"] not in own and row["ratio"] is not None]
    fitting = [row for row in timed if entry["peaks"].get(row["name"], budget + 1) <= budget]
    return min(fitting, key=lambda row: float(row["ratio"]), default=None)


def goals_of_auto(entry: Mapping[str, Any]) -> dict[str, bool | None]:
    """What is asked of `auto` -> whether it holds; None where that was not measured."""
    rows = {row["name"]: row for row in entry["rows"]}
    found: dict[str, bool | None] = {}
    for aim in entry["aims"]:
        where = f"{entry['tokens']} tokens, {aim['name']}"
        row, error, peak = rows.get(aim["name"], {}), aim["error"], aim["measured"]
        found[f"{where}: the peak is within the budget"] = None if peak is None else peak <= aim["budget"]
        shown = f"{error:+.1%}" if error is not None else "not measured"
        found[f"{where}: predicted peak within {MAX_ERROR:.0%} of the measured one: {shown}"] = (
            None if error is None else abs(error) <= MAX_ERROR
        )
        found[f"{where}: gradients are those of full, bit for bit"] = row.get("is_exact")
        other, ratio = fastest_within(entry, aim["budget"]), row.get("ratio")
        shown = f"{other['name']}, {other['ratio']:.3f}" if other is not None else "none was timed"
        holds = None if ratio is None or other is None else ratio <= MAX_RATIO * other["ratio"]
        found[f"{where}: at most {MAX_RATIO} times as long as the fastest other within that memory ({shown})"] = holds
    return found


MIXED = ("none", "auto", FULL, OFFLOAD, "HF full", "Unsloth-style offload")


def measure_mixed(stack: Stack, options: Namespace) -> dict[str, Any]:
    """Batches of different lengths by each variant in turns: seconds of each, the peak at the longest, and the budget."""
    lengths = draw_lengths(options.mixed_steps, options.mixed_mean, options.mixed_longest)
    longest = random_batch(stack, max(lengths))
    least, most = range_of(stack, longest, options)
    budget = least + (most - least) // max(1, options.layers - 1)
    live, peaks, status = dict[str, Variant](), dict[str, int](), dict[str, str]()
    for name in MIXED:
        with failing_into(row := Row(name)):
            live[name] = _mixed_variant(name, stack, options, budget, longest)
            peaks[name] = peak_of_step(stack, longest, live[name])
        if row.status:
            status[name] = row.status
            live.pop(name, None)
    seconds: dict[str, list[float]] = {name: [] for name in live}
    for number, tokens in enumerate(lengths):
        print(f"\r  batch {number + 1} of {len(lengths)}", end="", flush=True)
        batch = random_batch(stack, tokens)
        for name in _turned(list(live), number):
            run(stack, batch, live[name])  # no kernel is looked for, and no size is new, in a step that is timed
            seconds[name].append(run(stack, batch, live[name], timed=True))
    print()
    for name in live:
        peaks[name] = max(peaks[name], peak_of_step(stack, longest, live[name]))
    live.clear()
    free_memory()
    return {"lengths": lengths, "budget": budget, "seconds": seconds, "peaks": peaks, "status": status}


def _turned(names: list[str], number: int) -> list[str]:
    start = number % max(1, len(names))
    return names[start:] + names[:start]


def _mixed_variant(name: str, stack: Stack, options: Namespace, budget: int, longest: Batch) -> Variant:
    if name == "auto":
        return auto(name, stack, options, budget, [longest])
    made = OTHERS.get(name) or VARIANTS[name]
    variant = made(name, stack, options)
    run(stack, longest, variant)
    return variant


def throughput(found: Mapping[str, Any], name: str) -> float | None:
    """Of the second half of the batches, plain training = 1."""
    times = found["seconds"]
    if not times.get(name) or not times.get("none"):
        return None
    half = len(times["none"]) // 2
    return float(sum(times["none"][half:]) / sum(times[name][half:]))


def goals_of_mixed(found: Mapping[str, Any]) -> dict[str, bool | None]:
    """What is asked of `auto` with batches of different lengths -> whether it holds."""
    rate, peak = throughput(found, "auto"), found["peaks"].get("auto")
    shown = f"{rate:.3f}" if rate is not None else "not measured"
    text = f"different lengths: auto reaches {MIN_THROUGHPUT} of the throughput of plain training: {shown}"
    within = None if peak is None else peak <= found["budget"]
    return {
        text: None if rate is None else rate >= MIN_THROUGHPUT,
        "different lengths: auto's peak is within its budget": within,
    }


def auto_table(entry: Mapping[str, Any]) -> str:
    """A row for each budget, then one for each other variant."""
    rows = {row["name"]: row for row in entry["rows"]}
    header = (
        "variant",
        "budget",
        "predicted",
        "measured",
        "difference",
        "of full",
        "fastest other within it",
        "exact",
        "plan",
    )
    lines = [(*_aim_cells(entry, aim, rows.get(aim["name"], {})),) for aim in entry["aims"]]
    others = [_other_cells(row, entry["peaks"].get(name)) for name, row in rows.items() if name not in SHARES]
    theirs = markdown_table(("variant", "peak", "of full", "exact", "note"), others)
    return f"{markdown_table(header, lines)}\n\n{theirs}"


def _aim_cells(entry: Mapping[str, Any], aim: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[str, ...]:
    other = fastest_within(entry, aim["budget"])
    return (
        aim["name"],
        *(format_bytes(aim[key]) if aim[key] is not None else "-" for key in ("budget", "predicted", "measured")),
        f"{aim['error']:+.2%}" if aim["error"] is not None else "-",
        _ratio(row.get("ratio")),
        f"{other['name']}, {_ratio(other['ratio'])}" if other is not None else "-",
        _WORDS[row.get("is_exact")],
        aim["status"] or ", ".join(f"{number} {action}" for action, number in aim["plan"].items()) or "-",
    )


def _other_cells(row: Mapping[str, Any], peak: int | None) -> tuple[str, ...]:
    exact = _WORDS[row["is_exact"]]
    return (
        row["name"],
        format_bytes(peak) if peak is not None else "-",
        _ratio(row["ratio"]),
        exact,
        row["status"] or "-",
    )


def _ratio(ratio: float | None) -> str:
    return f"{ratio:.3f}" if ratio is not None else "-"


_WORDS = {True: "yes", False: "NO", None: "-"}


def mixed_table(found: Mapping[str, Any]) -> str:
    """Throughput and peak of each variant; what could not run is said below."""
    ran = [Training(name, {}, seconds=list(its)) for name, its in found["seconds"].items()]
    lengths = f"{len(found['lengths'])} batches, longest {max(found['lengths'])} tokens"
    said = "".join(f"\n- {name}: {why}" for name, why in found["status"].items())
    if not ran or ran[0].name != "none":
        return f"{lengths}. Plain training did not run, so that there is nothing to compare with.\n{said}"
    table = throughput_table(ran, found["peaks"], found["budget"])
    return f"{lengths}, budget {format_bytes(found['budget'])}.\n\n{table}\n{said}"
