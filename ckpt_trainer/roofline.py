"""How long ops take on a device that is known by numbers only: each as long as its arithmetic or its memory traffic.

`WorkCounter` counts FLOPs and bytes of the ops that run, on any device or none; `Device.seconds` turns them into time.
What is not in the numbers is not in the time: starting a kernel, caches, by how much a kernel falls short of the figures.
It is meant for comparing ways to run the same step, not for promising its length.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ckpt_trainer.flops import flops_of
from ckpt_trainer.memory import device_bytes, storages_of

_NARROW = (torch.bfloat16, torch.float16)
# Aliases that autograd takes for results.
_ALIASES = frozenset(
    {"_unsafe_view", "unsafe_split", "unsafe_split_with_sizes", "detach", "_reshape_alias", "lift_fresh"}
)

# (whether on 16-bit numbers, FLOPs, bytes) of one op -> how many such ops ran.
Work = Counter[tuple[bool, int, int]]


@dataclass(frozen=True)
class Device:
    """What is public of a device: dense figures, without sparsity.

    Args:
        name: How it is called.
        narrow_flops: FLOPs per second of matmuls on 16-bit numbers (bf16 or fp16, added up in fp32).
        full_flops: The same on fp32 numbers.
        bytes_per_second: Of its memory.
        link_bytes_per_second: Of the link to the host, in each direction.
        memory_bytes: All of its memory, as its driver tells.
        op_seconds: Time of the host for each op; only where it is the device itself does it add to that of the op.
        is_host: Whether ops run on the host.
    """

    name: str
    narrow_flops: float
    full_flops: float
    bytes_per_second: float
    link_bytes_per_second: float
    memory_bytes: int
    op_seconds: float = 0.0
    is_host: bool = False

    def seconds_with_host(self, work: Work, more: float = 0.0) -> float:
        """The time of ops that run one after another, with that of the host, which starts them.

        Args:
            more: Seconds of the host beside that.
        """
        host, device = sum(work.values()) * self.op_seconds + more, self.seconds(work)
        return device + host if self.is_host else max(device, host)

    def seconds(self, work: Work) -> float:
        """The time of ops that run one after another."""
        return sum(times * self._seconds(*op) for op, times in work.items())

    def _seconds(self, is_narrow: bool, flops: int, moved: int) -> float:
        return max(flops / (self.narrow_flops if is_narrow else self.full_flops), moved / self.bytes_per_second)


def _device(name: str, narrow: float, full: float, memory: float, link: float, mebibytes: int) -> Device:
    """From TFLOPS, TFLOPS, GB/s, GB/s and MiB."""
    return Device(name, narrow * 1e12, full * 1e12, memory * 1e9, link * 1e9, mebibytes * 2**20)


_TABLE = (
    _device("H100", 989, 67, 3350, 64, 81559),
    _device("H200", 989, 67, 4800, 64, 143771),
    _device("A100-40", 312, 19.5, 1555, 32, 40960),
    _device("A100-80", 312, 19.5, 2039, 32, 81920),
    _device("L40S", 362, 91.6, 864, 32, 46068),
    _device("L4", 121, 30.3, 300, 32, 23034),
    _device("4090", 165, 82.6, 1008, 32, 24564),
    _device("3090", 71, 35.6, 936, 32, 24576),
    _device("T4", 65, 8.1, 320, 16, 15360),
)
DEVICES = {device.name: device for device in _TABLE}


# Any host, and any accelerator that the table does not have: what counts is how arithmetic compares with memory traffic.
HOST = Device("host", 2e11, 9e10, 1.5e10, 0.0, 0, op_seconds=8e-6, is_host=True)
OTHER = Device("other", 3e14, 2e13, 2e12, 2.5e10, 0, op_seconds=8e-6)


def device_of(device: torch.device) -> Device:
    """What is known of the device of a tensor: from the table, by the name that its driver gives, else in general."""
    if device.type == "cpu":
        return HOST
    module = torch.get_device_module(device.type)
    name = str(module.get_device_name(device)) if hasattr(module, "get_device_name") else ""
    words = re.split(r"[\s\-]+", name)
    # Of a card that comes with two sizes of memory, the one that has as much.
    found = [known for known in _TABLE if known.name.partition("-")[0] in words]
    found.sort(key=lambda known: abs(known.memory_bytes - _memory_of(device)))
    return replace(found[0], op_seconds=OTHER.op_seconds) if found else OTHER


def _memory_of(device: torch.device) -> int:
    seen = device_bytes(device)
    return seen[1] if seen is not None else 0


def device_named(name: str) -> Device:
    """A device of the table, in any spelling of upper and lower case.

    Raises:
        ValueError: There is none of this name; lists those that there are.
    """
    found = {known.lower(): device for known, device in DEVICES.items()}
    device = found.get(name.lower())
    if device is None:
        longer = [known for known in found if name and known.startswith(name.lower())]
        near = longer or difflib.get_close_matches(name.lower(), found, n=1, cutoff=0.75)
        hint = f" Did you mean {found[near[0]].name!r}?" if near else ""
        raise ValueError(
            f"device {name!r} is not one of {', '.join(DEVICES)}.{hint} Of another one, give the numbers in Python: "
            "estimate(..., device=roofline.Device(...))."
        )
    return device


class WorkCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts FLOPs and bytes of each op within the context, those of backward included.

    Attributes:
        work: So far. Put another in its place to count from there.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: Work = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Parts that are compiled run compiled: torch would else run them op by op, which gives other bits."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace != "prim" and not func.is_view and func._overloadpacket.__name__ not in _ALIASES:
            tensors = list(_tensors((args, kwargs, out)))
            is_narrow = any(tensor.dtype in _NARROW for tensor in tensors)
            self.work[is_narrow, flops_of(func, args, kwargs, out), sum(map(_bytes, tensors))] += 1
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    # By hand: what torch has for trees takes longer than all the rest of the counting.
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _bytes(tensor: Tensor) -> int:
    # Of one that is expanded, what it is expanded from.
    size = tensor.numel() * tensor.element_size()
    stored = storages_of(tensor)
    return min(size, sum(storage.nbytes() for storage in stored)) if stored else size
