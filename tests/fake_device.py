"""A device that is not there: `Streams` over CPU tensors whose copies are really delayed, and which sees races.

Computation runs at once, as CPU ops do. A copy on any other stream waits in a queue: until something that waits for it
makes it run (`lazy`), not at all (`eager`), or for a random number of later calls (`random`). A queued copy does not keep
device memory alive: what it reads from freed memory is 0xFF (NaN), as is all memory that is fresh.

NOTE on races. Each stream and the host have a vector clock: an event is a snapshot of one, to wait is to join. Whether two
accesses are ordered is thus known when they are asked for, whatever the timing. Accesses are
  - copies: they read their source and write their target on their stream;
  - computation: what is packed was written by the live stream (`made`), what is unpacked is read by it (`used`);
  - memory that is taken or dies: a write of the stream it belongs to, since the allocator gives it to that stream's next
    op. It belongs to the stream that was live when it was first seen.
Host memory that dies is no access, and a queued copy keeps it: torch keeps pinned memory until copies are over.
"""

from __future__ import annotations

import ctypes
import random
import threading
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

TIMINGS = ("lazy", "eager", "random")
HOST = -1
_LONGEST_DELAY = 8
_POISON = 0xFF


@dataclass(frozen=True)
class Stream:
    """Equal streams are the same, as in torch, but need not be the same object."""

    number: int


@dataclass(frozen=True)
class Event:
    """A stream up to here."""

    stream: int
    position: int
    clock: dict[int, int]


@dataclass(frozen=True)
class Access:
    """Bytes `start` to `end` of a memory, read or written by a stream when its own clock showed `time`."""

    stream: int
    time: int
    start: int
    end: int
    writes: bool
    text: str


@dataclass(eq=False)
class Memory:
    """One storage.

    Attributes:
        kind: `made` by computation, taken (`empty`), or of the `host`.
        owner: The stream whose memory it is.
        storage: A weak reference.
    """

    number: int
    kind: str
    nbytes: int
    owner: int
    storage: weakref.ref
    version: int = 0
    accesses: list[Access] = field(default_factory=list)

    def __str__(self):
        return f"{self.kind} memory {self.number} ({self.nbytes} bytes)"


@dataclass(frozen=True)
class Copy:
    """A copy that was asked for; offsets are those of bytes within a storage."""

    target: Memory
    target_start: int
    source: Memory
    source_start: int
    nbytes: int
    stream: int

    @property
    def way(self):
        return {True: "in", False: "out"}[self.source.kind == "host"]


class FakeStreams:
    """`Streams` of one device that is the CPU.

    Args:
        timing: One of `TIMINGS`.
        seed: Of random timing.
        host_limit: Bytes of host memory that the system gives; None: any.

    Attributes:
        races: One text for each pair of accesses that nothing orders.
        copies: All that were asked for.
        host_buffers: Number of calls of `host` that were granted.
        peak: Most bytes of `empty` that were alive at once.
        stalls: Counted waits for which a copy had still to run.
        pinned: Whether host memory was asked to be pinned.
        packs: How often a memory was packed (`made`).
        on_growth: Called whenever device memory was taken or seen for the first time.
    """

    def __init__(self, timing="lazy", seed=0, host_limit=None):
        assert timing in TIMINGS
        self.device = torch.device("cpu")
        self.timing = timing
        self.races = []
        self.copies = []
        self.host_buffers = 0
        self.peak = 0
        self.stalls = 0
        self.pinned = None
        self.packs = Counter()
        self.on_growth = lambda: None
        self._host_limit = host_limit
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._calls = 0
        self._clocks = {HOST: {}}
        self._queues = {}
        self._done = Counter()
        self._memories = {}
        self._number = 0
        self._computing = set()
        self._live = [self.new()]
        self._computing.add(self._live[0].number)

    def streams_of(self, device, pinned=True):
        """In place of `streams.streams_of`: this for the CPU, None for other devices."""
        if device.type != "cpu":
            return None
        self.pinned = pinned
        return self

    # What `Streams` has.

    def live(self):
        return Stream(self._live[-1].number)

    def new(self):
        with self._lock:
            number = len(self._queues)
            self._clocks[number] = {}
            self._queues[number] = []
            return Stream(number)

    def record(self, stream):
        with self._called(stream.number):
            number = stream.number
            return Event(number, self._done[number] + len(self._queues[number]), dict(self._clocks[number]))

    def wait(self, stream, event, counted=False):
        with self._called(stream.number):
            self.stalls += counted and self._done[event.stream] < event.position
            _join(self._clocks[stream.number], event.clock)
            self._enqueue(stream.number, event)

    def copy(self, target, source, stream):
        for end in (target, source):
            assert (end.dtype, end.dim(), end.is_contiguous()) == (torch.uint8, 1, True)
        assert target.numel() == source.numel()
        with self._called(stream.number):
            ends = (self._memory_of(target), target.storage_offset(), self._memory_of(source), source.storage_offset())
            copy = Copy(*ends, target.numel(), stream.number)
            assert (copy.target.kind == "host") != (copy.source.kind == "host")
            self.copies.append(copy)
            torch.autograd.graph.increment_version(target)
            text = f"copy {copy.way} of {copy.source} to {copy.target}"
            self._access(copy.source, stream.number, copy.source_start, copy.nbytes, False, text)
            self._access(copy.target, stream.number, copy.target_start, copy.nbytes, True, text)
            on_host = target if copy.target.kind == "host" else source
            self._enqueue(stream.number, copy, on_host.untyped_storage())

    def empty(self, nbytes):
        with self._called():
            memory = _fresh(nbytes)
            self._register(memory, "empty")
            self.peak = max(self.peak, self.device_bytes)
            return memory

    def host(self, nbytes):
        with self._called():
            if self._host_limit is not None and self.host_bytes + nbytes > self._host_limit:
                raise RuntimeError(f"no more than {self._host_limit} bytes of pinned memory")
            memory = _fresh(nbytes)
            self._register(memory, "host")
            self.host_buffers += 1
            return memory

    def synchronize(self, event):
        with self._called():
            self._force(event)
            _join(self._clocks[HOST], event.clock)

    @property
    def waited_seconds(self):
        return float(self.stalls)

    # What computation does, and what the tests ask.

    @contextmanager
    def on_stream(self, stream):
        """Computation is enqueued on this stream."""
        with self._lock:
            self._computing.add(stream.number)
            self._drain(stream.number)
            self._live.append(stream)
        try:
            yield stream
        finally:
            self._live.pop()

    def made(self, tensor):
        """The live stream has computed this tensor, the first time it is packed, or reads it; returns its memory."""
        with self._lock:
            known = tensor.untyped_storage()._cdata in self._memories
            memory = self._memory_of(tensor)
            self.packs[memory] += 1
            changed, memory.version = memory.version != tensor._version, tensor._version
            if memory.kind != "made" or (known and not changed):
                self.used(tensor)
            elif known:  # A change in place; whether that is allowed is for versions to tell.
                self._access(memory, self.live().number, 0, memory.nbytes, True, "a change in place", checked=False)
            return memory

    def used(self, tensor):
        """The live stream reads this tensor."""
        with self._lock:
            memory = self._memory_of(tensor)
            self._access(memory, self.live().number, *_extent(tensor), False, f"use of {memory} by computation")

    def unpacking(self, unpack):
        """A hook `unpack` of which what it returns counts as used."""

        def unpacked(packed):
            tensor = unpack(packed)
            self.used(tensor)
            return tensor

        return unpacked

    def finish(self):
        """Let all copies run."""
        with self._lock:
            for number in self._queues:
                self._drain(number)

    @property
    def pending(self):
        """Copies that have not run yet."""
        return sum(isinstance(item, Copy) for queue in self._queues.values() for _, item, _ in queue)

    def alive(self, *kinds):
        """Memory of these kinds that is alive."""
        return [memory for memory in list(self._memories.values()) if memory.kind in kinds]

    @property
    def device_bytes(self):
        """Bytes of `empty` that are alive."""
        return sum(memory.nbytes for memory in self.alive("empty"))

    @property
    def host_bytes(self):
        """Bytes of `host` that are alive."""
        return sum(memory.nbytes for memory in self.alive("host"))

    def num_copies(self, way):
        """How many copies went `out` or `in`."""
        return sum(copy.way == way for copy in self.copies)

    # Memory.

    def _memory_of(self, tensor):
        memory = self._memories.get(tensor.untyped_storage()._cdata)
        return self._register(tensor, "made") if memory is None else memory

    def _register(self, tensor, kind):
        # torch keeps the Python object of a storage alive for as long as its memory.
        storage = tensor.untyped_storage()
        self._number += 1
        owner = self.live().number
        memory = Memory(self._number, kind, storage.nbytes(), owner, weakref.ref(storage), tensor._version)
        self._memories[storage._cdata] = memory
        weakref.finalize(storage, self._died, storage._cdata, memory).atexit = False
        if kind != "host":
            self._access(memory, owner, 0, memory.nbytes, True, f"{memory} is {kind}")
            self.on_growth()
        return memory

    def _died(self, address, memory):
        with self._lock:
            if self._memories.get(address) is memory:
                del self._memories[address]
            if memory.kind != "host":
                self._access(memory, memory.owner, 0, memory.nbytes, True, f"{memory} dies")

    def _access(self, memory, stream, start, nbytes, writes, text, checked=True):
        self._join_host(stream)
        clock = self._clocks[stream]
        clock[stream] = clock.get(stream, 0) + 1
        new = Access(stream, clock[stream], start, start + nbytes, writes, f"{text}, on stream {stream}")
        kept = []
        for old in memory.accesses:
            ordered = clock.get(old.stream, 0) >= old.time
            overlaps = old.start < new.end and new.start < old.end
            if checked and overlaps and not ordered and (old.writes or writes):
                self.races.append(f"{new.text}, does not wait for: {old.text}")
            # Whatever is ordered after a write is ordered after all that came before the write.
            covered = new.start <= old.start and old.end <= new.end and ordered
            if not (covered and (writes or (old.stream == stream and not old.writes))):
                kept.append(old)
        memory.accesses = [*kept, new]

    # Time.

    @contextmanager
    def _called(self, stream=None):
        with self._lock:
            self._calls += 1
            if stream is not None:
                self._join_host(stream)
            yield
            if self.timing == "random":
                self._run_due()

    def _join_host(self, stream):
        _join(self._clocks[stream], self._clocks[HOST])

    def _enqueue(self, number, item, kept=None):
        due = self._calls + self._random.randint(0, _LONGEST_DELAY)
        self._queues[number].append((due, item, kept))
        if self.timing == "eager" or number in self._computing:
            self._drain(number)

    def _drain(self, number):
        self._run_until(number, self._done[number] + len(self._queues[number]))

    def _force(self, event):
        self._run_until(event.stream, event.position)

    def _run_until(self, number, position):
        while self._done[number] < position:
            self._step(number)

    def _step(self, number):
        _, item, _ = self._queues[number][0]
        if isinstance(item, Event):
            self._force(item)
        else:
            self._run(item)
        self._queues[number].pop(0)
        self._done[number] += 1

    def _run_due(self):
        progress = True
        while progress:
            progress = False
            for number, queue in self._queues.items():
                while queue and queue[0][0] <= self._calls and self._is_free(queue[0][1]):
                    self._step(number)
                    progress = True

    def _is_free(self, item):
        return not isinstance(item, Event) or self._done[item.stream] >= item.position

    def _run(self, copy):
        source, target = copy.source.storage(), copy.target.storage()
        for memory, storage in ((copy.source, source), (copy.target, target)):
            if storage is None:
                self.races.append(f"{memory} died before copy {copy.way} of {copy.source} to {copy.target} ran")
        if target is None:
            return
        to = target.data_ptr() + copy.target_start
        if source is None:
            ctypes.memset(to, _POISON, copy.nbytes)
        else:
            # Not `copy_`: the modes and versions of the caller are none of the device's business.
            ctypes.memmove(to, source.data_ptr() + copy.source_start, copy.nbytes)


def _join(clock, other):
    for stream, time in other.items():
        clock[stream] = max(clock.get(stream, 0), time)


def _fresh(nbytes):
    with torch.inference_mode(False), torch._C._DisableTorchDispatch():
        return torch.full((nbytes,), _POISON, dtype=torch.uint8)


def _extent(tensor):
    """First byte and number of bytes from there to the last."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.storage_offset() * tensor.element_size(), (last + 1) * tensor.element_size()
