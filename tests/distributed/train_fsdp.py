"""What `test_fsdp.py` starts in two processes, by `accelerate launch` with FSDP2 and its activation checkpointing on."""

import os
import sys
from dataclasses import dataclass

import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from tiny_models import llama
from trainer_runs import MODELS, MODES, QUANTISED, Results, fsdp, prepare_process, run, run_modes, run_resumed, twice
from transformers import Trainer, TrainingArguments

from ckpt_trainer import CheckpointedTrainer, CheckpointTrainingArguments

SWITCH = "FSDP_ACTIVATION_CHECKPOINTING"


def allow_cpu():
    """accelerate passes over FSDP where there is no accelerator; nothing else of it minds."""
    initialize = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
        # Each time: made again without arguments, it takes what the processes say.
        if getattr(self, "fsdp_plugin", None) is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


@dataclass
class DefaultOn(CheckpointTrainingArguments):
    """As the arguments of TRL's trainers."""

    gradient_checkpointing: bool = True


def run_switches(results):
    """Checkpointing asked for as FSDP's own: by the launcher first, then by arguments."""
    ours = CheckpointedTrainer
    for model in ("full", "lora"):
        results.keep(f"launcher, {model}", run, MODELS[model](), ours)
    os.environ[f"{SWITCH}_OFFLOAD"] = "true"
    results.keep("launcher, offload", run, llama(), ours)
    del os.environ[f"{SWITCH}_OFFLOAD"]
    results.keep("launcher, mode", run, llama(), ours, checkpointing_mode="none")
    results.keep(
        "launcher, said off", run, llama(), ours, checkpointing_mode="none", **fsdp(activation_checkpointing=False)
    )
    os.environ[SWITCH] = "false"
    on = fsdp(activation_checkpointing=True)
    results.keep("arguments", run, llama(), ours, **on)
    results.keep("arguments, every_n", run, llama(), ours, checkpointing_every_n=2, **on)
    results.keep("arguments, default of the class", run, llama(), ours, made=DefaultOn, **on)
    results.keep("arguments, plain class", run, llama(), ours, made=TrainingArguments, **on)
    results.keep("arguments, flag", run, llama(), ours, made=TrainingArguments, gradient_checkpointing=True, **on)


def main(folder):
    prepare_process()
    allow_cpu()
    results = Results()
    run_switches(results)
    for model in ("full", "lora"):
        run_modes(results, model, **fsdp())
    run_modes(results, "qlora", QUANTISED, **fsdp())
    run_modes(results, "qlora, sharded", QUANTISED, bf16=True, **fsdp())
    run_modes(results, "bf16", ("full", "expensive"), bf16=True, **fsdp())
    results.keep("no dropout", run, MODELS["no dropout"](), CheckpointedTrainer, **MODES["full"], **fsdp())
    results.keep("environment", run, llama(), CheckpointedTrainer, **MODES["full"])
    reentrant = {"checkpointing_use_reentrant": True, **fsdp()}
    results.keep("reentrant", run, llama(), CheckpointedTrainer, **reentrant)
    results.keep("reentrant, none", run, llama(), CheckpointedTrainer, checkpointing_mode="none", **reentrant)
    for model in ("full", "lora"):
        more = {"wrap": twice, "gradient_accumulation_steps": 2, **fsdp()}
        results.keep(f"twice, {model}, plain", run, MODELS[model](), Trainer, **more)
        for mode in ("full", "attention", "offload"):
            results.keep(f"twice, {model}, {mode}", run, MODELS[model](), CheckpointedTrainer, **MODES[mode], **more)
    for model in ("full", "lora"):
        run_resumed(results, f"saved, {model}", model, f"{folder}/{model}", **fsdp())
    saved = {"output_dir": f"{folder}/plain", "save_strategy": "steps", "save_steps": 1}
    results.keep("saved, plain", run, llama(), Trainer, 1, **saved, **fsdp())
    results.found["folder"] = folder
    results.write(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
