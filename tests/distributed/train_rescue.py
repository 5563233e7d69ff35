"""What `test_rescue_ddp.py` starts in two processes."""

import os
import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from failing import ERROR, Auto, Statistics
from tiny_models import llama
from trainer_runs import Results, prepare_process, run

from ckpt_trainer import CheckpointedTrainer


class Rescued(Auto, CheckpointedTrainer):
    """Fails where it is told to, once each: (micro-batch, place) -> ranks."""

    failures = {}  # noqa: RUF012
    gathers = False
    calls = 0

    def compute_loss(self, *args, **kwargs):
        failures = self.failures
        self.fails(failures, "before")
        hook = self.model.lm_head.register_forward_pre_hook(lambda *_: self.fails(failures, "within"))
        try:
            loss = super().compute_loss(*args, **kwargs)
        finally:
            hook.remove()
        random.random()
        if self.gathers:
            self.accelerator.gather(loss.detach().view(1))
        self.fails(failures, "after")
        if self.is_due(failures, "backward"):
            loss.register_hook(lambda gradient: self.fails(failures, "backward"))
        return loss

    def is_due(self, failures, place):
        return dist.get_rank() in failures.get((self.calls, place), ())

    def fails(self, failures, place):
        if self.is_due(failures, place):
            del failures[self.calls, place]
            raise torch.OutOfMemoryError(ERROR)

    def training_step(self, *args, **kwargs):
        self.calls += 1
        return super().training_step(*args, **kwargs)


def failing(failures, gathers=False):
    def wrap(cls):
        return type("Failing", (cls,), {"failures": dict(failures), "gathers": gathers})

    return wrap


def with_statistics():
    model = llama(2)
    model.model.layers[0].mlp = Statistics(model.model.layers[0].mlp)
    return model


ONE, BOTH = (1,), (0, 1)


def main(folder):
    prepare_process()
    results = Results()

    def keep(name, failures, model=lambda: llama(2), gathers=False, num_steps=4, **flags):
        flags = {"checkpointing_mode": "none", **flags}
        results.keep(name, run, model(), Rescued, num_steps, wrap=failing(failures, gathers), **flags)

    for key, flags in (("", {}), (", unused looked for", {"ddp_find_unused_parameters": True})):
        # Buckets are laid out anew in the second forward where nobody looks for unused parameters.
        flags = {"ddp_find_unused_parameters": False, **flags}
        keep(f"plain{key}", {}, **flags)
        places = {(step, place): ONE for step in range(1, 5) for place in ("before", "within", "after")}
        keep(f"forward{key}", places, **flags)
    window = {"gradient_accumulation_steps": 2}
    keep("plain, accumulated", {}, **window)
    places = {(1, "backward"): ONE, (2, "within"): (0,), (3, "after"): BOTH, (4, "before"): ONE, (5, "backward"): (0,)}
    keep("accumulated", places, **window)
    keep("plain, buffers", {}, with_statistics, **window)
    keep("buffers", {(3, "within"): ONE, (4, "within"): ONE, (5, "before"): ONE}, with_statistics, **window)
    keep("awaited", {(2, "after"): BOTH}, **window)
    keep("gathered before", {(2, "before"): BOTH}, gathers=True, **window)
    results.write(folder)
    dist.barrier()
    # At the end, since the other rank is left waiting.
    keep("backward", {(2, "backward"): ONE})
    Path(folder, f"{os.environ['RANK']}.txt").write_text(results.found["backward"]["error"])
    sys.exit(7)


if __name__ == "__main__":
    main(sys.argv[1])
