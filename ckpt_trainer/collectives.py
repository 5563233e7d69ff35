"""Collectives of this process: how many ran, and what of a training step therefore cannot be run again here alone.

A rank that repeats one waits for others that do not come, or is answered with what they send for another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

# DDP lays its buckets out anew once, in its second forward, and a redo does not: collectives that this takes.
_REBUILDING = 2


class Collectives:
    """Those of one stretch of a training step, counted from when it was made.

    Args:
        model: As it is called.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before, self._rebuilt = _counts(), _has_rebuilt(model)

    def ran(self) -> bool:
        """Whether there was one that a second run would repeat; True where a backend does not count."""
        now = _counts()
        if now is None or self._before is None:
            return True
        number = sum(now) - sum(self._before)
        return number != (_REBUILDING if _has_rebuilt(self._model) and not self._rebuilt else 0) and number != 0


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
def syncing(model: nn.Module, syncs: bool) -> Iterator[None]:
    """While entered, DDP averages gradients at the end of backward, or does not (`no_sync`)."""
    if not isinstance(model, DistributedDataParallel):
        yield
        return
    before, model.require_backward_grad_sync = model.require_backward_grad_sync, syncs
    try:
        yield
    finally:
        model.require_backward_grad_sync = before


def _has_rebuilt(model: nn.Module) -> bool:
    return bool(getattr(model, "_has_rebuilt_buckets", False))


def _counts() -> list[int] | None:
    """Of each group, how many collectives ran; None where a backend does not tell."""
    if not dist.is_available() or not dist.is_initialized():
        return []
    try:
        groups: list[Any] = list(dist.distributed_c10d._world.pg_map)  # their counter is in no stub
        return [group._get_sequence_number_for_group() for group in groups]
    except (RuntimeError, AttributeError):
        return None
