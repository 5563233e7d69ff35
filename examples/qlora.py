"""LoRA on a base model in 4 or 8 bits, prepared by PEFT's function and by this package.

    python examples/qlora.py --bits 4
    python examples/qlora.py --bits 8

The small Llama of quickstart.py, quantised by bitsandbytes when it is loaded. Prints what the weights that are not
quantised take while training, compares steps, then saves the adapter and loads it again. Ends with an error if losses,
gradients, the loaded model or its `use_cache` are not what they should be.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lora import continuation
from measure import MIB, Recorder, compare, make_repeatable, markdown_table, results_table, train
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from quickstart import BATCH_SIZE, HF, HF_SWITCH, OURS, small_llama, text_rows, training_arguments
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    default_data_collator,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

LAYERS, HIDDEN, LENGTH = 8, 256, 256

# Name -> trainer and arguments, the flags in which a run differs, and whether PEFT prepares the model. Runs with and
# without PEFT's preparation differ in their losses, since it casts; each is compared with the Trainer of its kind.
PLAIN = {
    "Trainer": (HF, {}, False),
    "Trainer, HF checkpointing": (HF, {HF_SWITCH: True}, False),
    "ours: selective": (OURS, {"checkpointing_mode": "selective"}, False),
    "ours: full": (OURS, {"checkpointing_mode": "full"}, False),
}
BY_PEFT = {
    "PEFT's preparation, Trainer": (HF, {HF_SWITCH: True}, True),
    "PEFT's preparation, ours: full": (OURS, {"checkpointing_mode": "full"}, True),
}
UPCAST = {
    "ours: full, kbit_upcast norms": (OURS, {"checkpointing_kbit_upcast": "norms"}, False),
    "ours: full, kbit_upcast all": (OURS, {"checkpointing_kbit_upcast": "all"}, False),
}


class WeightsWhileTraining(TrainerCallback):
    """Notes bytes of weights in a training step: of embeddings and head, of norms, of all."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.bytes = weight_bytes(model)


def weight_bytes(model: nn.Module) -> dict[str, int]:
    sizes = {name: parameter.numel() * parameter.element_size() for name, parameter in model.named_parameters()}
    parts = {"embeddings and head": ("embed_tokens", "lm_head"), "norms": ("norm",), "all": ("",)}
    return {part: sum(n for name, n in sizes.items() if any(w in name for w in words)) for part, words in parts.items()}


def quantised_llama(folder: str, bits: int) -> nn.Module:
    """The base model as a user loads it."""
    if bits == 4:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    options = {"quantization_config": config, "dtype": torch.bfloat16, "device_map": {"": str(device)}}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model


def with_adapters(model: nn.Module) -> nn.Module:
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_dropout=0.1, target_modules="all-linear")
    set_seed(0)
    return get_peft_model(model, config)


def main() -> None:
    options = read_options()
    make_repeatable()
    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns in each call that it casts
    rows = text_rows(LENGTH)
    base = tempfile.mkdtemp()
    small_llama(LAYERS, HIDDEN, LENGTH, use_cache=True).to(torch.bfloat16).save_pretrained(base)
    runs: dict[str, Trainer] = {}
    records: dict[str, Recorder] = {}
    weights: dict[str, dict[str, int]] = {"as loaded": weight_bytes(quantised_llama(base, options.bits))}
    everything = {**PLAIN, **BY_PEFT, **UPCAST}
    for number, (name, ((trainer_class, arguments_class), flags, by_peft)) in enumerate(everything.items(), 1):
        print(f"[{number}/{len(everything)}] {name}", flush=True)
        more = {"bf16": True, "use_cpu": not torch.accelerator.is_available()}
        arguments = training_arguments(arguments_class, options.steps, **more, **flags)
        model = quantised_llama(base, options.bits)
        # As in lora.py: plain training is compared with the cache off; ours turns it off for each step, and on again.
        model.config.use_cache = (trainer_class, arguments_class) == OURS
        if by_peft:
            model = prepare_model_for_kbit_training(model)
        elif HF_SWITCH in flags:
            model.enable_input_require_grads()
        runs[name] = trainer_class(model=with_adapters(model), args=arguments, train_dataset=rows)
        seen = WeightsWhileTraining()
        runs[name].add_callback(seen)
        records[name] = train(runs[name])
        weights[name] = seen.bytes

    print(f"\nMiB of weights while training, adapters ({count_trainable(runs['Trainer'].model) / MIB:.2f}) included")
    print(markdown_table(["run", *weights["as loaded"]], [[n, *map(_mib, w.values())] for n, w in weights.items()]))
    batch = default_data_collator(rows[:BATCH_SIZE])
    checks: dict[str, bool] = {}
    for group in (PLAIN, BY_PEFT):
        print(f"comparing with: {next(iter(group))}")
        results = compare({n: runs[n] for n in group}, {n: records[n] for n in group}, batch, options.rounds)
        print(f"\n{results_table(results)}\n")
        checks |= {f"{r.name}: losses and gradients as without": r.is_exact for r in results[1:] if "ours" in r.name}
    checks |= check_weights(weights) | check_saved(runs["ours: full"], base, options.bits, batch["input_ids"])
    for claim, holds in checks.items():
        print(f"{'yes' if holds else 'NO '}  {claim}")
    if not all(checks.values()):
        sys.exit("not all of these hold")


def _mib(size: int) -> str:
    return f"{size / MIB:.2f}"


def count_trainable(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def check_weights(weights: dict[str, dict[str, int]]) -> dict[str, bool]:
    loaded, part = weights["as loaded"], "embeddings and head"
    norms = weights["ours: full, kbit_upcast norms"]
    return {
        "PEFT's preparation doubles embeddings and head": weights["PEFT's preparation, Trainer"][part]
        == 2 * loaded[part],
        "ours leaves embeddings and head as they were loaded": weights["ours: full"][part]
        == norms[part]
        == loaded[part],
        "kbit_upcast norms doubles norms alone": norms["norms"] == 2 * loaded["norms"],
    }


def check_saved(trainer: Trainer, base: str, bits: int, tokens: Tensor) -> dict[str, bool]:
    """Save the adapter, load it on the base model as a user would, and see whether both are as they should be."""
    folder = Path(tempfile.mkdtemp())
    trainer.save_model(str(folder / "adapter"))
    trainer.model.get_base_model().config.save_pretrained(folder / "base")
    loaded = PeftModel.from_pretrained(quantised_llama(base, bits), folder / "adapter")
    same_tokens = torch.equal(*(continuation(model, tokens) for model in (trainer.model, loaded)))
    config = json.loads((folder / "base" / "config.json").read_text())
    return {
        "the saved adapter, loaded, generates the same tokens": same_tokens,
        "use_cache is on, as it was: in the trained model": trainer.model.config.use_cache is True,
        "use_cache is on, as it was: in what is saved": config["use_cache"] is True,
    }


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="bits of a weight (default: 4)")
    parser.add_argument("--steps", type=int, default=5, help="training steps per run (default: 5)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per run (default: 5)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
