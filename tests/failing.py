"""What runs out of memory in tests: at a chosen op, in models that are hard to run again; a stand-in for mode `auto`."""

import dataclasses
import random
import traceback

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ckpt_trainer import CheckpointingMixin

ERROR = "Device out of memory. Tried to allocate 2.00 GiB."


class Failing(TorchDispatchMode):
    """Fails at one op of each stretch in which it is on, `skip` ops after the one of the stretch before.

    Attributes:
        ops: Ops of the longest stretch.
        failed: Names of the ops that failed.
    """

    def __init__(self, skip=1, first=0):
        super().__init__()
        self.next, self.skip = first, skip
        self.is_on, self.count, self.ops, self.failed = False, 0, 0, []
        self.times = 1

    def begin(self):
        self.is_on, self.count, self.left = True, 0, self.times

    def end(self):
        self.is_on = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.is_on and self.left and func.namespace == "aten":
            self.ops = max(self.ops, self.count)
            self.count += 1
            if self.count > self.next and not _is_looked_at():
                self.left -= 1
                self.count = 0 if self.left else self.count
                self.next += 0 if self.left else self.skip
                self.failed.append(str(func))
                raise torch.OutOfMemoryError(ERROR)
        return func(*args, **(kwargs or {}))


def _is_looked_at():
    """Whether a rule of rebuilding tries an op for itself: if it fails the result is stored, and nobody hears of it."""
    return any(frame.name == "peek" for frame in traceback.extract_stack())


NEVER = 10**9


class Statistics(nn.Module):
    """A layer that draws from Python's generator, and whose result depends on buffers that it writes."""

    def __init__(self, inner, width=32):
        super().__init__()
        self.inner = inner
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("constant", torch.zeros(2**15))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x):
        out = (
            self.norm(self.inner(x).transpose(1, 2)).transpose(1, 2)
            + self.mean * (self.calls % 3) * 0.01
            + self.replaced
        )
        with torch.no_grad():
            self.mean.mul_(0.9).add_(out.mean((0, 1)) * random.random())
            self.calls += 1
            self.replaced = self.replaced + 0.01
        return out


def leaner(state, attempt, retries):
    """What mode `auto` does, in short: less is stored with each attempt."""
    mode = "full" if attempt == retries else "selective"
    state.settings = dataclasses.replace(state.settings, mode=mode)
    state._carry_out()
    state.oom_retries = retries
    state.asked.append((attempt, retries))


class Auto(CheckpointingMixin):
    """Stands for mode `auto`."""

    retries = 3

    def _checkpointing_of(self, model):
        state = super()._checkpointing_of(model)
        if not hasattr(state, "asked"):
            state.asked = []
            state.oom_retries = self.retries
            state.make_leaner = lambda *numbers: leaner(state, *numbers)
            state.explain_out_of_memory = lambda error: "Needed 3 GiB; 2 rows would fit."
        return state
