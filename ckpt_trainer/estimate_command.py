"""`ckpt-trainer estimate MODEL --seq N`: what training would need in every mode, without a device and without weights."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ckpt_trainer.comparison import plot
from ckpt_trainer.estimates import DEFAULT_DEVICE, estimate
from ckpt_trainer.model_arguments import add_model_arguments, model_options
from ckpt_trainer.roofline import DEVICES

_EXAMPLE = "example: ckpt-trainer estimate meta-llama/Llama-3.1-8B --seq 8192 --device A100-80 --plot modes.png"


def add_parser(subparsers: Any) -> None:
    """Add the command to those of a program."""
    said = "what training a model would need in every mode, by its config alone"
    parser = subparsers.add_parser("estimate", help=said, description=said, epilog=_EXAMPLE)
    add_model_arguments(parser)
    known = ", ".join(DEVICES)
    parser.add_argument("--device", metavar="NAME", help=f"one of {known} (default: {DEFAULT_DEVICE})")
    parser.add_argument("--accumulate", action="store_true", help="a later micro-batch: all gradients are there")
    parser.add_argument("--largest", action="store_true", help="find the largest batch and the longest sequence, too")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Print the estimate.

    Returns:
        0, or 1 where `auto` was asked for and nothing fits.
    """
    found = estimate(
        chosen.model,
        device=chosen.device,
        accumulate=chosen.accumulate,
        largest=chosen.largest,
        **model_options(chosen),
    )
    print(json.dumps(found.as_data(), indent=2) if chosen.json else found)
    if chosen.plot:
        plot(found.rows, chosen.plot, found.budget_bytes, found.title)
    return 1 if found.problem else 0
