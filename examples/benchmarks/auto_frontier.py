"""Mode `auto` at the memory of every other variant: is it as fast as that variant there, and how much faster than HF's?

    python examples/benchmarks/auto_frontier.py --output examples/benchmarks/auto_frontier.md

What `frontier.py` measures, and beside each variant `auto` with that variant's own peak as its budget; besides at 25 % and
10 % of the range between recomputing all and storing all, where transformers has recomputing all only. Everything in one
run, interleaved. Ends with an error if a loss or gradient is not that of plain training, or a peak is above its budget.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import nn

from ckpt_trainer.engine import Checkpointing
from ckpt_trainer.memory import own_bytes
from ckpt_trainer.training_args import settings_of_flags

sys.path.insert(0, str(Path(__file__).resolve().parent))
from frontier import Point, Variant, _count, _run, all_variants, measure
from measure import MIB, Batch, circumstances, make_repeatable, markdown_table
from models import add_options, build

SCRIPT = "examples/benchmarks/auto_frontier.py"
# Steps until plans are settled: two that are measured, and a few that a plan may be made anew after.
WARMUP = 6
SHARES = (0.25, 0.10)


@dataclass(frozen=True)
class Budget:
    """A budget of `auto`, and the variant that it is compared with there."""

    auto: Variant
    other: str
    peak: int


def auto_variant(model: nn.Module, batch: Batch, name: str, peak: int) -> Variant:
    """`auto` with room for so many bytes beyond weights and inputs, after its first steps."""
    model.zero_grad()
    budget = own_bytes(model, *batch.values()) + peak
    state = Checkpointing(model, settings_of_flags({"mode": "auto", "budget": budget}), logging.CRITICAL + 1)
    variant = Variant(f"auto at {name}", "ours", step=state.step)
    for _ in range(WARMUP):
        _run(model, batch, variant)
    return variant


def budgets(model: nn.Module, batch: Batch, variants: Sequence[Variant]) -> list[Budget]:
    """One for each variant that stores less than plain training, and those between."""
    model.zero_grad()
    peaks = {}
    for variant in variants:
        _run(model, batch, variant)
        peaks[variant.name] = _count(model, partial(_run, model, batch, variant))[1]
    plain, full = peaks["plain"], peaks["full"]
    aims = {name: (name, peak) for name, peak in peaks.items() if "plain" not in name and "segment" not in name}
    for share in SHARES:
        aims[f"{share:.0%} of the range"] = ("HF full", full + int(share * (plain - full)))
    found = []
    for name, (other, peak) in aims.items():
        print(f"\r  planning for {name:24}", end="", flush=True)
        found.append(Budget(auto_variant(model, batch, name, peak), other, peak))
    print()
    return found


def claims(points: Sequence[Point], aims: Sequence[Budget]) -> dict[str, bool]:
    """What is claimed -> whether it holds."""
    by_name = {point.name: point for point in points}
    found = {"losses and gradients of all are those of plain training": all(point.is_exact for point in points)}
    for aim in aims:
        auto, other = by_name[aim.auto.name], by_name[aim.other]
        found[f"{auto.name}: peak {auto.peak / MIB:.1f} MiB within {aim.peak / MIB:.1f}"] = auto.peak <= aim.peak
        if "every_n_layers" in other.name:
            text = f"{auto.name}: extra time {auto.time - 1:.3f}, at most half of {other.time - 1:.3f}"
            found[text] = auto.time - 1 <= 0.5 * (other.time - 1)
        elif "range" in auto.name:
            found[f"{auto.name}: extra time {auto.time - 1:.3f}, below {other.time - 1:.3f}"] = auto.time < other.time
        else:
            found[f"{auto.name}: time {auto.time:.3f}, at most 1.03 x {other.time:.3f}"] = (
                auto.time <= 1.03 * other.time
            )
    return found


def table(points: Sequence[Point], aims: Sequence[Budget]) -> str:
    by_name = {point.name: point for point in points}
    rows = []
    for aim in aims:
        auto, other = by_name[aim.auto.name], by_name[aim.other]
        cells = (f"{aim.peak / MIB:.1f}", f"{auto.peak / MIB:.1f}", f"{auto.time:.3f}", f"{other.time:.3f}")
        rows.append((aim.auto.name, *cells, other.name, "yes" if auto.is_exact else "NO"))
    return markdown_table(
        ("variant", "budget MiB", "peak MiB", "time", "time of", "it is compared with", "exact"), rows
    )


def run(options: argparse.Namespace, dtype: str) -> tuple[str, bool]:
    """The section of one dtype, and whether losses, gradients and peaks are what they have to be."""
    model, batch = build(options, getattr(torch, dtype))
    variants = all_variants(model)
    aims = budgets(model, batch, variants)
    points = measure(model, batch, [*variants, *(aim.auto for aim in aims)], options.rounds)
    held = claims(points, aims)
    lines = "\n".join(f"- {'yes' if holds else 'NO'}: {claim}" for claim, holds in held.items())
    noise = next(point for point in points if point.name == "plain, again")
    size = (
        f"{options.model}, {options.layers} layers, width {options.hidden}, {options.batch} x {options.tokens} tokens"
    )
    about = f"Plain training again: {noise.time:.3f}. {options.rounds} rounds:"
    text = f"## {size}, {dtype}\n\n{table(points, aims)}\n\n{about}\n\n{lines}"
    return text, all(holds for claim, holds in held.items() if "peak" in claim or "losses" in claim)


def main() -> None:
    options = read_options()
    make_repeatable()
    transformers.utils.logging.set_verbosity_error()
    notes = (
        "Peaks and budgets: bytes beyond weights and inputs. Time: forward and backward, plain training = 1, medians."
    )
    sections, holds = [f"# Auto at the memory of the others\n\n{notes}\n\n{circumstances(SCRIPT)}"], True
    for dtype in options.dtype:
        text, own = run(options, dtype)
        sections.append(text)
        holds &= own
        print(f"\n{text}\n", flush=True)
    if options.output is not None:
        options.output.write_text("\n\n".join(sections) + "\n")
    if not holds:
        sys.exit("losses or gradients differ from those of plain training, or a peak is above its budget")


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, layers=12, hidden=512, tokens=512, batch=2)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each variant (default: 7)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="(default: float32 bfloat16)")
    parser.add_argument("--output", type=Path, help="markdown file to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
