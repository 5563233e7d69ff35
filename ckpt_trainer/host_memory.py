"""Memory of the host that tensors of a device are moved to: a pool under a cap, and how much there is to take.

What is moved there, and when, is decided by `offload`.

NOTE on slabs. Allocating host memory that a device can reach takes milliseconds, stops the device, and is rounded up to a
power of two. So memory is allocated in a few large slabs whose lengths are powers of two, kept until the pool is gone, and
handed out in units of 4096 bytes. The slabs lie end to end on one line of `Extents`: what is taken may reach over the
border of two slabs, or be made of several free parts, and is then more than one piece. So nothing is lost between slabs,
and none is allocated while the free bytes suffice.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from threading import Lock

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ckpt_trainer.extents import UNIT, Extents, Part, Taken, drain, rounded_up

try:
    import psutil
except ImportError:
    psutil = None

_SMALLEST_SLAB = 64 * 2**20
_LARGEST_SLAB = 512 * 2**20

# What launchers call the number of processes that they started on this machine.
_LOCAL_RANKS = (
    "LOCAL_WORLD_SIZE",  # torchrun, accelerate
    "LOCAL_SIZE",  # DeepSpeed
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "SLURM_STEP_TASKS_PER_NODE",  # srun, for all nodes: "4(x2),3"
)


class Pieces(Taken):
    """A range of host memory that one owner has: mostly one piece of a slab.

    Attributes:
        tensors: Its pieces in order (1-d, uint8); none once they are given back.
        nbytes: Sum of their lengths.
    """

    __slots__ = ("nbytes", "tensors")

    def __init__(self, tensors: Sequence[Tensor], parts: Sequence[Part], returned: deque[Part]) -> None:
        super().__init__(parts, returned)
        self.tensors = tuple(tensors)
        self.nbytes = sum(tensor.numel() for tensor in tensors)

    def give_back(self) -> None:
        """Let the pool hand it out again. Any thread may, at any time; again is nothing."""
        self.tensors = ()
        super().give_back()


class HostPool:
    """Host memory that is allocated as it is needed, up to a cap, and used again and again.

    Args:
        cap: Most bytes to allocate, ever.
        allocate: Gives so many bytes (1-d, uint8), or raises RuntimeError.

    Attributes:
        cap: As given.
        held: Bytes allocated, never above the cap.
        slabs: Number of allocations so far.
        peak: Most bytes in use at once so far.
        refused: Why the system gave no more memory; from then on nobody asks it again. None if it never refused.
    """

    def __init__(self, cap: int, allocate: Callable[[int], Tensor]) -> None:
        self.cap = cap
        self.held = 0
        self.peak = 0
        self.refused: str | None = None
        self._allocate = allocate
        self._lock = Lock()
        self._extents = Extents()
        self._returned: deque[Part] = deque()
        self._slabs: list[Tensor] = []
        self._starts: list[int] = []  # of the slabs on the line

    @property
    def slabs(self) -> int:
        return len(self._slabs)

    @property
    def in_use(self) -> int:
        """Bytes handed out and not given back, in units of 4096."""
        with self._lock:
            drain(self._returned, self._extents)
            return self.held - self._extents.free

    def take(self, nbytes: int) -> Pieces | None:
        """So many bytes, of any content; None where the cap or the system does not allow it."""
        with self._lock:
            drain(self._returned, self._extents)
            parts = self._extents.take_parts(nbytes) if self._has(rounded_up(nbytes)) else None
            if parts is None:
                return None
            self.peak = max(self.peak, self.held - self._extents.free)
            return Pieces(list(self._views(parts, nbytes)), parts, self._returned)

    def _has(self, length: int) -> bool:
        """Whether so many bytes are free, if need be after allocating more."""
        if length > self._extents.free + (self.cap - self.held) // UNIT * UNIT:
            return False
        while length > self._extents.free:
            if not self._add_slab(length - self._extents.free):
                return False
        return True

    def _add_slab(self, wanted: int) -> bool:
        # As much as there is already, so that a pool of any size has few slabs.
        length = min(max(_power_of_two_up(max(wanted, self.held)), _SMALLEST_SLAB), _LARGEST_SLAB)
        while length > self.cap - self.held:
            length //= 2
        while not self.refused:
            try:
                slab = self._allocate(length)
            except (RuntimeError, MemoryError) as error:
                # What is left of a limit of the system may be less than a whole slab.
                if length <= _SMALLEST_SLAB:
                    self.refused = str(error) or type(error).__name__
                length //= 2
                continue
            self._starts.append(self.held)
            self._slabs.append(slab)
            self.held += length
            self._extents.grow(length)
            return True
        return False

    def _views(self, parts: Sequence[Part], nbytes: int) -> Iterator[Tensor]:
        # A dispatch mode that watches or replaces what a block computes is not concerned.
        with _disable_current_modes():
            for offset, length in parts:
                length = min(length, nbytes)
                nbytes -= length
                while length:
                    at = bisect_right(self._starts, offset) - 1
                    slab, start = self._slabs[at], offset - self._starts[at]
                    view = slab[start : start + length]
                    yield view
                    offset += view.numel()
                    length -= view.numel()


def _power_of_two_up(n: int) -> int:
    return 1 << (n - 1).bit_length()


def host_cap(budget: float | int) -> int:
    """Bytes of host memory that this process may take: a share (float) of what is available to it, or bytes (int)."""
    return int(budget * available_bytes() / local_ranks()) if isinstance(budget, float) else budget


def local_ranks() -> int:
    """Number of training processes on this machine, as their launcher tells; 1 where none does."""
    for name in _LOCAL_RANKS:
        # Of several nodes the fullest: a share that is too small does no harm.
        counts = [int(count) for count in re.findall(r"(?:^|,)(\d+)", os.environ.get(name, ""))]
        if counts and max(counts) > 0:
            return max(counts)
    return 1


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes of RAM that this process may still take, page cache that can go included; 0 where nothing tells.

    Args:
        root: Where `proc` and the control groups are found.
    """
    return max(0, min([_machine_bytes(root), *_group_bytes(root)]))


def _machine_bytes(root: Path) -> int:
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE)
    if match:
        return int(match[1]) * 1024
    if psutil:
        return int(psutil.virtual_memory().available)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows, macOS
        return 0


def _group_bytes(root: Path) -> Iterator[int]:
    """What each control group that this process is in, directly or not, has left."""
    groups: dict[str, str] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            groups["cgroup" if controllers else "cgroup2"] = path
    for line in _read(root / "proc/self/mountinfo").splitlines():
        # Two lists of fields around a dash: the 4th is which part is mounted, the 5th where; after the dash comes the kind.
        left, _, right = line.partition(" - ")
        within, at = left.split()[3:5]
        kind = right.split()[0]
        if kind in groups:
            for folder in _folders(root, at, within, groups[kind]):
                yield from _left_v2(folder) if kind == "cgroup2" else _left_v1(folder)


def _folders(root: Path, at: str, within: str, path: str) -> Iterator[Path]:
    """Folders of a group and all above it, as far as they are mounted `at`."""
    group, top = PurePosixPath(path), PurePosixPath(within)
    # In a container the path may be that of the machine, and not be below what the container sees.
    seen = ".." not in group.parts and group.is_relative_to(top)
    relative = group.relative_to(top) if seen else PurePosixPath()
    for part in (relative, *relative.parents):
        yield root / _unescaped(at).lstrip("/") / part


def _left_v2(folder: Path) -> Iterator[int]:
    used, cache = _number(folder / "memory.current"), _statistic(folder, "inactive_file")
    # Above `high` nothing is refused, but the process hardly gets on: memory of a device's copies cannot be reclaimed.
    for name in ("memory.max", "memory.high"):
        limit = _number(folder / name)  # "max" is no number
        if limit is not None and used is not None:
            yield limit - used + cache


def _left_v1(folder: Path) -> Iterator[int]:
    limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
    if limit is not None and used is not None:
        # Groups above that a container does not see may limit it too, which the statistics tell.
        limit = min(limit, _statistic(folder, "hierarchical_memory_limit") or limit)
        yield limit - used + _statistic(folder, "total_inactive_file")


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _statistic(folder: Path, name: str) -> int:
    match = re.search(rf"^{name} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
    return int(match[1]) if match else 0


def _unescaped(text: str) -> str:
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), text)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
