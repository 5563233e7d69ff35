"""What `test_ddp.py` starts in two processes."""

import os
import sys

import torch
import torch.distributed as dist
from tiny_models import CASES, llama
from torch.nn.parallel import DistributedDataParallel
from trainer_runs import (
    MODELS,
    MODES,
    QUANTISED,
    Results,
    fsdp,
    lora,
    prepare_process,
    run,
    run_modes,
    run_resumed,
    twice,
)
from transformers import Trainer

from ckpt_trainer import CheckpointedTrainer, checkpointing

REENTRANT = {"checkpointing_use_reentrant": True}


def switched_on():
    model = llama()
    model.gradient_checkpointing_enable()
    return model


def sum_of(losses):
    sum(losses).backward()


def one_by_one(losses):
    for loss in losses:
        loss.backward()


def only_last(losses):
    """The others are there until now, as after an exception that was caught."""
    losses[-1].backward()


def own_loop(num_forwards, ddp=None, backward=sum_of, **flags):
    """Gradients of three steps of a loop by hand."""
    torch.manual_seed(0)
    model = DistributedDataParallel(lora(llama()), **ddp or {})
    batch = CASES["llama"].batch()
    torch.manual_seed(dist.get_rank())
    found = {"losses": [], "gradients": []}
    with checkpointing(model, **flags):
        for _ in range(3):
            model.zero_grad()
            losses = [model(**batch).loss for _ in range(num_forwards)]
            backward(losses)
            found["losses"].append(sum(losses).detach())
            found["gradients"].append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return found


def run_losses(results, name, wrap=None, **flags):
    """Without checkpointing, and in three ways with it."""
    for model in ("full", "lora"):
        for trainer, key, own in (
            (Trainer, "plain", {}),
            (CheckpointedTrainer, "full", {}),
            (CheckpointedTrainer, "attention", MODES["attention"]),
            (CheckpointedTrainer, "reentrant", REENTRANT),
        ):
            results.keep(f"{name}, {model}, {key}", run, MODELS[model](), trainer, wrap=wrap, **own, **flags)


def main(folder):
    prepare_process()
    results = Results()
    for model in ("full", "lora"):
        run_modes(results, model)
        results.keep(f"{model}, reentrant", run, MODELS[model](), CheckpointedTrainer, **REENTRANT)
    run_modes(results, "unused")
    run_modes(results, "qlora", QUANTISED, bf16=True)
    results.keep("unused, reentrant", run, MODELS["unused"](), CheckpointedTrainer, **REENTRANT)
    none = {"checkpointing_mode": "none", "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    results.keep("unused, none, reentrant", run, MODELS["unused"](), CheckpointedTrainer, **none)
    results.keep("no dropout", run, MODELS["no dropout"](), CheckpointedTrainer, **MODES["full"])
    results.keep("flag", run, llama(), CheckpointedTrainer, gradient_checkpointing=True)
    results.keep("switched on", run, switched_on(), CheckpointedTrainer)
    off, on = {"ddp_find_unused_parameters": False}, {"ddp_find_unused_parameters": True}
    results.keep("said off", run, llama(), CheckpointedTrainer, gradient_checkpointing=True, **off)
    results.keep("said on", run, llama(), CheckpointedTrainer, **REENTRANT, **on)
    run_losses(results, "accumulated", gradient_accumulation_steps=2)
    run_losses(results, "twice", twice)
    static = {"static_graph": True}
    for number in (1, 2):
        results.keep(f"loop of {number}", own_loop, number, mode="none")
        results.keep(f"loop of {number}, reentrant", own_loop, number, use_reentrant=True)
        results.keep(f"loop of {number}, static", own_loop, number, static, use_reentrant=True)
    results.keep("last of 2", own_loop, 2, backward=only_last, mode="none")
    results.keep("last of 2, reentrant", own_loop, 2, backward=only_last, use_reentrant=True)
    results.keep("one by one, reentrant", own_loop, 2, backward=one_by_one, use_reentrant=True)
    for model in ("full", "lora"):
        run_resumed(results, f"saved, {model}", model, f"{folder}/{model}")
    os.environ["FSDP_VERSION"] = "2"  # which transformers 4 does not take from arguments
    results.keep("fsdp", run, llama(), CheckpointedTrainer, **fsdp(activation_checkpointing=True))
    results.write(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
