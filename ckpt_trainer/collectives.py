"""Collectives of this process: how many ran, and what of a training step therefore cannot be run again here alone.

A rank that repeats one waits for others that do not come, or is answered with what they send for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle


class Collectives:
    """Those of one micro-batch, counted from when this was made. To be entered around each of its runs.

    What DDP does before the first forward of its module is not repeated by a second run, see `alone`: it sends buffers
    from the first rank to the others, and once lays its buckets out anew.

    Args:
        model: As it is called.
        synced: Called when DDP has sent buffers.

    Attributes:
        has_begun: Whether the forward of DDP's module has begun, in any of the runs.
        is_awaited: Whether DDP waits for gradients to average: its forward is over, and not under `no_sync`.
    """

    def __init__(self, model: nn.Module, synced: Callable[[], None]) -> None:
        self._model, self._synced = model, synced
        self._before, self._by_wrapper = _count(), 0
        self._at_call: int | None = None
        self.has_begun = self.is_awaited = False
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Collectives:
        if isinstance(self._model, DistributedDataParallel):
            self._hooks = [
                self._model.register_forward_pre_hook(self._note_call),
                self._model.module.register_forward_pre_hook(self._note_begin),
                self._model.register_forward_hook(self._note_end),
            ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def ran(self) -> bool:
        """Whether there was one that a second run would repeat; True where a backend does not count."""
        now = _count()
        return now is None or self._before is None or now - self._before != self._by_wrapper

    def _note_call(self, module: nn.Module, args: Any) -> None:
        self._at_call = _count()

    def _note_begin(self, module: nn.Module, args: Any) -> None:
        now = _count()
        if not self.has_begun and now is not None and self._at_call is not None:
            self._by_wrapper = now - self._at_call
            if self._by_wrapper:
                self._synced()
        self.has_begun = True

    def _note_end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.is_awaited |= bool(module.require_backward_grad_sync)


def why_not_alone(model: nn.Module, in_backward: bool) -> str:
    """Why a step of this model that failed cannot be run again on this rank alone; empty if it can.

    Args:
        model: As it is called.
        in_backward: It failed there.
    """
    if hasattr(model, "zero_optimization_stage"):
        return "DeepSpeed keeps gradients and a state of its own, which a failed step leaves half done"
    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()):
        return "under FSDP every forward gathers weights from all ranks, and the others do not gather twice"
    if in_backward and isinstance(model, DistributedDataParallel) and model.require_backward_grad_sync:
        return "in backward DDP averages gradients over all ranks, and the others do not average twice"
    return ""


@contextmanager
def alone(model: nn.Module, averages: bool, has_begun: bool) -> Iterator[None]:
    """Around a second run: DDP does not send buffers again, and averages gradients at the end of backward as at first.

    Args:
        model: As it is called.
        averages: Whether it did so in the first run (not under `no_sync`).
        has_begun: Whether the forward of its module has begun in that, so that buffers were sent.
    """
    if not isinstance(model, DistributedDataParallel):
        yield
        return
    before, model.require_backward_grad_sync = model.require_backward_grad_sync, averages
    # Its forward sets this anew.
    model.require_forward_param_sync = model.require_forward_param_sync and not has_begun
    try:
        yield
    finally:
        model.require_backward_grad_sync = before


def _count() -> int | None:
    """How many collectives ran in all groups; None where a backend does not tell."""
    if not dist.is_available() or not dist.is_initialized():
        return 0
    try:
        groups: list[Any] = list(dist.distributed_c10d._world.pg_map)  # their counter is in no stub
        return sum(int(group._get_sequence_number_for_group()) for group in groups)
    except (RuntimeError, AttributeError):
        return None
