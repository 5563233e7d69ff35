"""Trainers of TRL under mode `auto`: each calls the model in its own way, with references, generation, pairs of texts."""

import dataclasses

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from tiny_models import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, set_seed

from ckpt_trainer import CheckpointingArguments, CheckpointingMixin

TEXTS = ["the cat sat on a mat " * (number % 5 + 1) for number in range(24)]
PAIRS = [{"prompt": "the cat ", "chosen": text, "rejected": "a mat on cat " * 2} for text in TEXTS]
JUDGED = [{"prompt": "the cat ", "completion": text, "label": number % 2 == 0} for number, text in enumerate(TEXTS)]
GENERATES = {"num_generations": 4, "max_completion_length": 8}

# Trainer -> its data, and what its arguments get besides.
TRAINERS = {
    "SFT": ([{"text": text} for text in TEXTS], {}),
    "DPO": (PAIRS, {}),
    "KTO": (JUDGED, {}),
    "Reward": (PAIRS, {}),
    "GRPO": ([{"prompt": "the cat sat on "}] * 24, GENERATES),
}


def llama(cls, **options):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    set_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return cls(LlamaConfig(vocab_size=len(tokenizer()), **sizes, **special, **options))


def train(folder, name, lora, **flags):
    rows, more = TRAINERS[name]
    theirs, arguments = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    ours = type("Ours", (CheckpointingMixin, theirs), {})
    own_arguments = dataclasses.make_dataclass("Arguments", [], bases=(CheckpointingArguments, arguments))
    args = own_arguments(
        output_dir=str(folder), max_steps=5, per_device_train_batch_size=4, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, bf16=False, learning_rate=1e-3, **more, **flags,
    )  # fmt: skip
    cls, options = (LlamaForSequenceClassification, {"num_labels": 1}) if name == "Reward" else (LlamaForCausalLM, {})
    parts = {"ref_model": llama(cls)} if name in ("DPO", "KTO") and not lora else {}
    if name == "GRPO":
        parts["reward_funcs"] = lambda completions, **kwargs: [float(len(text) % 7) for text in completions]
    if lora:
        task = "SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
        parts["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task)
    data = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer()}
    trainer = ours(model=llama(cls, **options), args=args, **data, **parts)
    set_seed(1)
    trainer.train()
    return trainer


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("name", TRAINERS)
def test_training_is_the_same_with_room_for_all_and_for_little(tmp_path, name, lora):
    plain = train(tmp_path, name, lora, checkpointing_mode="none")
    losses = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    assert len(losses) == 5
    for budget, does in (("20GiB", "keep"), ("1MiB", "recompute")):
        found = train(tmp_path, name, lora, checkpointing_mode="auto", checkpointing_budget=budget)
        assert [entry["loss"] for entry in found.state.log_history if "loss" in entry] == losses
        pairs = zip(plain.model.state_dict().values(), found.model.state_dict().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        sizes = found.memory_report()["auto"]["sizes"]
        assert sizes
        assert all(set(entry["actions"]) == {does} for entry in sizes)
