"""`ckpt-trainer bench MODEL --seq N`: the table of `estimate`, measured on this machine with random weights and tokens."""

from __future__ import annotations

import argparse
import json
from typing import Any

from tqdm import tqdm

from ckpt_trainer.bench import bench
from ckpt_trainer.comparison import plot
from ckpt_trainer.measured_rows import NUM_WARMUP
from ckpt_trainer.model_arguments import add_model_arguments, model_options

_EXAMPLE = "example: ckpt-trainer bench Qwen/Qwen3-0.6B --seq 4096 --lora 16 --plot modes.png"


def add_parser(subparsers: Any) -> None:
    """Add the command to those of a program."""
    said = "the table of estimate, measured on this machine with random weights and tokens"
    parser = subparsers.add_parser("bench", help=said, description=said, epilog=_EXAMPLE)
    add_model_arguments(parser)
    parser.add_argument("--accumulate", action="store_true", help="a later micro-batch: all gradients are there")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="timed steps of each mode (default: 10)")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Measure, with a progress bar where there is a terminal, and print.

    Returns:
        0, or 1 where a mode gave another loss or gradient than mode `none`.
    """
    num_steps = NUM_WARMUP + 1 + chosen.rounds
    with tqdm(unit="step", disable=None, leave=False) as bar:

        def advance(label: str) -> None:
            bar.set_description(label)
            bar.update()

        def expect(num_modes: int) -> None:
            bar.total = num_modes * num_steps
            bar.refresh()

        options = model_options(chosen)
        found = bench(chosen.model, **options, accumulate=chosen.accumulate, rounds=chosen.rounds,
                      advance=advance, expect=expect)  # fmt: skip
    print(json.dumps(found.as_data(), indent=2) if chosen.json else found)
    if chosen.plot:
        plot(found.rows, chosen.plot, found.budget_bytes, f"{found.title}\n{found.machine}")
    return 1 if False in found.exact.values() else 0
