"""A range of bytes of one device storage that may leave for the host: where it is, and how it gets there and back.

When it goes and comes is decided by `offload`. A `Chunk` is copied to the host at most once; the copy stays there for as
long as anyone needs the chunk, so that it can be brought back any number of times.

NOTE on order. Nothing here makes the host wait. Streams wait for each other:
  1. A copy comes after what computation had to do with its source or target so far: the outward stream waits for the
     stream that was live when the chunk was made, the inward stream for the one live when memory was taken for it.
  2. The memory of the source is given up only once the stream that it belongs to waits for the outward copy, and for
     other streams that got the same tensor. Host memory is used anew only by outward streams that wait for the copies
     from and to it.
  3. What is brought back is used, or dropped unused, only once the live stream waits for the inward copy, which itself
     comes after the outward copy.
No memory is lent to other streams (`record_stream`), so the peak is the same in every step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ckpt_trainer.host_memory import Pieces
from ckpt_trainer.host_store import HostStore, Slot
from ckpt_trainer.streams import Streams

_KEY = "_ckpt_trainer_chunks"


@dataclass
class OffloadCounts:
    """What was moved and what stayed, since it was made.

    Args:
        bytes_out: Bytes copied to the host; `copies_out` of that many chunks.
        bytes_in: Bytes copied back; `copies_in` likewise.
        hits: Chunks that were back, or on their way, when backward asked for the first of their block.
        misses: Chunks whose way back began only then.
        failures: Prefetches that failed, for want of device memory mostly.
        kept: Why a tensor stayed on the device -> number of tensors and their bytes.
    """

    bytes_out: int = 0
    copies_out: int = 0
    bytes_in: int = 0
    copies_in: int = 0
    hits: int = 0
    misses: int = 0
    failures: int = 0
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)

    def keep(self, why: str, nbytes: int) -> None:
        """Count a tensor that stays."""
        number, total = self.kept.get(why, (0, 0))
        self.kept[why] = number + 1, total + nbytes


class Channel:
    """The way between one device and the host.

    Args:
        streams: Those of the device.
        store: Where bytes go.
        counts: Where copies are counted.
        neighbours: All channels that share the store, this one included once it is added.
    """

    def __init__(self, streams: Streams, store: HostStore, counts: OffloadCounts, neighbours: list[Channel]) -> None:
        self.streams = streams
        self.store = store
        self.counts = counts
        self.outward = streams.new()
        self.inward = streams.new()
        self._neighbours = neighbours

    def wait_before_reuse(self, event: Any) -> None:
        """Let copies to host memory that is handed out from now on come after the event."""
        for channel in self._neighbours:
            channel.streams.wait(channel.outward, event)


class Leaving:
    """The end of outward copies that began together.

    Args:
        channel: Of the chunks.
        event: On the outward stream.
    """

    __slots__ = ("_channel", "_waiting", "event")

    def __init__(self, channel: Channel, event: Any) -> None:
        self.event = event
        self._channel = channel
        self._waiting: list[Any] = []

    def wait(self, stream: Any) -> None:
        """Before the memory of a source is given up: the stream that it belongs to waits for the copies."""
        if stream not in self._waiting:
            self._channel.streams.wait(stream, self.event, counted=True)
            # Not before: another thread would give the memory up without a wait.
            self._waiting.append(stream)


class Back:
    """Device memory that a chunk is brought back to.

    Args:
        channel: The chunk's.
        memory: The memory, which this does not keep alive.
        stream: That the memory belongs to.
        event: The end of the inward copy.

    Attributes:
        mark: Counts versions with all tensors that lie in the memory.
    """

    __slots__ = ("_channel", "_event", "_storage", "_version", "mark", "stream")

    def __init__(self, channel: Channel, memory: Tensor, stream: Any, event: Any) -> None:
        self._channel = channel
        self._storage = weakref.ref(memory.untyped_storage())
        self._event = event
        self.mark = mark_of(memory)
        self._version = memory._version  # The copy raised it.
        self.stream = stream

    def memory(self, stream: Any) -> Tensor | None:
        """The memory, if it is alive, as it came, and this stream's."""
        storage = self._storage()
        if storage is None or not self.is_fit(stream):
            return None
        return seen(self.mark, storage, torch.uint8, (storage.nbytes(),), (1,), 0)

    def is_fit(self, stream: Any) -> bool:
        """Whether the memory is as it came, and this stream's."""
        return self.mark._version == self._version and bool(stream == self.stream)

    def wait(self, counted: bool = False) -> None:
        """Before the memory is used or dropped: the stream that it belongs to waits for the inward copy."""
        event = self._event
        if event is not None:
            self._channel.streams.wait(self.stream, event, counted=counted)
            self._channel.wait_before_reuse(event)
            # Not before: another thread would use the memory without a wait.
            self._event = None


class Chunk:
    """One range of bytes.

    Args:
        channel: Its way to the host.
        tensor: One that lies within.
        start: First byte within its storage.
        nbytes: Number of bytes.
        counter: Counts versions for the tensor, if it does not do so itself.

    Attributes:
        source: The bytes on the device, for as long as they have not left.
        last: Number of the group that was last to pack it.
        to_disk: It may go on from the host to disk.
    """

    __slots__ = (
        "__weakref__", "_counted", "_mark", "_origin", "_readers", "_version", "back", "channel", "last", "leaving",
        "nbytes", "slot", "source", "start", "stream", "to_disk",
    )  # fmt: skip

    def __init__(
        self, channel: Channel, tensor: Tensor, start: int, nbytes: int, counter: Tensor | None = None
    ) -> None:
        self.slot: Slot | None = None
        self.channel = channel
        self.stream = channel.streams.live()
        self.source: Tensor | None = _bytes_of(tensor, start, nbytes)
        self.start = start
        self.nbytes = nbytes
        self.leaving: Leaving | None = None
        self.back: Back | None = None
        self.last = 0
        self.to_disk = False
        self._origin: Callable[[], torch.UntypedStorage | None] = lambda: None
        self._readers: Sequence[Any] = ()  # other streams that compute with the bytes on the device
        self._mark = mark_of(tensor if counter is None else counter)
        self._counted = self._mark._version
        self._version = tensor._version

    def holds(self, tensor: Tensor, start: int, end: int) -> bool:
        """Whether these bytes of the storage lie within, as they were."""
        within = self.start <= start and end <= self.start + self.nbytes
        return within and tensor._version == self._version and self._mark._version == self._counted

    def retake(self, tensor: Tensor) -> None:
        """Hold the bytes on the device again, which a tensor that is there still has."""
        live = self.channel.streams.live()
        if self.source is None:
            self.source = _bytes_of(tensor, self.start, self.nbytes)
            self.stream = live
        elif live != self.stream:
            self._readers = [*(other for other in self._readers if other != live), live]

    def is_here(self) -> bool:
        """Whether the bytes are on the device: they did not leave, or someone else has kept them there."""
        storage = self._origin() if self.source is None else None
        # Its owner may have freed the memory by hand, and kept the storage.
        if (
            storage is not None
            and storage.nbytes() >= self.start + self.nbytes
            and self._mark._version == self._counted
        ):
            self.source = _bytes_in(storage, self.start, self.nbytes)
        return self.source is not None

    def settle(self) -> None:
        """Give up the bytes on the device, if they are on the host or on their way."""
        if self.source is not None and self.leaving is not None:
            self.leaving.wait(self.stream)
            for other in self._readers:
                self.channel.streams.wait(self.stream, self.channel.streams.record(other))
            self._readers = ()
            self._origin = weakref.ref(self.source.untyped_storage())
            self.source = None

    def bring_back(self) -> tuple[Tensor, Back]:
        """Device memory that the bytes are copied to, or are already."""
        channel, streams = self.channel, self.channel.streams
        live = streams.live()
        memory = self.back.memory(live) if self.back is not None else None
        if memory is not None and self.back is not None:
            return memory, self.back
        assert self.slot is not None
        pieces = channel.store.fetch(self.slot)
        memory = streams.empty(_rounded(self.nbytes))
        streams.wait(channel.inward, streams.record(live))
        if self.leaving is not None:
            streams.wait(channel.inward, self.leaving.event)
        for offset, piece in _places(pieces):
            streams.copy(memory[offset : offset + piece.numel()], piece, channel.inward)
        channel.counts.copies_in += 1
        channel.counts.bytes_in += self.nbytes
        event = streams.record(channel.inward)
        self.slot.read = partial(streams.synchronize, event)
        self.back = Back(channel, memory, live, event)
        return memory, self.back

    def __del__(self) -> None:
        if self.slot is not None:
            self.settle()
            if self.leaving is not None:
                self.channel.wait_before_reuse(self.leaving.event)


def send(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Copy chunks of one channel to the host, beside computation; returns those for which there was no room."""
    homeless: list[Chunk] = []
    leaving: list[Chunk] = []
    try:
        for chunk in chunks:
            chunk.slot = chunk.channel.store.put(chunk.nbytes, chunk.to_disk)
            if chunk.slot is None and leaving:
                # Those before it may have to go on to disk, for which they must be on their way.
                _depart(leaving)
                leaving = []
                chunk.slot = chunk.channel.store.put(chunk.nbytes, chunk.to_disk)
            (homeless if chunk.slot is None else leaving).append(chunk)
    finally:  # Those that have room leave, also where the disk failed for one after them.
        _depart(leaving)
    return homeless


def _depart(chunks: Sequence[Chunk]) -> None:
    """Begin the outward copies of chunks that have a slot."""
    if not chunks:
        return
    channel, streams = chunks[0].channel, chunks[0].channel.streams
    for stream in _distinct(chunk.stream for chunk in chunks):
        streams.wait(channel.outward, streams.record(stream))
    for chunk in chunks:
        assert chunk.source is not None
        assert chunk.slot is not None
        assert chunk.slot.pieces is not None
        for offset, piece in _places(chunk.slot.pieces):
            streams.copy(piece, chunk.source[offset : offset + piece.numel()], channel.outward)
        channel.counts.copies_out += 1
        channel.counts.bytes_out += chunk.nbytes
    event = streams.record(channel.outward)
    together = Leaving(channel, event)
    for chunk in chunks:
        chunk.leaving = together
        assert chunk.slot is not None
        channel.store.copied(chunk.slot, partial(streams.synchronize, event))


def _distinct(streams: Iterable[Any]) -> list[Any]:
    # Streams need not be hashable.
    found: list[Any] = []
    for stream in streams:
        if stream not in found:
            found.append(stream)
    return found


def known_chunk(tensor: Tensor, channel: Channel, start: int, end: int) -> Chunk | None:
    """The chunk that holds these bytes of a tensor's storage already."""
    for reference in getattr(tensor.untyped_storage(), _KEY, ()):
        chunk: Chunk | None = reference()
        if chunk is not None and chunk.channel is channel and chunk.holds(tensor, start, end):
            return chunk
    return None


def remember_chunk(tensor: Tensor, chunk: Chunk) -> None:
    """Let `known_chunk` find it."""
    # On the storage, whose Python object lives as long as its memory: an address that is used again is another's.
    storage = tensor.untyped_storage()
    alive = [reference for reference in getattr(storage, _KEY, ()) if reference() is not None]
    setattr(storage, _KEY, [*alive, weakref.ref(chunk)])


def mark_of(tensor: Tensor) -> Tensor:
    """A tensor without elements that counts versions with another one, and shares no memory with it."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        mark = tensor.detach()
        if not is_traceable_wrapper_subclass(mark):
            mark.data = mark.new_empty(0)
            return mark
        # Data set is data of the wrapper, which has none.
        for name in mark.__tensor_flatten__()[0]:
            if isinstance(part := getattr(mark, name), Tensor):
                setattr(mark, name, part.new_empty(0))
    return mark


def seen(
    mark: Tensor,
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    size: Sequence[int],
    stride: Sequence[int],
    start: int,
) -> Tensor:
    """What lies at byte `start` of a storage as a tensor that counts versions with `mark`."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        tensor = mark.detach()
        bare = torch.empty(0, dtype=dtype, device=storage.device)
        tensor.data = bare.set_(storage, start // dtype.itemsize, tuple(size), tuple(stride))
    return tensor


def _bytes_of(tensor: Tensor, start: int, nbytes: int) -> Tensor:
    """The bytes as a tensor that has no graph and keeps their memory alive."""
    return _bytes_in(tensor.untyped_storage(), start, nbytes)


def _bytes_in(storage: torch.UntypedStorage, start: int, nbytes: int) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, start, (nbytes,), (1,))


def _places(pieces: Pieces) -> Iterator[tuple[int, Tensor]]:
    offset = 0
    for piece in pieces.tensors:
        yield offset, piece
        offset += piece.numel()


def _rounded(nbytes: int) -> int:
    # So that memory can be seen as elements of any size.
    return -(-nbytes // 16) * 16
