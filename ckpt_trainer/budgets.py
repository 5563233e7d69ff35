"""How many bytes of a device a step may take, from what was asked for and what others use of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ckpt_trainer import memory
from ckpt_trainer.host_memory import available_bytes, local_ranks


def budget_bytes(budget: float | int, device: torch.device, own_bytes: int = 0) -> int:
    """Bytes that this process may have on a device.

    Args:
        budget: A share of all that the device has (float), or bytes (int).
        device: The device. Of one without an allocator that counts, it is host memory, divided by the processes here.
        own_bytes: What this process has of host memory in tensors already.

    What other processes use of the device cannot be had: a share is of the whole device less that, bytes are at most what
    is left.
    """
    seen = memory.device_bytes(device)
    if seen is None:
        there = available_bytes() // local_ranks() + own_bytes
        return int(budget * there) if isinstance(budget, float) else budget
    free, total = seen
    left = free + memory.reserved_bytes(device)  # with what the allocator of this process has taken
    return int(budget * total) - (total - left) if isinstance(budget, float) else min(budget, left)


def budget_of(budget: float | int, device: torch.device, own_bytes: int = 0) -> Callable[[], int]:
    """`budget_bytes`, asked anew each time on a device that others use too; of host memory once, at the start."""
    if memory.device_bytes(device) is not None:
        return partial(budget_bytes, budget, device, own_bytes)
    allowed = budget_bytes(budget, device, own_bytes)
    return lambda: allowed
