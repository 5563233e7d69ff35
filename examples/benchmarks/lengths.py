"""Batches of different lengths: what does checkpointing cost when most batches would fit without it?

    python examples/benchmarks/lengths.py --output examples/benchmarks/lengths.md

Lengths are drawn from a lognormal distribution, as those of texts are. A plan that is made for the longest batch is paid
for by every short one; mode `auto` has a plan for each length. Its budget here is what `full` needs at the longest batch,
and one block's worth of activations. Every run trains the same batches in the same order, with AdamW; runs take turns
batch by batch, so that a busy machine slows all of them. Ends with an error if losses or weights differ, bit for bit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ckpt_trainer import checkpointing
from ckpt_trainer.log import logger
from ckpt_trainer.memory import LiveBytes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import MIB, circumstances, digest_gradients, make_repeatable, markdown_table
from models import add_options, build

SCRIPT = "examples/benchmarks/lengths.py"


@dataclass
class Training:
    """One training of one copy of the model.

    Args:
        name: For the table.
        flags: Of `checkpointing`.
        seconds: Of each step.
        losses: Of each step.
        digest: Of the gradients of the last step.
    """

    name: str
    flags: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    digest: str = ""
    report: dict[str, Any] = field(default_factory=dict)

    def steps(self, options: argparse.Namespace, batches: Sequence[Tensor]) -> Iterator[None]:
        """Train a step each time it is asked."""
        model, _ = build(options, torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        with checkpointing(model, **self.flags) as state:
            for tokens in batches:
                start = time.process_time()
                self.losses.append(step(model, optimizer, tokens))
                self.seconds.append(time.process_time() - start)
                yield
            self.digest = digest_weights(model)
            self.report = state.report()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> float:
    loss = model(input_ids=tokens, labels=tokens)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def digest_weights(model: nn.Module) -> str:
    """A hash of all weights, by way of gradients that are them."""
    for parameter in model.parameters():
        parameter.grad = parameter.detach()
    return digest_gradients(model)


def draw_lengths(number: int, mean: float, longest: int) -> list[int]:
    """Lengths of lognormal distribution (sigma 0.6) with this mean, cut at the longest, which occurs."""
    generator = torch.Generator().manual_seed(0)
    sigma = 0.6
    center = torch.tensor(mean).log() - sigma**2 / 2
    drawn = torch.empty(number).log_normal_(float(center), sigma, generator=generator)
    lengths = [int(length) for length in drawn.round().clamp(8, longest)]
    lengths[number // 3] = longest
    return lengths


def peak_of(options: argparse.Namespace, batches: Sequence[Tensor], flags: dict[str, Any]) -> int:
    """Most live bytes of a training with weights, gradients and optimizer state."""
    model, _ = build(options, torch.float32)
    with LiveBytes(model, *batches) as live:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        with checkpointing(model, **flags):
            for tokens in batches:
                step(model, optimizer, tokens)
    return live.peak


def block_bytes(options: argparse.Namespace, longest: Tensor) -> int:
    """What a block stores of the longest batch."""
    plain, full = ({"mode": mode} for mode in ("none", "full"))
    return (peak_of(options, [longest] * 3, plain) - peak_of(options, [longest] * 3, full)) // (options.layers - 1)


def run_in_turns(trainings: Sequence[Training], options: argparse.Namespace, batches: Sequence[Tensor]) -> None:
    running = [training.steps(options, batches) for training in trainings]
    for number in range(len(batches) + 1):  # once more, for what comes after the last step
        for training in running:
            next(training, None)
        print(f"\r  step {number} of {len(batches)}", end="", flush=True)
    print()


def main() -> None:
    options = read_options()
    make_repeatable()
    logger.setLevel("ERROR")
    lengths = draw_lengths(options.steps, options.mean, options.tokens)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 8192, (options.batch, length), generator=generator) for length in lengths]
    longest = max(batches, key=Tensor.numel)
    full = peak_of(options, [longest] * 3, {"mode": "full"})
    budget = full + block_bytes(options, longest)
    trainings = [
        Training("none", {"mode": "none"}),
        Training("auto", {"mode": "auto", "budget": budget}),
        Training("full", {"mode": "full"}),
        Training("none, again", {"mode": "none"}),
    ]
    run_in_turns(trainings, options, batches)
    peaks = {training.name: peak_of(options, batches, training.flags) for training in trainings[:3]}
    text = table(trainings, peaks, budget)
    exact = all(t.losses == trainings[0].losses and t.digest == trainings[0].digest for t in trainings)
    size = f"{options.model}, {options.layers} layers, width {options.hidden}"
    recomputed = trainings[1].report["calls"].get("recompute", 0) // options.layers
    about = (
        f"{size}, {options.batch} x lengths of mean {options.mean}, longest {options.tokens}; {options.steps} steps, the "
        f"first ones included. Budget of `auto`: {budget / MIB:.1f} MiB. It recomputed every block in {recomputed} steps, "
        "in which sizes larger than any before were measured."
    )
    notes = (
        f"# Batches of different lengths\n\n{__doc__.partition('    python')[0].strip()}\n\n{circumstances(SCRIPT)}\n\n"
        f"{about}\n\n{text}\n\nLosses and weights equal: {'yes' if exact else 'NO'}.\n"
    )
    print(notes)
    if options.output is not None:
        options.output.write_text(notes)
    if not exact:
        sys.exit("losses or weights differ from those of plain training")


def table(trainings: Sequence[Training], peaks: dict[str, int], budget: int) -> str:
    """Throughput over all steps against that of plain training, and the peak."""
    whole = sum(trainings[0].seconds)
    half = len(trainings[0].seconds) // 2
    rows = []
    for training in trainings:
        later = sum(trainings[0].seconds[half:]) / sum(training.seconds[half:])
        peak = peaks.get(training.name)
        cells = (f"{peak / MIB:.1f}", "yes" if peak <= budget else "no") if peak is not None else ("", "")
        rows.append((training.name, f"{whole / sum(training.seconds):.3f}", f"{later:.3f}", *cells))
    return markdown_table(
        ("mode", "throughput, none = 1", "second half of the steps", "peak MiB", "within the budget"), rows
    )


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, layers=8, hidden=256, tokens=1024, batch=2)
    parser.add_argument("--steps", type=int, default=300, help="batches (default: 300)")
    parser.add_argument("--mean", type=int, default=200, help="mean length (default: 200)")
    parser.add_argument("--output", type=Path, help="markdown file to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
