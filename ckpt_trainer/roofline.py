"""How long ops take on a device that is known by numbers only: each as long as its arithmetic or its memory traffic.

`WorkCounter` counts FLOPs and bytes of the ops that run, on any device or none; `Device.seconds` turns them into time.
What is not in the numbers is not in the time: starting a kernel, caches, by how much a kernel falls short of the figures.
It is meant for comparing ways to run the same step, not for promising its length.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ckpt_trainer.flops import flops_of
from ckpt_trainer.memory import storages_of

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
    """

    name: str
    narrow_flops: float
    full_flops: float
    bytes_per_second: float
    link_bytes_per_second: float
    memory_bytes: int

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


def device_named(name: str) -> Device:
    """A device of the table, in any spelling of upper and lower case.

    Raises:
        ValueError: There is none of this name; lists those that there are.
    """
    found = {known.lower(): device for known, device in DEVICES.items()}
    device = found.get(name.lower())
    if device is None:
        near = difflib.get_close_matches(name.lower(), found, n=1)
        hint = f" Did you mean {found[near[0]].name!r}?" if near else ""
        raise ValueError(
            f"device {name!r} is not one of {', '.join(DEVICES)}.{hint} Of another one, give the numbers: Device(...)."
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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace != "prim" and not func.is_view and func._overloadpacket.__name__ not in _ALIASES:
            tensors = list(_tensors((args, kwargs, out)))
            is_narrow = any(tensor.dtype in _NARROW for tensor in tensors)
            self.work[is_narrow, flops_of(func, args, kwargs, out), sum(map(_bytes, tensors))] += 1
        return out


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> int:
    # Of one that is expanded, what it is expanded from.
    size = tensor.numel() * tensor.element_size()
    stored = storages_of(tensor)
    return min(size, sum(storage.nbytes() for storage in stored)) if stored else size
