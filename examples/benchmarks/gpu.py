"""Offload on a real device: step time and peak beside what others offer, and whether copies run beside computation.

    python examples/benchmarks/gpu.py --check --output examples/benchmarks/gpu.md

The stack has the shapes of Llama-3-8B, with as many blocks as fit. Sections, in this order: `bandwidth` (what copies and
matmuls reach here), `sanitizer` (torch's, on small steps), `overlap` (a profiler's trace), `steady` (many steps, memory
held), `auto` and `mixed` (mode `auto`, see `gpu_auto.py`), `times`. What is given takes less than 9 minutes; what does not
fit into `--minutes` is left out and says so. What does not fit into memory, fails, or is not installed is a row that says
so. TRL is imported where it is there; its wheel alone is enough (`pip install --no-deps trl`).

On a machine without an accelerator nothing can be measured; `--smoke` runs all of this with tiny sizes on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from ckpt_trainer import groups
from ckpt_trainer.memory import format_bytes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bandwidth import bandwidth
from device_steps import (
    GROWTH,
    LARGE,
    Row,
    affordable,
    free_memory,
    measure_length,
    predicted_costs,
    profile_step,
    watch_steps,
)
from gpu_auto import auto_table, goals_of_auto, goals_of_mixed, measure_auto, measure_mixed, mixed_table
from measure import circumstances, markdown_table
from models import read_pairs
from older_torch import make_up_for_older_torch
from sanitized import sanitize
from variants import FULL, OFFLOAD, VARIANTS, Stack, build_stack, input_bytes, without_needless

SCRIPT = "examples/benchmarks/gpu.py"
SECTIONS = ("bandwidth", "sanitizer", "overlap", "steady", "auto", "mixed", "times")

# What mode offload must keep to: its time over that of `full`, from so many tokens on.
MAX_RATIO, FROM_TOKENS = 1.02, 8192
# Inputs of blocks that may be on the device when a forward ends: the newest, and two on their way out.
LEFT_ON_DEVICE = 3

# Sizes of Llama-3-8B beside those that have flags of their own.
_CONFIG = ["intermediate_size=14336", "num_attention_heads=32", "num_key_value_heads=8"]
# Those of --smoke.
_TINY = {
    "layers": 3, "hidden": 64, "vocab": 64, "chunk": 24, "lengths": [32, 48], "rounds": 2, "overlap_lengths": [32],
    "steady_lengths": [32], "steady_steps": 3, "buffer": 2**20, "auto_lengths": [48], "mixed_steps": 4, "mixed_mean": 24,
    "mixed_longest": 48,
    "config": ["intermediate_size=128", "num_attention_heads=2", "num_key_value_heads=1"],
}  # fmt: skip


def main() -> None:
    options = read_options()
    # Before the first kernel; it matters only where deterministic ones are asked for.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    transformers.utils.logging.set_verbosity_error()
    options.notes = make_up_for_older_torch()
    if options.smoke:
        groups.MIN_BYTES = 0
    elif not torch.accelerator.is_available():
        sys.exit("there is no accelerator, and offload does nothing without one; --smoke runs all of this in small.")
    results = measure_sections(options, save=partial(write, options))
    write(options, results)
    print(f"\n{report(options, results)}")
    unmet = [text for text, holds in goals(results).items() if not holds]
    if options.check and unmet:
        sys.exit("not met: " + "; ".join(unmet))


def measure_sections(options: Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Section -> what was measured; `save` gets what there is so far, for a run may be ended from outside."""
    end = time.monotonic() + 60 * options.minutes
    left = lambda: end - time.monotonic()  # noqa: E731
    results: dict[str, Any] = {}
    stack = None
    for section in (section for section in SECTIONS if section in options.sections):
        print(f"{section}, {left():.0f} s left", flush=True)
        if stack is None and section in _WITH_STACK:
            lengths = (*options.lengths, *options.overlap_lengths, *options.steady_lengths, *options.auto_lengths)
            lengths = (*lengths, options.mixed_longest)
            stack = build_stack(options, max(lengths), getattr(torch, options.dtype))
            options.variants = without_needless(stack, options.variants, options)
        for found in _MEASURES[section](options, stack, left):
            results[section] = found
            save(results)
    return results


def _bandwidth(options: Namespace, stack: Any, left: Any) -> Any:
    yield bandwidth(options.buffer) if torch.accelerator.is_available() else {}
    free_memory()


def _sanitizer(options: Namespace, stack: Any, left: Any) -> Any:
    yield sanitize(seconds=min(100.0, left() / 4))


def _overlap(options: Namespace, stack: Stack, left: Callable[[], float]) -> Any:
    found: list[dict[str, Any]] = []
    for tokens in options.overlap_lengths:
        for name in (name for name in options.variants if name not in _NO_COPIES and _is_one_of(name, options)):
            found.append(profile_step(stack, tokens, name, options))
            yield found


def _is_one_of(name: str, options: Namespace) -> bool:
    # Those that fill the host's memory take long to set up, and hide their copies or not as the smaller ones do.
    return options.all_overlaps or name not in LARGE


def _steady(options: Namespace, stack: Stack, left: Callable[[], float]) -> Any:
    yield watch_steps(stack, options.steady_lengths, options.steady_steps, OFFLOAD, options)


def _auto(options: Namespace, stack: Stack, left: Callable[[], float]) -> Any:
    found: list[dict[str, Any]] = []
    # A part of the time, since `times` takes all that is left.
    end = time.monotonic() + left() / 3
    for number, tokens in enumerate(options.auto_lengths):
        share = partial(
            _share, left, time.monotonic() + (end - time.monotonic()) / (len(options.auto_lengths) - number)
        )
        found.append(measure_auto(stack, tokens, options, share))
        print(auto_table(found[-1]), flush=True)
        yield found


def _mixed(options: Namespace, stack: Stack, left: Callable[[], float]) -> Any:
    yield measure_mixed(stack, options)


def _times(options: Namespace, stack: Stack, left: Callable[[], float]) -> Any:
    found: list[dict[str, Any]] = []
    rows: list[Row] = []
    last = options.lengths[0]
    for number, tokens in enumerate(options.lengths):
        costs = predicted_costs(rows, tokens / last)
        names = affordable(options.variants, costs, left())
        late = [Row(name, status="not tried: no time left") for name in options.variants if name not in names]
        growing = sum(n**GROWTH for n in options.lengths[number:])
        share = partial(_share, left, time.monotonic() + left() * tokens**GROWTH / growing)
        measured = measure_length(stack, tokens, names, options, share, exact=number == 0) if names else []
        rows, last = (measured, tokens) if names else (rows, last)
        found.append({"tokens": tokens, "input_bytes": input_bytes(stack, tokens), "layers": options.layers})
        found[-1]["rows"] = [asdict(row) | {"time": row.time, "ratio": row.ratio} for row in (*measured, *late)]
        print(times_table(found[-1]), flush=True)
        yield found


def _share(left: Callable[[], float], end: float) -> float:
    return min(left(), end - time.monotonic())


_NO_COPIES = (FULL, "none")
_WITH_STACK = ("overlap", "steady", "auto", "mixed", "times")
_MEASURES: dict[str, Callable[..., Any]] = {
    "bandwidth": _bandwidth,
    "sanitizer": _sanitizer,
    "overlap": _overlap,
    "steady": _steady,
    "auto": _auto,
    "mixed": _mixed,
    "times": _times,
}


def goals(results: Mapping[str, Any]) -> dict[str, bool | None]:
    """What mode offload is to keep to -> whether it does; None where that was not measured."""
    found: dict[str, bool | None] = {}
    for entry in results.get("times", ()):
        rows = {row["name"]: row for row in entry["rows"]}
        if OFFLOAD in rows and entry["tokens"] >= FROM_TOKENS:
            found |= _goals_at(entry, rows.get(FULL, {}), rows[OFFLOAD])
    if results.get("times") and not found:
        found[f"offload was timed from {FROM_TOKENS} tokens on"] = None
    ours = [row for entry in results.get("times", ()) for row in entry["rows"] if row["side"] == "ours"]
    exact = [row["is_exact"] for row in ours if row["is_exact"] is not None]
    if "times" in results:
        found["gradients of ours are those of full, bit for bit"] = all(exact) if len(exact) > 1 else None
    if "steady" in results:
        steady = results["steady"]
        growths = [steady.get(f"{key}_growth") for key in ("reserved", "host")]
        text = f"{steady['steps']} steps reserve no more memory of the device and take no more of the host's"
        found[text] = None if steady["status"] or None in growths else not any(growths)
    for entry in results.get("auto", ()):
        found |= goals_of_auto(entry)
    found |= goals_of_mixed(results["mixed"]) if "mixed" in results else {}
    if "sanitizer" in results:
        found["the sanitizer finds no race"] = results["sanitizer"].get("is_clean")
        found["the sanitizer finds the waits that are left out"] = results["sanitizer"].get("finds_dropped_waits")
    return found


def _goals_at(entry: Mapping[str, Any], full: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, bool | None]:
    tokens, ratio = entry["tokens"], mine["ratio"]
    shown = f"{ratio:.3f}" if ratio is not None else "not measured"
    found = {f"{tokens} tokens: time of offload / full at most {MAX_RATIO}: {shown}": ratio and ratio <= MAX_RATIO}
    stored = full.get("stored"), mine["stored"]
    gone = None if None in stored else stored[0] - stored[1]
    expected = (entry["layers"] - LEFT_ON_DEVICE) * entry["input_bytes"]
    text = f"{tokens} tokens: inputs of at least {entry['layers'] - LEFT_ON_DEVICE} of {entry['layers']} blocks gone"
    shown = f"{gone / entry['input_bytes']:.2f}" if gone is not None else "not measured"
    # Allocators round, by less than this.
    holds = None if gone is None else gone >= 0.98 * expected
    return {**found, f"{text} when the forward ends: {shown}": holds}


def report(options: Namespace, results: Mapping[str, Any]) -> str:
    """All that was measured, as Markdown."""
    trained = "all parameters trained" if options.full_finetuning else "norms trained, all else frozen"
    size = f"{options.model}, {options.layers} blocks, width {options.hidden}, {options.dtype}, {trained}"
    notes = "".join(f"\n- note: {note}" for note in options.notes)
    smoke = "\n\n**Sizes of `--smoke`: these numbers mean nothing.**" if options.smoke else ""
    parts = [f"# Offload on a device\n\n{NOTES}\n\n{circumstances(SCRIPT)}\n- model: {size}{notes}{smoke}"]
    held = [f"- {_WORDS[holds]}: {text}" for text, holds in goals(results).items()]
    parts += ["## Goals\n\n" + "\n".join(held)] if held else []
    parts += [f"## {entry['tokens']} tokens\n\n{times_table(entry)}" for entry in results.get("times", ())]
    parts += [f"## Auto, {entry['tokens']} tokens\n\n{auto_table(entry)}" for entry in results.get("auto", ())]
    parts += [f"## {title}\n\n{table(results[name])}" for name, (title, table) in _TABLES.items() if name in results]
    return "\n\n".join(parts) + "\n"


_WORDS = {True: "yes", False: "NO", None: "not measured"}


def times_table(entry: Mapping[str, Any]) -> str:
    """A row for each variant at one length; what is too long for a cell below it."""
    header = ("variant", "ms", "of full", "rounds", "stored", "peak", "exact", "out", "host", "waited ms", "note")
    table = markdown_table(header, [_times_row(row) for row in entry["rows"]])
    return "\n".join([table, *_long_notes((row["name"], _note(row)) for row in entry["rows"])])


def _note(row: Mapping[str, Any]) -> str:
    kept = row["report"].get("kept", {}).items()
    return row["status"] or ", ".join(f"{_size(found['bytes'])} stayed: {why}" for why, found in kept)


def _long_notes(notes: Iterable[tuple[str, str]]) -> list[str]:
    found = [f"- {name}: {note}" for name, note in notes if len(note) > _WIDTH]
    return ["", *found] if found else []


def _short(note: str) -> str:
    return "see below" if len(note) > _WIDTH else note or "-"


_WIDTH = 24


def _times_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    told = row["report"]
    cells = (
        f"{1000 * row['time']:.1f}" if row["time"] is not None else "-",
        f"{row['ratio']:.3f}" if row["ratio"] is not None else "-",
        str(len(row["seconds"])),
        _size(row["stored"]),
        _size(row["peak"]),
        {True: "yes", False: "NO", None: "-"}[row["is_exact"]],
        _size(told.get("bytes_out")),
        _size(told.get("host_peak_bytes")),
        f"{1000 * told['waited_seconds']:.1f}" if "waited_seconds" in told else "-",
    )
    return row["name"], *cells, _short(_note(row))


def _size(nbytes: int | None) -> str:
    return "-" if nbytes is None else format_bytes(nbytes)


def overlap_table(found: Sequence[Mapping[str, Any]]) -> str:
    header = ("variant", "tokens", "out ms", "hidden", "in ms", "hidden", "no kernel ms", "note")
    rows = []
    for entry in found:
        both = [cell for kind in ("out", "in") for cell in _overlap_cells(entry.get(kind))]
        idle = f"{1000 * entry['idle_seconds']:.1f}" if "idle_seconds" in entry else "-"
        rows.append((entry["name"], str(entry["tokens"]), *both, idle, _short(entry["status"])))
    notes = _long_notes((entry["name"], entry["status"]) for entry in found)
    return "\n".join([markdown_table(header, rows), *notes])


def _overlap_cells(found: Mapping[str, Any] | None) -> tuple[str, str]:
    if not found or found["share"] is None:
        return "-", "-"
    return f"{1000 * found['seconds']:.1f}", f"{100 * found['share']:.1f} %"


def steady_table(found: Mapping[str, Any]) -> str:
    rows = [(key, _size(found[key]), _size(found[f"{key}_growth"])) for key in ("reserved", "allocated", "host")]
    table = markdown_table(("bytes", "after a tenth of the steps", "more after that, at most"), rows)
    lengths = ", ".join(map(str, found["lengths"]))
    status = f" {found['status']}." if found["status"] else ""
    return f"{found['name']}, {found['steps']} steps of {lengths} tokens.{status}\n\n{table}"


def bandwidth_table(found: Mapping[str, float]) -> str:
    if not found:
        return "There is no accelerator."
    rate, speed = found["matmul TFLOP/s"] * 1e12, found["both"] / 2 * 1e9
    rows = [(f"{name}{'' if ' ' in name else ', GB/s'}", f"{value:.2f}") for name, value in found.items()]
    # A block of width h takes 26 h**2 FLOPs per token and more with attention, and its input 2 h bytes.
    note = f"By these, copies of inputs are hidden from a width of {rate / (13 * speed):.0f} on."
    return f"{markdown_table(('what', 'rate'), rows)}\n\n{note}"


def sanitizer_text(found: Mapping[str, Any]) -> str:
    if "is_clean" not in found:
        return f"Not run: {found['status']}."
    moved = ", ".join(f"{save} {_size(nbytes)}" for save, nbytes in found["bytes_out"].items())
    lines = (f"races found: {'none' if found['is_clean'] else 'SEE JSON'}", f"bytes out: {moved or 'none'}")
    caught = f"with all waits left out it {'finds races' if found['finds_dropped_waits'] else 'FINDS NONE'}"
    return "\n".join(f"- {line}" for line in (*lines, caught, *filter(None, [found["status"]])))


_TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "mixed": ("Batches of different lengths", mixed_table),
    "overlap": ("Copies beside computation", overlap_table),
    "steady": ("Many steps", steady_table),
    "bandwidth": ("What this machine reaches", bandwidth_table),
    "sanitizer": ("torch's sanitizer", sanitizer_text),
}

NOTES = """\
Written by `gpu.py`. A step is forward and backward, without the optimizer. *ms* is the median over rounds, by events of the
device; a round is one step of every variant, and *of full* the median of the ratios to `full` in the same round. *Stored*
is what the end of the forward leaves on the device, *peak* the most in a step, weights included. *Exact*: gradients are
those of `full`, bit for bit, with deterministic kernels (looked at for the first length). *Out*, *host* (at most) and
*waited* (the computation, for copies) are what the package reports, over all steps of the variant. Those that fill the
host's memory are timed beside `full` alone. *TRL offload* is `OffloadActivations` around the step; *HF offload, rebuilt* is
what transformers 5.23 does, for a version without it. *Hidden*: a kernel ran on another stream while the copy did."""


def write(options: Namespace, results: Mapping[str, Any]) -> None:
    """The report, and the numbers as JSON beside it."""
    if options.output is None:
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(report(options, results))
    asked = {name: value for name, value in vars(options).items() if name != "output"}
    held = {"circumstances": circumstances(SCRIPT), "options": asked, "goals": goals(results), **results}
    options.output.with_suffix(".json").write_text(json.dumps(held, indent=1, default=str) + "\n")


def read_options(arguments: Sequence[str] | None = None) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of these, with commas (default: all)")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 32768, 131072], metavar="TOKENS")
    parser.add_argument("--overlap-lengths", type=int, nargs="+", default=[8192], metavar="TOKENS")
    parser.add_argument("--steady-lengths", type=int, nargs="+", default=[8192], metavar="TOKENS", help="in turns")
    parser.add_argument("--auto-lengths", type=int, nargs="+", default=[8192], metavar="TOKENS")
    parser.add_argument("--model", default="Llama", help="configuration class without `Config` (default: Llama)")
    parser.add_argument("--config", nargs="+", default=_CONFIG, metavar="KEY=VALUE", help="more of its values, as JSON")
    numbers = {"layers": 8, "hidden": 4096, "vocab": 8192, "chunk": 8192, "rounds": 7, "steady-steps": 200}
    numbers |= {"mixed-steps": 48, "mixed-mean": 2048, "mixed-longest": 8192}
    for name, value in (numbers | {"buffer": 2**29}).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"(default: {value})")
    parser.add_argument("--dtype", default="bfloat16", help="(default: bfloat16)")
    parser.add_argument("--full-finetuning", action="store_true", help="train all parameters, not the norms alone")
    more = "flags of mode offload without their prefix: host_budget=64GiB prefetch=2"
    parser.add_argument("--offload", nargs="+", default=[], metavar="KEY=VALUE", help=more)
    parser.add_argument("--all-overlaps", action="store_true", help="profile the variants that move everything, too")
    parser.add_argument("--minutes", type=float, default=8.5, help="what does not fit is left out (default: 8.5)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that all of this runs")
    parser.add_argument("--check", action="store_true", help="end with an error where a goal is not met")
    parser.add_argument("--output", type=Path, help="Markdown file to write; the numbers go beside it as JSON")
    options = parser.parse_args(arguments)
    options.sections = options.sections.split(",")
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"--sections: {', '.join(sorted(unknown))} is not among {', '.join(SECTIONS)}")
    options.offload = read_pairs(options.offload)
    options.lengths.sort()
    for name, value in (_TINY if options.smoke else {}).items():
        setattr(options, name, value)
    return options


if __name__ == "__main__":
    main()
