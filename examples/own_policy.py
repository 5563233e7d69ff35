"""A policy of your own: keep the first blocks, store attention results of those in the middle, recompute the last.

    python examples/own_policy.py

Trains a tiny Llama with `Trainer` and with this policy, then with the same plan read from a file. Prints the plan, and
ends with an error if a loss or a weight differs by a single bit.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from ckpt_trainer import Action, CheckpointedTrainer, CheckpointTrainingArguments, Plan
from ckpt_trainer.blocks import Block

LAYERS, LENGTH, STEPS = 6, 64, 4


def policy(block: Block) -> Action | str:
    """By place; a text and an `Action` say the same. None would leave the block to the mode."""
    third = int(block.name.rpartition(".")[2]) * 3 // LAYERS
    return ("keep", "selective:attention", Action("recompute"))[third]


def tiny_llama() -> LlamaForCausalLM:
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            attention_dropout=0.1,
            # For the comparison: transformers 4 leaves the cache on, and kernels then round in another way.
            use_cache=False,
        )
    )


def rows(number: int) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(256, (number, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(cls: type[TrainingArguments], **flags: str) -> TrainingArguments:
    return cls(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=2,
        max_steps=STEPS,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        **flags,
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    data = rows(2 * STEPS)
    plain = Trainer(tiny_llama(), arguments(TrainingArguments), train_dataset=data)
    plain.train()

    ours = CheckpointedTrainer(
        tiny_llama(), arguments(CheckpointTrainingArguments), train_dataset=data, checkpointing_policy=policy
    )
    ours.train()
    report = ours.memory_report()

    path = Path(tempfile.mkdtemp()) / "plan.json"
    path.write_text(json.dumps(report["plan"], indent=2))
    flags = {"checkpointing_plan": str(path)}
    again = CheckpointedTrainer(tiny_llama(), arguments(CheckpointTrainingArguments, **flags), train_dataset=data)
    again.train()

    print(f"\n{Plan.from_json(path.read_text())}\n")
    print(f"losses of Trainer        {losses(plain)}\nof the policy            {losses(ours)}")
    print(f"of the plan from a file  {losses(again)}\n")
    checks = {
        "losses are those of Trainer": losses(plain) == losses(ours) == losses(again),
        "weights are those of Trainer, bit for bit": all(same_weights(plain, other) for other in (ours, again)),
        "the last blocks were recomputed": set(report["recomputed_by_block"]) >= {"model.layers.4", "model.layers.5"},
        "the first blocks were not": not set(report["recomputed_by_block"]) & {"model.layers.0", "model.layers.1"},
        "the file gives the same plan": again.memory_report()["plan"] == report["plan"],
    }
    for claim, holds in checks.items():
        print(f"{'yes' if holds else 'NO '}  {claim}")
    if not all(checks.values()):
        sys.exit("not all of these hold")


def same_weights(left: Trainer, right: Trainer) -> bool:
    pairs = zip(left.model.state_dict().values(), right.model.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


if __name__ == "__main__":
    main()
