"""Running out of memory: which errors mean it, what keeps memory after one, and giving back what is not used.

Nothing here decides what to do about it; see `rescue` and `retrying`.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator

import torch

from ckpt_trainer.memory import format_bytes

# Of allocators whose errors have no class of their own: "CUDA error: out of memory", "MPS backend out of memory",
# "DefaultCPUAllocator: can't allocate memory", CUBLAS_STATUS_ALLOC_FAILED.
_TEXTS = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")


class OutOfMemory(torch.OutOfMemoryError):
    """Memory ran out, and nothing was left to be tried. The text says what was tried and what would fit.

    It has the words " out of memory.", by which accelerate knows that a smaller batch may fit.
    """


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, means that memory ran out."""
    return any(
        isinstance(one, torch.OutOfMemoryError)
        or (isinstance(one, RuntimeError) and any(t in str(one) for t in _TEXTS))
        for one in _chain(error)
    )


def drop_frames(error: BaseException) -> None:
    """Let go of what the frames of an error hold, which is the graph of the step that failed.

    To be called outside of the `except` block. Frames that still run are left as they are.
    """
    for one in _chain(error, with_context=True):
        traceback.clear_frames(one.__traceback__)


def release_memory(device: torch.device) -> str:
    """Give memory that no tensor uses back to the device. Returns what came of it, as text."""
    gc.collect()
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != device.type or not hasattr(torch.accelerator, "empty_cache"):
        return "garbage collected"
    before = _reserved(device)
    torch.accelerator.empty_cache()
    after = _reserved(device)
    if before is None or after is None:
        return "garbage collected, cache emptied"
    return f"garbage collected, {format_bytes(before - after)} given back to {device}"


def _reserved(device: torch.device) -> int | None:
    # Apple's allocator does not count.
    counts = hasattr(torch.get_device_module(device.type), "memory_reserved")
    return torch.accelerator.memory_reserved(device) if counts else None


def _chain(error: BaseException | None, with_context: bool = False) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or (error.__context__ if with_context else None)
