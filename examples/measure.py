"""Compare trainers: is their training the same, and what do their steps cost?

What must be equal (losses, gradients) is recorded while a trainer trains. What a step costs is measured afterwards, on
one batch: bytes and operations are counted, each in a step of its own, and times are taken with nothing counting.
A step is `Trainer.training_step`: forward and backward, without the optimizer.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ckpt_trainer.blocks import find_blocks
from ckpt_trainer.flops import FlopCounter
from ckpt_trainer.memory import LiveBytes, current_bytes, peak_bytes, reset_peak

MIB = 2**20
Batch = dict[str, Tensor]


class Recorder(TrainerCallback):
    """Notes the losses a trainer logs and a digest of all gradients of each step; shows the progress on one line."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[str] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.gradients.append(digest_gradients(model))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])
            print(f"\r  step {state.global_step} of {state.max_steps}, loss {logs['loss']:.4f}", end="", flush=True)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        print()


def digest_gradients(model: nn.Module) -> str:
    """A hash of names and bits of all gradients: equal digests mean equal to the last bit."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            digest.update(name.encode())
            digest.update(parameter.grad.detach().contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def make_repeatable() -> None:
    """Let equal steps give equal bits, and times that can be compared. Call before the first tensor is made."""
    if not torch.accelerator.is_available():
        # Threads that wait for each other on a busy machine take many times as long, and never as long twice.
        torch.set_num_threads(1)
        return
    # The fastest kernels of an accelerator add up in an order that changes from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def train(trainer: Trainer) -> Recorder:
    """`trainer.train()`, recorded."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    assert all((recorder.losses, recorder.gradients)), "nothing was recorded, and two empty lists would be equal"
    return recorder


def run_step(trainer: Trainer, batch: Batch) -> None:
    """Forward and backward, from no gradients, as `train` calls it."""
    trainer.model.zero_grad()
    trainer.training_step(trainer.model_wrapped, batch)


def count_peak_bytes(trainer: Trainer, batch: Batch) -> int:
    """Most bytes at once that a step adds to what was there: activations, gradients and temporaries.

    As the device's allocator counts them; where it counts nothing (a CPU), by following every op.
    """
    trainer.model.zero_grad()
    device = trainer.args.device
    before = current_bytes(device)
    if before is None:
        with LiveBytes() as live:
            run_step(trainer, batch)
        return live.peak
    reset_peak(device)
    run_step(trainer, batch)
    return (peak_bytes(device) or 0) - before


def count_saved_bytes(trainer: Trainer, batch: Batch) -> int:
    """Bytes that the end of forward leaves for backward: what autograd holds, and what checkpoints keep beside it."""
    trainer.model.zero_grad()
    device = trainer.args.device
    before, held = current_bytes(device), []
    with LiveBytes() if before is None else nullcontext() as live:
        read = (lambda: live.current) if live else lambda: (current_bytes(device) or 0) - (before or 0)
        hook = trainer.model.register_forward_hook(lambda *_: held.append(read()))
        run_step(trainer, batch)
    hook.remove()
    return held[0]


def count_flops(trainer: Trainer, batch: Batch) -> int:
    """Floating-point operations of a step."""
    with FlopCounter() as counter:
        run_step(trainer, batch)
    return counter.total


def count_recomputed_blocks(trainer: Trainer, batch: Batch) -> int:
    """Blocks that backward runs again."""
    calls: list[nn.Module] = []
    blocks = [block.module for block in find_blocks(trainer.model)]
    # Not on the block itself: hooks there may lie outside of what is run again.
    inner = [next(block.children()) for block in blocks]
    hooks = [module.register_forward_pre_hook(lambda module, _: calls.append(module)) for module in inner]
    run_step(trainer, batch)
    for hook in hooks:
        hook.remove()
    return len(calls) - len(blocks)


def time_steps(trainers: Sequence[Trainer], batch: Batch, rounds: int, num_warmup: int = 1) -> list[list[float]]:
    """Seconds of steps, one of each trainer per round; from another trainer on each round, since heat and caches drift.

    Returns:
        For each trainer its `rounds` times, in order.
    """
    steps = [partial(seconds_of, partial(run_step, trainer, batch)) for trainer in trainers]
    return time_in_turns(steps, rounds, num_warmup)


def time_in_turns(steps: Sequence[Callable[[], float]], rounds: int, num_warmup: int = 1) -> list[list[float]]:
    """The same of steps that tell their own time."""
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(-num_warmup, rounds):
        print(f"\r  timing steps, round {max(number, 0) + 1} of {rounds}", end="", flush=True)
        for place in range(len(steps)):
            index = (place + number) % len(steps)
            taken = steps[index]()
            if number >= 0:
                seconds[index].append(taken)
    print()
    return seconds


def seconds_of(step: Callable[[], Any]) -> float:
    """How long a step takes; where there is no accelerator, of the processor's time."""
    start = _time_now()
    step()
    return _time_now() - start


def _time_now() -> float:
    if not torch.accelerator.is_available():
        return time.process_time()  # with one thread the same as the clock's, but for what other programs take
    torch.accelerator.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Result:
    """One trainer beside the first of a comparison, which it is measured against.

    Args:
        losses_equal: Every logged loss is the same number.
        gradients_equal: The gradients of every step are the same, bit for bit.
        time_ratio: Median time of a step / that of the first.
    """

    name: str
    losses_equal: bool
    gradients_equal: bool
    peak_bytes: int
    saved_bytes: int
    flops_ratio: float
    recomputed_blocks: int
    time_ratio: float

    @property
    def is_exact(self) -> bool:
        return self.losses_equal and self.gradients_equal


def compare(
    trainers: Mapping[str, Trainer], records: Mapping[str, Recorder], batch: Batch, rounds: int
) -> list[Result]:
    """Measure trainers that have trained, against the first of them."""
    first, *_ = records.values()
    seconds = time_steps(list(trainers.values()), batch, rounds)
    print("  counting bytes and FLOPs", flush=True)
    flops = [count_flops(trainer, batch) for trainer in trainers.values()]
    return [
        Result(
            name=name,
            losses_equal=records[name].losses == first.losses,
            gradients_equal=records[name].gradients == first.gradients,
            peak_bytes=count_peak_bytes(trainer, batch),
            saved_bytes=count_saved_bytes(trainer, batch),
            flops_ratio=flops[index] / flops[0],
            recomputed_blocks=count_recomputed_blocks(trainer, batch),
            time_ratio=median(seconds[index]) / median(seconds[0]),
        )
        for index, (name, trainer) in enumerate(trainers.items())
    ]


def results_table(results: Sequence[Result]) -> str:
    """The results as a markdown table."""
    return markdown_table(list(_COLUMNS), [[cell(result) for cell in _COLUMNS.values()] for result in results])


_COLUMNS: dict[str, Callable[[Result], str]] = {
    "run": lambda r: r.name,
    "losses equal": lambda r: "yes" if r.losses_equal else "NO",
    "gradients equal": lambda r: "yes" if r.gradients_equal else "NO",
    "peak MiB": lambda r: f"{r.peak_bytes / MIB:.1f}",
    "saved MiB": lambda r: f"{r.saved_bytes / MIB:.1f}",
    "recomputed": lambda r: f"{r.recomputed_blocks}",
    "FLOPs": lambda r: f"{r.flops_ratio:.2f} x",
    "time": lambda r: f"{r.time_ratio:.2f} x",
}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table that is also laid out for a terminal: text to the left, numbers to the right."""
    first, *others = [max(len(cell) for cell in column) for column in zip(header, *rows)]
    lines = [[row[0].ljust(first), *(cell.rjust(w) for cell, w in zip(row[1:], others))] for row in (header, *rows)]
    lines.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in others)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def circumstances(script: str) -> str:
    """Machine, versions, date and command, as a markdown list; `script` from the root of the repository."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate"))
    lines = (
        f"machine: {device_name()}, {torch.get_num_threads()} thread(s) used",
        f"versions: Python {platform.python_version()}, {packages}",
        f"date: {date.today()}",
        f"command: `{shlex.join(['python', script, *sys.argv[1:]])}`",
    )
    return "\n".join(f"- {line}" for line in lines)


def device_name() -> str:
    """The accelerator, else the processor and its number of cores."""
    if torch.accelerator.is_available():
        return str(torch.get_device_module().get_device_name())
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {len(models) or '?'} cores"
