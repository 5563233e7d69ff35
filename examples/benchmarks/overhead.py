"""What the package itself costs: steps of `CheckpointedTrainer` beside those of `Trainer`, interleaved in one run.

    python examples/benchmarks/overhead.py --output examples/benchmarks/overhead.md

Mode none does nothing to a model, so whatever it takes longer or allocates is the price of the package. It is timed on a
model of some size, where it should vanish, and on one with next to nothing to compute, where it must show. Mode full is
timed beside the checkpointing of transformers, which recomputes as much.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import tracemalloc
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, default_data_collator

import ckpt_trainer
from ckpt_trainer import CheckpointingMixin, CheckpointTrainingArguments
from ckpt_trainer.memory import LiveBytes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import Batch, circumstances, make_repeatable, markdown_table, run_step, time_steps, train
from quickstart import HF, HF_SWITCH, OURS, small_llama, text_rows


class IdleTrainer(Trainer):
    """Does nothing in a step, so that only what is around it is timed."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros((), device=self.args.device)


class CheckpointedIdleTrainer(CheckpointingMixin, IdleTrainer):
    """The same with the package around it."""


HF_IDLE = (IdleTrainer, TrainingArguments)
OURS_IDLE = (CheckpointedIdleTrainer, CheckpointTrainingArguments)
NONE = {"checkpointing_mode": "none"}
FULL = {"checkpointing_mode": "full"}

# Layers, width, tokens in a row.
MODEL = (8, 256, 128)
TINY = (8, 64, 8)

# What is compared -> size of the model, the two (trainer, flags), and how many times the rounds asked for.
PAIRS: dict[str, tuple[tuple[int, int, int], tuple[Any, ...], tuple[Any, ...], int]] = {
    "Trainer / Trainer": (MODEL, (HF, {}), (HF, {}), 1),
    "mode none / Trainer": (MODEL, (OURS, NONE), (HF, {}), 1),
    "Trainer / Trainer, tiny model": (TINY, (HF, {}), (HF, {}), 10),
    "mode none / Trainer, tiny model": (TINY, (OURS, NONE), (HF, {}), 10),
    "mode none / Trainer, no work": (TINY, (OURS_IDLE, NONE), (HF_IDLE, {}), 50),
    "mode full / HF checkpointing": (MODEL, (OURS, FULL), (HF, {HF_SWITCH: True}), 1),
    "mode full / HF checkpointing, tiny model": (TINY, (OURS, FULL), (HF, {HF_SWITCH: True}), 10),
}


def prepared(pair: tuple[Any, dict[str, Any]], size: tuple[int, int, int]) -> Trainer:
    """A trainer that has trained two steps, so that all that is done once is done."""
    (trainer_class, arguments_class), flags = pair
    arguments = arguments_class(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=2,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
        disable_tqdm=True,
        **flags,
    )
    trainer = trainer_class(model=small_llama(*size), args=arguments, train_dataset=text_rows(size[2]))
    train(trainer)
    return trainer


def first_batch(size: tuple[int, int, int]) -> Batch:
    return default_data_collator(text_rows(size[2])[:2])


def compare_times(rounds: int) -> str:
    """Ratios of the times of two steps that ran one after the other."""
    rows = []
    for name, (size, *pair, times) in PAIRS.items():
        print(name, flush=True)
        trainers = [prepared(one, size) for one in pair]
        ours, theirs = time_steps(trainers, first_batch(size), rounds * times, num_warmup=3)
        low, middle, high = quantiles([a / b for a, b in zip(ours, theirs)], n=4)
        _, extra, _ = quantiles([a - b for a, b in zip(ours, theirs)], n=4)
        _, step, _ = quantiles(theirs, n=4)
        cells = (f"{middle:.3f}", f"{low:.3f} - {high:.3f}", f"{1e6 * extra:+.0f}", f"{1e3 * step:.2f}", f"{len(ours)}")
        rows.append((name, *cells))
    header = ("time of a step", "ratio (median)", "quartiles", "difference (us)", "of a step of (ms)", "rounds")
    return markdown_table(header, rows)


def compare_allocations(num_steps: int) -> str:
    """What steps leave behind in tensors and in Python objects, in mode none and without the package."""
    rows = []
    for name, one in (("mode none", (OURS, NONE)), ("Trainer", (HF, {}))):
        print(f"allocations: {name}", flush=True)
        trainer, batch = prepared(one, MODEL), first_batch(MODEL)
        with LiveBytes() as live:
            held = [_bytes_after_step(trainer, batch, live) for _ in range(num_steps)]
        grown, grown_own = python_growth(prepared(one, TINY), first_batch(TINY), 40 * num_steps)
        tensors = (f"{live.peak:,}", f"{held[0]:,}", f"{held[-1]:,}")
        rows.append((name, *tensors, f"{grown:+.1f}", f"{grown_own:+.1f}"))
    after = (f"after step {number}" for number in (1, num_steps))
    header = ("bytes", "tensors, peak", *after, "Python, growth per step", "of it by the package")
    return markdown_table(header, rows)


def _bytes_after_step(trainer: Trainer, batch: Batch, live: LiveBytes) -> int:
    run_step(trainer, batch)
    trainer.model.zero_grad()
    return live.current


def python_growth(trainer: Trainer, batch: Batch, num_steps: int) -> tuple[float, float]:
    """Python bytes that a step leaves behind: all, and those allocated by lines of the package."""
    own_lines = tracemalloc.Filter(True, str(Path(ckpt_trainer.__file__).parent / "*"))
    tracemalloc.start()
    totals = []
    # The first half is not counted: what was there before is replaced bit by bit and looks like growth.
    for _ in range(2):
        for _ in range(num_steps):
            run_step(trainer, batch)
        trainer.model.zero_grad()
        gc.collect()
        snapshot = tracemalloc.take_snapshot()
        own = snapshot.filter_traces([own_lines])
        totals.append([sum(trace.size for trace in one.traces) for one in (snapshot, own)])
    tracemalloc.stop()
    (all_before, own_before), (all_after, own_after) = totals
    return (all_after - all_before) / num_steps, (own_after - own_before) / num_steps


def main() -> None:
    options = read_options()
    make_repeatable()
    tables = [compare_times(options.rounds), compare_allocations(num_steps=10)]
    report = f"{circumstances('examples/benchmarks/overhead.py')}\n\n" + "\n\n".join(tables) + "\n"
    print(f"\n{report}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(f"# Cost of the package itself\n\n{NOTES}\n\n{report}")


NOTES = """\
Written by `overhead.py`. A step is `Trainer.training_step`, forward and backward. The model is a Llama of 8 layers in
fp32: 2 rows of 128 tokens at width 256, or (tiny) 2 rows of 8 tokens at width 64, where hardly anything but Python runs.
"No work" is a trainer whose own step is empty: its difference is what the package does around a step, with all of its code
and data in the processor's caches. The tiny model shows the same with cold caches, which takes about 0.1 ms.

The two trainers of a line take turns step by step, each on its own copy of the model. A ratio is that of two steps that
ran one after the other; the quartiles say how much such ratios vary. Times are the processor time of the process with one
thread, since the machine did other work too. How much a median means is told by the lines `Trainer / Trainer`, two copies
of the same thing: a ratio no farther from 1 than theirs is noise. Bytes are counted. Those of tensors are exact; the
growth of Python memory is that of objects replaced since the count began, alike in both."""


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=60, help="steps of each trainer, more for tiny ones (default: 60)"
    )
    parser.add_argument("--output", type=Path, help="markdown file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
