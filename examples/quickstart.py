"""Train one small Llama on real text with each kind of checkpointing, and compare.

    python examples/quickstart.py

Prints a table and writes it as a picture. Everything is made on the spot: the text is the help that comes with Python,
tokenizer and model are built from scratch, nothing is downloaded. Ends with an error if a mode of this package does not
give the losses and gradients of `Trainer`, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib
import torch
from measure import MIB, Recorder, Result, compare, make_repeatable, results_table, train
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed

from ckpt_trainer import CheckpointedTrainer, CheckpointTrainingArguments

VOCABULARY = 2048
BATCH_SIZE = 2

# Between what storing all takes and what recomputing all does.
BUDGET = "170MiB"

HF = (Trainer, TrainingArguments)
# The whole change to a script: these two names. In one of your own,
#     from ckpt_trainer import CheckpointedTrainer as Trainer, CheckpointTrainingArguments as TrainingArguments
OURS = (CheckpointedTrainer, CheckpointTrainingArguments)

# transformers 5 renamed its switch.
HF_SWITCH = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n))

# Name -> trainer, arguments, and the flags in which a run differs. The first is what the others must be equal to.
RUNS: dict[str, tuple[tuple[type[Trainer], type[TrainingArguments]], dict[str, Any]]] = {
    "Trainer": (HF, {}),
    "Trainer, HF checkpointing": (HF, {HF_SWITCH: True}),
    "ours: none": (OURS, {"checkpointing_mode": "none"}),
    "ours: selective": (OURS, {"checkpointing_mode": "selective"}),
    "ours: selective, attention": (OURS, {"checkpointing_mode": "selective", "checkpointing_save": "attention"}),
    # Of live bytes: weights, gradients, optimizer and activations. What fits is stored, and the rest recomputed.
    f"ours: auto, {BUDGET}": (OURS, {"checkpointing_mode": "auto", "checkpointing_budget": BUDGET}),
    "ours: full": (OURS, {"checkpointing_mode": "full"}),
    "ours: full, every_n=2": (OURS, {"checkpointing_mode": "full", "checkpointing_every_n": 2}),
}


def text_rows(length: int) -> list[dict[str, Tensor]]:
    """Real English, tokenized and cut into rows of `length` tokens for a causal language model."""
    text = "\n".join(topics.values())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], learner)
    rows = torch.tensor(tokenizer.encode(text).ids).split(length)
    return [{"input_ids": row, "labels": row.clone()} for row in rows if len(row) == length]


def small_llama(layers: int, hidden: int, length: int, use_cache: bool = False) -> LlamaForCausalLM:
    """The same weights each time. Activations outweigh them, and dropout makes the random numbers count."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=length,
        attention_dropout=0.1,
        # transformers 4.57 leaves the key/value cache on in plain training. It lays keys and values out in memory in
        # another way than checkpointing, which must turn it off, and kernels then differ in the last bit.
        use_cache=use_cache,
    )
    return LlamaForCausalLM(config)


def training_arguments(arguments_class: type[TrainingArguments], steps: int, **flags: Any) -> TrainingArguments:
    """What all runs have in common, and the flags of one."""
    return arguments_class(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=steps,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
        disable_tqdm=True,
        seed=0,
        **flags,
    )


def main() -> None:
    options = read_options()
    start = time.perf_counter()
    make_repeatable()
    rows = text_rows(options.length)
    print(f"{len(rows)} rows of {options.length} tokens; {options.layers} layers of width {options.hidden}")

    runs: dict[str, Trainer] = {}
    records: dict[str, Recorder] = {}
    for number, (name, ((trainer_class, arguments_class), flags)) in enumerate(RUNS.items(), 1):
        print(f"[{number}/{len(RUNS)}] {name}", flush=True)
        arguments = training_arguments(arguments_class, options.steps, **flags)
        model = small_llama(options.layers, options.hidden, options.length)
        runs[name] = trainer_class(model=model, args=arguments, train_dataset=rows)
        records[name] = train(runs[name])

    print("comparing them")
    results = compare(runs, records, default_data_collator(rows[:BATCH_SIZE]), rounds=7)
    table = results_table(results)
    print(f"\n{table}\n")
    model = f"Llama, {options.layers} layers of width {options.hidden}, {BATCH_SIZE} rows of {options.length} tokens"
    write(results, table, model, options.output)
    print(f"written to {options.output} (.md, .json) in {time.perf_counter() - start:.0f} s")
    if wrong := [result.name for result in results if RUNS[result.name][0] is OURS and not result.is_exact]:
        sys.exit(f"not equal to Trainer: {', '.join(wrong)}")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="training steps per run (default: 5)")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers (default: 8)")
    parser.add_argument("--hidden", type=int, default=256, help="width, a multiple of 64 (default: 256)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row (default: 256)")
    default = Path(__file__).parent / "output" / "quickstart.png"
    parser.add_argument("--output", type=Path, default=default, help="picture to write; .md and .json go beside it")
    return parser.parse_args()


def write(results: Sequence[Result], table: str, model: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(table + "\n")
    path.with_suffix(".json").write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    plot(results, model, path)


def plot(results: Sequence[Result], model: str, path: Path) -> None:
    """Peak memory and time of each run, side by side."""
    matplotlib.use("Agg")  # needs no display
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 0.5 * len(results) + 1.4), sharey=True)
    names = [result.name for result in results]
    colors = ["#4c72b0" if RUNS[name][0] is OURS else "#a0a0a0" for name in names]
    panels = (
        (left, [r.peak_bytes / MIB for r in results], "{:.0f}", "peak of a step: activations and gradients (MiB)"),
        (right, [r.time_ratio for r in results], "{:.2f}", "time of forward and backward (ratio to Trainer)"),
    )
    for axes, values, label, title in panels:
        bars = axes.barh(names, values, color=colors, height=0.65)
        axes.bar_label(bars, [label.format(value) for value in values], padding=4)
        axes.set_xlabel(title)
        axes.set_xlim(0, 1.15 * max(values))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    right.axvline(1, color="black", linewidth=0.8, linestyle=":")
    left.invert_yaxis()  # first run on top; shared by both
    exact = all(result.is_exact for result in results)
    verdict = "the same in all runs, bit for bit" if exact else "NOT the same in all runs"
    figure.suptitle(f"{model}\nlosses and gradients: {verdict}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
