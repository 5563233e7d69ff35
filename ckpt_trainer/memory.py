"""Bytes: how many are in use on a device, on the host, for backward or in a whole step, and how they are written.

What to do about them is decided elsewhere. A size in text is read by `parse_bytes` and written by `format_bytes` only.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Iterable, Iterator
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_iter

try:
    import psutil
except ImportError:
    psutil = None
try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_SUFFIXES = ("B", "KiB", "MiB", "GiB", "TiB")
_UNITS = {"": 1, "b": 1} | {f"{prefix}ib": 2 ** (10 * power) for power, prefix in enumerate("kmgt", 1)}
_UNITS |= {f"{prefix}b": 10 ** (3 * power) for power, prefix in enumerate("kmgt", 1)}
_SIZE = re.compile(r"\s*([0-9]+(\.[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)

# torch.tensor(...) allocates out of sight and shows what it made to a dispatch mode as the argument of this op.
_FRESH = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift.default)


def format_bytes(n: int) -> str:
    """`n` bytes in three digits and a binary unit: "512 B", "12.3 MiB", "1.50 GiB" (GiB = 2**30)."""
    size, unit = float(n), 0
    # 1023.5 and not 1024: what would round to "1024 MiB" is "1.00 GiB".
    while abs(size) >= 1023.5 and unit < len(_SUFFIXES) - 1:
        size, unit = size / 1024, unit + 1
    decimals = 0 if unit == 0 or abs(size) >= 99.95 else 1 if abs(size) >= 9.995 else 2
    return f"{size:.{decimals}f} {_SUFFIXES[unit]}"


def parse_bytes(text: str | int) -> int:
    """The number of bytes that a size means, rounded down: `20GiB`, `20 GiB`, `1.5MiB`, `512MB` (10**6), `1024`.

    Raises:
        ValueError: Not a size; a share such as 0.8 is not one either.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    unit = _UNITS.get(match[3].lower()) if match else None
    if match is None or unit is None or (unit == 1 and match[2]):
        raise ValueError(
            f"{text!r} is not a size. Write '20GiB', '1.5 MiB' (of 1024), '512MB' (of 1000) or 1024 (bytes)."
        )
    return int(Decimal(match[1]) * unit)


def _is_counted(device: torch.device | str) -> bool:
    kind, accelerator = torch.device(device).type, torch.accelerator.current_accelerator()
    is_accelerator = accelerator is not None and accelerator.type == kind
    # Apple's is one whose allocator does not count.
    return is_accelerator and hasattr(torch.get_device_module(kind), "max_memory_allocated")


# The peaks of devices from before `AllocatorBytes` let their allocators count anew.
_BEFORE: dict[torch.device, int] = {}


def peak_bytes(device: torch.device | str) -> int | None:
    """Most bytes in tensors on the device at once, since `reset_peak`; None where no allocator counts them (cpu)."""
    if not _is_counted(device):
        return None
    return max(torch.accelerator.max_memory_allocated(device), _BEFORE.get(torch.device(device), 0))


def current_bytes(device: torch.device | str) -> int | None:
    """Bytes in tensors on the device now; None where no allocator counts them (cpu)."""
    return torch.accelerator.memory_allocated(device) if _is_counted(device) else None


def reset_peak(device: torch.device | str) -> None:
    """Let `peak_bytes` start again from what is in use now; nothing happens where no allocator counts."""
    if _is_counted(device):
        _BEFORE.pop(torch.device(device), None)
        torch.accelerator.reset_peak_memory_stats(device)


def device_bytes(device: torch.device | str) -> tuple[int, int] | None:
    """(free, all) bytes of a device as its driver tells, other processes included; None where none does (cpu)."""
    if not _is_counted(device):
        return None
    module = torch.get_device_module(torch.device(device).type)
    ask = getattr(module, "mem_get_info", None) or getattr(torch.accelerator, "get_memory_info", None)
    return ask(device) if ask is not None else None


def reserved_bytes(device: torch.device | str) -> int:
    """Bytes that the allocator of a device has taken from it, in use or not; 0 where none counts them (cpu)."""
    return torch.accelerator.memory_reserved(device) if _is_counted(device) else 0


def num_allocation_retries(device: torch.device | str) -> int:
    """How often the allocator of a device had to give memory back before it could go on; 0 where none counts (cpu)."""
    if not _is_counted(device) or not hasattr(torch.accelerator, "memory_stats"):
        return 0
    return int(torch.accelerator.memory_stats(device).get("num_alloc_retries", 0))


class AllocatorBytes:
    """What a device's allocator counts, read as `LiveBytes` is: bytes in tensors now, and their peak since a reset."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def current(self) -> int:
        """Bytes in tensors now."""
        return torch.accelerator.memory_allocated(self._device)

    @property
    def peak(self) -> int:
        """Most bytes at once since `reset_peak`."""
        return torch.accelerator.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        """Let `peak` start again from what is in use now; `peak_bytes` goes on from what it was."""
        _BEFORE[self._device] = max(_BEFORE.get(self._device, 0), self.peak)
        torch.accelerator.reset_peak_memory_stats(self._device)

    def __enter__(self) -> AllocatorBytes:
        self.reset_peak()
        return self

    def __exit__(self, *error: object) -> None:
        pass


def meter_of(device: torch.device, *baseline: nn.Module | Tensor) -> LiveBytes | AllocatorBytes:
    """What counts the bytes of a device: its allocator, or `LiveBytes` where none does. `baseline`: there already."""
    return AllocatorBytes(device) if _is_counted(device) else LiveBytes(*baseline)


def host_bytes() -> int | None:
    """Resident bytes of this process now; None where neither the system nor psutil tells."""
    return _read_proc_status("VmRSS") or _ask_psutil("rss")


def host_peak_bytes() -> int | None:
    """Most resident bytes this process had so far; None where neither the system nor psutil tells."""
    # Before getrusage, because on Linux ru_maxrss of a process that was forked starts at what its parent had.
    peak = _read_proc_status("VmHWM")
    if peak or resource is None:
        return peak or _ask_psutil("peak_wset")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _read_proc_status(field: str) -> int | None:
    status = Path("/proc/self/status")
    match = re.search(rf"^{field}:\s*(\d+) kB$", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(match[1]) * 1024 if match else None


def _ask_psutil(field: str) -> int | None:
    return getattr(psutil.Process().memory_info(), field, None) if psutil else None


def _tensors(owners: Iterable[nn.Module | Tensor]) -> Iterator[Tensor]:
    for owner in owners:
        yield from (owner,) if isinstance(owner, Tensor) else (*owner.parameters(), *owner.buffers())


def own_bytes(*owners: nn.Module | Tensor) -> int:
    """Bytes of the distinct storages of parameters, buffers and gradients."""
    tensors = list(_tensors(owners))
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return sum({s._cdata: s.nbytes() for tensor in tensors for s in storages_of(tensor)}.values())


def bytes_of(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Bytes of the distinct storages of those tensors that are on a kind of device."""
    own = (tensor for tensor in tensors if tensor.device.type == device.type)
    return sum({storage._cdata: storage.nbytes() for tensor in own for storage in storages_of(tensor)}.values())


def storages_of(tensor: Tensor) -> list[torch.UntypedStorage]:
    """What a tensor is stored in: one storage, those of its parts, or none that can be told."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        parts = [getattr(tensor, name) for name in names]  # a mesh may be among them
        return [storage for part in parts if isinstance(part, Tensor) for storage in storages_of(part)]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices().untyped_storage(), tensor._values().untyped_storage()]
    return [tensor.untyped_storage()] if tensor.layout is torch.strided else []


class _Saved:
    """What autograd holds in place of one saved tensor: it lives and dies with the graph."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Detached, because an op's saved result would else hold the op that holds it, and never be freed.
        self.tensor = tensor.detach()
        self.version = tensor._version


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd holds for backward, of what is computed within the context.

    It counts what is held when it is read, within the context or after it: all at the end of forward, nothing once
    backward has run or the graph is dropped. A storage counts once and whole, however many tensors and views of it are
    saved. Losses and gradients are as without it, and no tensor lives longer. What other saved-tensor hooks within the
    context take is not seen: a block under torch's non-reentrant checkpoint counts with its inputs, and what selective
    checkpointing or offload store, not at all.

    Args:
        exclude: Modules (their parameters and buffers) and tensors that are there anyway and do not count.

    Raises:
        RuntimeError: In backward, where a saved tensor was changed in place, as autograd itself does without hooks.
    """

    def __init__(self, *exclude: nn.Module | Tensor) -> None:
        super().__init__(self._pack, self._unpack)
        self._exclude = exclude
        self._saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def __enter__(self) -> SavedBytes:  # type: ignore[override]  # torch's gives None
        super().__enter__()
        return self

    @property
    def bytes(self) -> int:
        """Bytes held now, of distinct storages."""
        return sum({storage._cdata: storage.nbytes() for storages in self._held() for storage in storages}.values())

    @property
    def num_tensors(self) -> int:
        """Number of saved tensors held now; the same tensor saved by two ops is two."""
        return sum(bool(storages) for storages in self._held())

    def _held(self) -> Iterator[list[torch.UntypedStorage]]:
        # A storage is known by its address, which is safe only because each of them is alive while this runs.
        excluded = {storage._cdata for tensor in _tensors(self._exclude) for storage in storages_of(tensor)}
        for saved in self._saved:
            yield [storage for storage in storages_of(saved.tensor) if storage._cdata not in excluded]

    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        self._saved.add(saved)
        return saved

    def _unpack(self, saved: _Saved) -> Tensor:
        # Autograd checks this only where there are no hooks; a counter must not hide an error.
        if saved.tensor._version != saved.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{list(saved.tensor.shape)} is at version {saved.tensor._version}; expected version {saved.version}"
            )
        return saved.tensor


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes alive in storages made within the context, on any device and on none (fake tensors).

    Gives on a CPU what an accelerator's allocator gives there, exactly and repeatably: activations, gradients,
    optimizer states, recomputed tensors, temporaries between ops. Not seen are the workspace inside one op and what is
    made without one (`torch.from_numpy`, the random state that torch's checkpoint keeps, 5 KB a block). What is resized
    without one counts anew from the next op that takes it. `flex_attention` does not run within, as under any mode.

    Args:
        baseline: Modules (their parameters, buffers and gradients) and tensors that count from the start.

    Attributes:
        current: Bytes alive now; goes on falling after the context, as tensors die.
        peak: Most bytes alive at once so far.
    """

    def __init__(self, *baseline: nn.Module | Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = 0
        # Keys are addresses, which are used again: an entry goes the moment its storage dies. torch keeps the Python
        # object of a storage until then, so that a weak reference to it is one to the memory.
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._sizes: dict[int, int] = {}
        tensors = list(_tensors(baseline))
        self._follow((tensors, [tensor.grad for tensor in tensors if tensor.is_leaf]), is_new=True)

    def reset_peak(self) -> None:
        """Let `peak` start again from what is alive now."""
        self.peak = self.current

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Parts that are compiled run compiled: torch would else run them op by op, which gives other bits."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)  # what a fake tensor is asked for: its device, its layout
        # A storage that arguments bring and nobody knows was there before the context; a view of it makes nothing.
        self._follow((args, kwargs), is_new=func in _FRESH)
        out = func(*args, **kwargs)
        self._follow(out, is_new=True)
        return out

    def _follow(self, tree: Any, is_new: bool) -> None:
        for storage in (s for leaf in tree_iter(tree) if isinstance(leaf, Tensor) for s in storages_of(leaf)):
            key = storage._cdata
            if key not in self._references:
                self._references[key] = weakref.ref(storage, partial(self._forget, key))
                if is_new:
                    self._sizes[key] = 0
            if key in self._sizes:
                size = storage.nbytes()
                self.current += size - self._sizes[key]
                self._sizes[key] = size
        self.peak = max(self.peak, self.current)

    def _forget(self, key: int, reference: weakref.ref[torch.UntypedStorage]) -> None:
        del self._references[key]
        self.current -= self._sizes.pop(key, 0)
