"""The command line, `ckpt-trainer estimate | bench | run`: each command has a file of its own, this one collects them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from ckpt_trainer import bench_command, estimate_command, script
from ckpt_trainer.without_weights import NeedsValues

# Each has `add_parser(subparsers)`, which sets `run` as a default of its parser, and `run(args) -> int`.
COMMANDS = (estimate_command, bench_command, script)

# What a user can put right; anything else is a fault of ours and keeps its traceback.
_OF_THE_USER = (ValueError, OSError, ImportError, NeedsValues)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Without the name of the program; None: those that the program was started with.

    Returns:
        The exit code: 0, what the command gives, or 2 after an error of the user's, which is said in one line.
    """
    parser = argparse.ArgumentParser("ckpt-trainer", description="Activation checkpointing: what it saves and costs.")
    parser.add_argument("--version", action="version", version=f"ckpt-trainer {version('ckpt_trainer')}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except _OF_THE_USER as error:
        print(f"ckpt-trainer: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
