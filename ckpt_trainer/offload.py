"""Move what autograd stores of a block to the host while the computation goes on, and back before backward needs it.

What autograd holds instead of a tensor owns all that it needs: no table, id or counter is involved, so that any order of
forwards and backwards is right and nothing outlives its graph. How bytes are copied, and in which order, is the business
of `chunks`; what one call of one block packed is a `Group`.

NOTE on when. The newest group's tensors never leave: backward begins with them. When the next group has packed its inputs,
those of the group before go out. They have until the end of the forward after that; then computation waits for them. When
backward asks for the first tensor of a group, all of the group and of the `prefetch` groups before it are brought back. A
wrong guess costs a copy and nothing else.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ckpt_trainer import streams as device_streams
from ckpt_trainer.chunks import Channel, OffloadCounts, send
from ckpt_trainer.groups import Group, Reference, Use
from ckpt_trainer.handles import Place
from ckpt_trainer.host_memory import HostPool
from ckpt_trainer.host_store import HostStore
from ckpt_trainer.log import logger
from ckpt_trainer.memory import format_bytes

# Groups that may be on their way when a block's forward is over.
_IN_FLIGHT = 1
_READ_AHEAD = 2


class Offloading:
    """What is moved of the blocks of one model.

    Args:
        cap: Gives the bytes of host memory that may be taken; asked when the first tensor is to leave.
        prefetch: How many groups backward reloads ahead.
        pinned: Host memory is pinned. If not, the host waits for copies.
        folder: Where a file for what does not fit into host memory may be; None for none.

    Attributes:
        counts: What was moved and what stayed.
    """

    def __init__(
        self, cap: Callable[[], int], prefetch: int = 1, pinned: bool = True, folder: str | None = None
    ) -> None:
        self.counts = OffloadCounts()
        self._cap = cap
        self._prefetch = prefetch
        self._pinned = pinned
        self._folder = folder
        self._lanes: dict[torch.device, _Lane | None] = {}
        self._channels: list[Channel] = []
        self._store: HostStore | None = None
        self._last_report: dict[str, Any] | None = None
        self._lock = threading.Lock()

    def begin(self, tensors: Sequence[Tensor], own: Sequence[Tensor], to_disk: bool = False) -> Group | None:
        """A call of a block begins.

        Args:
            tensors: Its inputs; where they are tells which device is meant.
            own: Its parameters and buffers, which stay where they are.
            to_disk: What it stores may go on from the host to disk.

        Returns:
            None where there is nowhere to move to.
        """
        for device in dict.fromkeys(tensor.device for tensor in tensors):
            lane = self._lane(device)
            if lane is not None:
                return lane.begin(own, to_disk)
        return None

    def _lane(self, device: torch.device) -> _Lane | None:
        with self._lock:
            if device not in self._lanes:
                streams = device_streams.streams_of(device, self._pinned)
                self._lanes[device] = None if streams is None else _Lane(self._channel(streams), self._prefetch)
            return self._lanes[device]

    def _channel(self, streams: device_streams.Streams) -> Channel:
        if self._store is None:
            self._store = HostStore(HostPool(self._cap(), streams.host), self._folder)
        channel = Channel(streams, self._store, self.counts, self._channels)
        self._channels.append(channel)
        return channel

    def end_of_step(self) -> None:
        """Give up what was brought back and nobody asked for."""
        for lane in list(self._lanes.values()):
            if lane is not None:
                lane.release_all()

    def release(self) -> None:
        """Training is over: host memory goes back to the system, once no graph is alive that needs it."""
        with self._lock:
            if self._store is None:
                return
            self._last_report = self.report()
            self._channels.clear()  # which know each other
            self._lanes, self._store = {}, None
        # torch keeps pinned memory that is free for the next who asks.
        if torch.accelerator.is_available() and hasattr(torch.accelerator, "empty_host_cache"):
            torch.accelerator.empty_host_cache()

    def report(self) -> dict[str, Any]:
        """What was moved so far, as plain data.

        Returns:
            `devices`: those that something may leave; bytes and number of copies out and in; `prefetch_hits`,
            `prefetch_misses` and `prefetch_failures`, see `OffloadCounts`; `waited_seconds` that computation stood still
            for copies; bytes of the host in use now, at most so far, and taken from the system; `disk`, if it may be used:
            bytes written and read, seconds that the host waited for it; `kept`: why tensors stayed -> number, and bytes.
        """
        if self._store is None and self._last_report is not None:
            return {**self._last_report, "host_bytes": 0, "host_held_bytes": 0}
        store, counts = self._store, self.counts
        pool = store.pool if store else None
        return {
            "devices": [str(channel.streams.device) for channel in self._channels],
            "bytes_out": counts.bytes_out,
            "bytes_in": counts.bytes_in,
            "copies_out": counts.copies_out,
            "copies_in": counts.copies_in,
            "prefetch_hits": counts.hits,
            "prefetch_misses": counts.misses,
            "prefetch_failures": counts.failures,
            "waited_seconds": sum(channel.streams.waited_seconds for channel in self._channels),
            "host_bytes": pool.in_use if pool else 0,
            "host_peak_bytes": pool.peak if pool else 0,
            "host_held_bytes": pool.held if pool else 0,
            **({"disk": store.report()} if store and self._folder else {}),
            "kept": {why: {"tensors": number, "bytes": nbytes} for why, (number, nbytes) in counts.kept.items()},
        }


class _Lane:
    """The groups of one device."""

    def __init__(self, channel: Channel, prefetch: int) -> None:
        self.channel = channel
        self._prefetch = prefetch
        # Finalisers may come at any point, also within these; they take no lock.
        self._lock = threading.RLock()
        self._number = 0
        self._newest: Reference = _nothing
        self._last: Reference = _nothing
        self._unsent: deque[Reference] = deque()
        self._in_flight: deque[Reference] = deque()
        self._demanded: Reference = _nothing
        self._loaded: list[Reference] = []

    def begin(self, own: Sequence[Tensor], to_disk: bool) -> Group:
        with self._lock:
            self._number += 1
            group = Group(self, self._number, own, to_disk)
            self._newest = weakref.ref(group)
            return group

    def note(self, group: Group) -> None:
        """A group packs something. Normally the newest; not where there is a block within a block."""
        with self._lock:
            reference = weakref.ref(group)
            if group.before is None:
                # Only now, since one of which nothing leaves is gone by the time that backward follows these.
                group.before, self._last = self._last, reference
            if reference not in self._unsent:
                self._unsent.append(reference)

    def send_older(self) -> None:
        """All groups but the newest leave."""
        with self._lock:
            for _ in range(len(self._unsent)):
                reference = self._unsent.popleft()
                if reference is self._newest:
                    self._unsent.append(reference)
                elif (group := reference()) is not None:
                    self._send(group)
                    self._in_flight.append(reference)

    def wait_for_oldest(self) -> None:
        """Computation waits for the groups that are longest on their way."""
        with self._lock:
            while len(self._in_flight) > _IN_FLIGHT:
                _settle(self._in_flight.popleft()())

    def _send(self, group: Group) -> None:
        # What a later group packed too goes with that one.
        chunks = [use.chunk for use in group.uses() if use.chunk.last == group.number]
        for chunk in send([chunk for chunk in chunks if chunk.slot is None]):
            pool, counts = self.channel.store.pool, self.channel.counts
            why = f"host memory refused ({pool.refused})" if pool.refused else "host budget reached"
            if why not in counts.kept:
                logger.warning(
                    f"offload: {why} ({format_bytes(pool.in_use)} in use of {format_bytes(pool.cap)}). Tensors for which "
                    "there is no room stay on the device. Raise checkpointing_host_budget, or offload fewer blocks."
                )
            counts.keep(why, chunk.nbytes)

    def take(self, use: Use) -> Place:
        with self._lock:
            if self._demanded() is not use.group:
                self._demand(use.group)
            return use.place()

    def _demand(self, group: Group) -> None:
        """Backward asks for the first tensor of a group: bring back the group and those before it."""
        window = [group]
        while len(window) <= self._prefetch and (before := _before(window[-1])) is not None:
            window.append(before)
        for reference in [one for one in self._in_flight if one() not in window]:
            self._in_flight.remove(reference)
            _settle(reference())
        for use in group.awaited():
            if not use.chunk.is_here():
                self.channel.counts.hits += use.loaded is not None
                self.channel.counts.misses += use.loaded is None
                use.load()
        for ahead in window[1:]:
            self._load_ahead(ahead)
        self._read_ahead(_before(window[-1]))
        # Of the one demanded last, some may still be asked for.
        self._release([*window, self._demanded()])
        self._loaded = [weakref.ref(one) for one in (*window, self._demanded()) if one is not None]
        self._demanded = weakref.ref(group)

    def _load_ahead(self, group: Group) -> None:
        try:
            for use in group.awaited():
                if not use.chunk.is_here():
                    use.load()
        except (RuntimeError, OSError) as error:
            # What is needed now may still fit, and what cannot be read may not be needed.
            if not self.channel.counts.failures:
                logger.warning(
                    f"offload: a prefetch failed; backward tries again if it needs what that was for. {error}"
                )
            self.channel.counts.failures += 1

    def _read_ahead(self, group: Group | None) -> None:
        """Have what is on disk read to host memory, a few groups before it is copied to the device."""
        for _ in range(_READ_AHEAD):
            for use in group.uses() if group is not None else ():
                if use.chunk.slot is not None:
                    self.channel.store.fetch_ahead(use.chunk.slot)
            group = _before(group)

    def _release(self, but: Sequence[Group | None]) -> None:
        for group in (reference() for reference in self._loaded):
            if group is not None and group not in but:
                for use in group.uses():
                    use.drop()

    def release_all(self) -> None:
        with self._lock:
            self._release(())
            self._loaded = []
            self._demanded = _nothing


def _nothing() -> None:
    return None


def _before(group: Group | None) -> Group | None:
    """The group before this one of which something may leave, if it is alive."""
    return group.before() if group is not None and group.before is not None else None


def _settle(group: Group | None) -> None:
    """Give up what left of a group; what a later group has too is given up with that one."""
    for use in group.uses() if group is not None else ():
        if use.chunk.last == group.number:  # type: ignore[union-attr]
            use.chunk.settle()
