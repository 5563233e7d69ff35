"""Where bytes are that left the device: in host memory, and on disk when that gets full.

`HostStore` decides what is written to disk and read back, and when; `host_memory` and `disk` have the room. What is
written: the earliest first, since backward needs it last, as soon as half of the host memory is in use, so that its room
can be handed out at once when the rest is. What failed to be written stays in host memory.

NOTE on threads. One slot is used by one thread at a time, that of its lane; slots of several devices by several at once,
each of which may send those of others to disk. The lock is never held while the disk or a device is waited for, and the
threads of the disk never ask for it. Finalisers ask for none: a slot leaves a note when it is collected.

NOTE on order. Streams wait for each other before host memory is used anew; the thread that reads from disk is no stream.
So the host waits for the copies to and from all slots that are gone before their room may be read to.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from ckpt_trainer.disk import DiskFile, Ticket
from ckpt_trainer.extents import UNIT, rounded_up
from ckpt_trainer.host_memory import HostPool, Pieces
from ckpt_trainer.log import logger
from ckpt_trainer.memory import format_bytes

# Of host memory in use and not on disk, from which on the earliest is written.
_FULL = 0.5

# Copies of slots that are gone which may be on their way; more are waited for.
_MANY = 256

# Seconds that room is waited for which others are about to give up.
_PATIENCE = 60.0

Wait = Callable[[], None]


@dataclass
class DiskCounts:
    """What the threads of the disk did; each has a number of its own, so they need no lock."""

    bytes_written: int = 0
    bytes_read: int = 0
    logged: str = ""

    def has_written(self, reference: weakref.ref[Slot], error: OSError | None) -> None:
        """A write of a slot ended, in the thread that did it."""
        slot = reference()
        if error is not None and str(error) != self.logged:
            self.logged = str(error)
            logger.warning("offload to disk: %s", error)
        if error is None and slot is not None:  # else it may not have been written
            self.bytes_written += slot.nbytes
            slot.on_disk = True

    def has_read(self, reading: Reading, nbytes: int, error: OSError | None) -> None:
        """A read ended, in the thread that did it."""
        reading.error = error
        self.bytes_read += 0 if error else nbytes
        reading.set()


class Reading(threading.Event):
    """Is set once bytes are back from disk, or cannot be; then `error` says why."""

    error: OSError | None = None


class Gone(NamedTuple):
    """What has to be known of a slot that was collected."""

    number: int
    stayed: int  # bytes of host memory that it had for good
    wait: Wait | None  # for the last copy to or from its memory


class Slot:
    """Where the bytes of one chunk are off the device. Gives back its room when it is collected.

    Args:
        pieces: Host memory for them.
        number: Slots are numbered as they are made.
        to_disk: They may be on disk only.
        gone: Where to leave a note in the end; None for nowhere.

    Attributes:
        nbytes: Number of bytes; `room` that of host memory which they take while they are there.
        pieces: In host memory; None while they are on disk only.
        ticket: On disk (`on_disk`), or on their way there.
        copied: Makes the host wait for the end of the copy to here; None until that has begun.
        read: The same for the last copy from here; None if there was none since they came back from disk.
        reading: Their way back from disk; None if they did not leave since.
    """

    def __init__(self, pieces: Pieces, number: int = 0, to_disk: bool = False, gone: deque[Gone] | None = None) -> None:
        self._gone = gone
        self._loan: Callable[[], Pieces | None] = lambda: None
        self.number = number
        self.to_disk = to_disk
        self.nbytes = pieces.nbytes
        self.room = rounded_up(pieces.nbytes)
        self.pieces: Pieces | None = pieces
        self.ticket: Ticket | None = None
        self.on_disk = False
        self.copied: Wait | None = None
        self.read: Wait | None = None
        self.reading: Reading | None = None

    def lend(self) -> Pieces | None:
        """The bytes in host memory, which cannot leave it for as long as this object lives; None if they are not there."""
        if self.pieces is None:
            return None
        self._loan = weakref.ref(loan := Pieces(self.pieces.tensors, (), deque()))  # the parts are the slot's
        return loan

    @property
    def may_leave(self) -> bool:
        """Whether the bytes are in host memory, and nobody is about to copy them."""
        return self.to_disk and self.pieces is not None and self.copied is not None and self._loan() is None

    @property
    def order(self) -> tuple[bool, bool, int]:
        """Of those in memory, first leaves what is on disk anyway, then the earliest; last what was read ahead."""
        return self.reading is not None and self.read is None, self.ticket is None, self.number

    def __del__(self) -> None:
        # Before the memory is given back: who takes it must find the note.
        if self._gone is not None:
            self._gone.append(Gone(self.number, 0 if self.to_disk else self.room, self.read or self.copied))


class HostStore:
    """The host's side of offloading, for all devices of a process.

    Args:
        pool: Host memory.
        folder: Where a file for what does not fit may be; None for none.

    Raises:
        ValueError: The folder cannot be written to.
    """

    def __init__(self, pool: HostPool, folder: str | None = None) -> None:
        self.pool = pool
        self._counts = DiskCounts()
        self._waited_seconds = 0.0
        self._disk = None if folder is None else DiskFile(folder)
        self._lock = threading.RLock()
        self._number = 0
        self._largest = 0  # room of a slot that may be on disk, so far
        self._staying = 0  # room of slots that may not
        self._in_memory: dict[int, weakref.ref[Slot]] = {}  # of those that may be on disk
        self._gone: deque[Gone] = deque()
        self._unfinished: dict[int, Wait] = {}  # copies of slots that are gone

    def put(self, nbytes: int, to_disk: bool = False) -> Slot | None:
        """Room for so many bytes in host memory; None where there is none.

        Args:
            to_disk: They may go on to disk.

        Raises:
            RuntimeError: There is none since the disk failed.
        """
        if self._disk is None:
            pieces = self.pool.take(nbytes)
            return None if pieces is None else Slot(pieces)
        self._finish_copies(but=_MANY)
        room, pieces = rounded_up(nbytes), None
        if not self._reserve(room, to_disk):
            return None
        try:
            pieces = self._take(nbytes, to_disk)
        finally:
            slot = self._slot(pieces, room, to_disk)
        if slot is None and to_disk and self._disk.failed is not None:
            raise RuntimeError(self._why_full(nbytes, "move more off the device"))
        return slot

    def copied(self, slot: Slot, wait: Wait) -> None:
        """A copy to the slot was begun; `wait` makes the host wait for its end."""
        slot.copied = wait
        if slot.to_disk and self._disk is not None:
            with self._lock:
                self._bury()
                try:
                    self._write_early()
                except RuntimeError as error:  # The system may refuse a thread; what was copied is safe where it is.
                    logger.warning("offload to disk: nothing is written early: %s", error)

    def fetch(self, slot: Slot) -> Pieces:
        """The bytes in host memory. If they are on disk the host waits until they are read.

        They stay there for as long as what is returned lives; then `slot.read` has to tell of the copy that was begun.

        Raises:
            OSError: They cannot be read back.
            RuntimeError: There is no host memory to read them to, or nothing was ever copied to the slot.
        """
        if slot.copied is None:
            raise RuntimeError("offload: no copy to the host was begun, after an error before. Run the forward again.")
        with self._lock:
            loan = slot.lend()
        if loan is None:
            loan = self._begin_read(slot, self._take_to_read(slot.nbytes))
        if slot.reading is not None:
            self._wait(slot.reading.wait)
            if (error := slot.reading.error) is not None:
                with self._lock:
                    self._leave(slot)
                # Another one, because one that is raised holds the frames that it comes through.
                raise OSError(*error.args)
        return loan

    def fetch_ahead(self, slot: Slot) -> None:
        """Begin to read the bytes, if they are on disk only and there is room."""
        if slot.pieces is None and (pieces := self.pool.take(slot.nbytes)) is not None:
            self._begin_read(slot, pieces)

    def report(self) -> dict[str, float]:
        """Bytes written to disk and read back so far, and seconds that the host waited on account of that."""
        written, read = self._counts.bytes_written, self._counts.bytes_read
        return {"bytes_written": written, "bytes_read": read, "waited_seconds": self._waited_seconds}

    @property
    def _file(self) -> DiskFile:
        assert self._disk is not None
        return self._disk

    @property
    def _capacity(self) -> int:
        """Bytes that the pool has or may yet get."""
        return self.pool.held if self.pool.refused else self.pool.cap // UNIT * UNIT

    def _reserve(self, room: int, to_disk: bool) -> bool:
        """Whether so much more may be taken, and each slot on disk can still come back."""
        with self._lock:
            self._bury()
            if self._staying + (room if to_disk else room + self._largest) > self._capacity:
                return False
            if to_disk:
                self._largest = max(self._largest, room)
            else:
                self._staying += room
            return True

    def _slot(self, pieces: Pieces | None, room: int, to_disk: bool) -> Slot | None:
        with self._lock:
            if pieces is None:
                self._staying -= 0 if to_disk else room
                return None
            self._number += 1
            slot = Slot(pieces, self._number, to_disk, self._gone)
            if to_disk:
                self._in_memory[slot.number] = weakref.ref(slot)
            return slot

    def _take(self, nbytes: int, to_disk: bool) -> Pieces | None:
        pieces = self.pool.take(nbytes)
        # The system may refuse some of what was reserved. Once the disk failed, what leaves might not find room again.
        while pieces is None and self._file.failed is None and (to_disk or self._reserve(0, False)):
            if not self._make_room(nbytes):
                return None
            pieces = self.pool.take(nbytes)
        return pieces

    def _take_to_read(self, nbytes: int) -> Pieces:
        end = time.monotonic() + _PATIENCE
        while (pieces := self.pool.take(nbytes)) is None:
            if not self._make_room(nbytes):
                # What others are about to copy, and what was collected while it was written, is free in a moment.
                if not self._will_fit(nbytes) or time.monotonic() > end:
                    raise RuntimeError(self._why_full(nbytes, "read back what is on disk"))
                self._wait(partial(time.sleep, 0.001))
        return pieces

    def _make_room(self, nbytes: int) -> bool:
        """Let one slot be on disk only; False if so many bytes cannot become free by that."""
        with self._lock:
            slot = self._first_to_leave(nbytes)
            if slot is None:
                return False
            ticket = self._write(slot) if slot.ticket is None else slot.ticket
            pieces, reading, read = slot.pieces, slot.reading, slot.read
        try:
            self._wait(ticket.wait)
        except OSError as error:
            with self._lock:
                slot.ticket = None if slot.ticket is ticket else slot.ticket
            if self._file.failed is None:  # its copy did not end well, so the disk was never asked
                raise RuntimeError(
                    f"offload to disk: {format_bytes(slot.nbytes)} could not be written: {error}"
                ) from error
            return True
        for wait in (None if reading is None else reading.wait, read):
            if wait is not None:
                self._wait(wait)
        with self._lock:
            # Meanwhile another thread may have done the same, or have used it.
            if slot.may_leave and (slot.pieces, slot.reading, slot.read) == (pieces, reading, read):
                self._leave(slot)
        return True

    def _first_to_leave(self, nbytes: int) -> Slot | None:
        self._bury()
        slots = [slot for slot in self._can_leave() if slot.may_leave]
        if self._capacity - self.pool.in_use + sum(slot.room for slot in slots) < nbytes:
            return None
        return min(slots, key=lambda slot: slot.order, default=None)

    def _can_leave(self, can: bool = True) -> list[Slot]:
        """Those in memory, some of them in use, that are on disk or can be; or those that cannot."""
        slots = [slot for reference in list(self._in_memory.values()) if (slot := reference()) is not None]
        works = self._file.failed is None
        return [slot for slot in slots if (slot.on_disk or works) == can]

    def _will_fit(self, nbytes: int) -> bool:
        """Whether so many bytes can be had once nobody uses what is in memory."""
        with self._lock:
            fixed = self._staying + sum(slot.room for slot in self._can_leave(False))
            return fixed + nbytes <= self._capacity

    def _leave(self, slot: Slot) -> None:
        """Keep the bytes on disk only."""
        assert slot.pieces is not None
        slot.pieces.give_back()
        slot.pieces = slot.read = slot.reading = None
        del self._in_memory[slot.number]

    def _begin_read(self, slot: Slot, pieces: Pieces) -> Pieces:
        assert slot.ticket is not None, "bytes that are not in memory are on disk"
        self._finish_copies()
        reading = Reading()
        self._file.read(slot.ticket, pieces, partial(self._counts.has_read, reading, slot.nbytes))
        with self._lock:
            slot.pieces, slot.reading = pieces, reading
            self._in_memory[slot.number] = weakref.ref(slot)
            loan = slot.lend()
        assert loan is not None
        return loan

    def _write_early(self) -> None:
        in_use, full = self.pool.in_use, _FULL * self._capacity
        if in_use > full:
            slots = self._can_leave()
            in_use -= sum(slot.room for slot in slots if slot.ticket is not None)
            for slot in slots:
                if in_use > full and slot.ticket is None and slot.copied is not None:
                    self._write(slot)
                    in_use -= slot.room

    def _write(self, slot: Slot) -> Ticket:
        assert slot.pieces is not None
        assert slot.copied is not None
        slot.ticket = self._file.write(slot.pieces, slot.copied, partial(self._counts.has_written, weakref.ref(slot)))
        return slot.ticket

    def _bury(self) -> None:
        """Forget slots that are gone."""
        while self._gone:
            gone = self._gone.popleft()
            self._in_memory.pop(gone.number, None)
            self._staying -= gone.stayed
            if gone.wait is not None:
                self._unfinished[gone.number] = gone.wait

    def _finish_copies(self, but: int = 0) -> None:
        """Wait for the copies to and from slots that are gone, but for so many of the last."""
        with self._lock:
            self._bury()
            waits = list(self._unfinished.items())[: max(0, len(self._unfinished) - but)]
        for _, wait in waits:
            self._wait(wait)
        with self._lock:
            # Not before: until then another thread has to wait for them too.
            for number, _ in waits:
                self._unfinished.pop(number, None)

    def _why_full(self, nbytes: int, purpose: str) -> str:
        used, failed = format_bytes(self.pool.in_use), self._file.failed
        disk = f" What is there cannot go on to disk: {failed.strerror}" if failed is not None else ""
        return (
            f"offload to disk: {format_bytes(nbytes)} of host memory are needed to {purpose}, and {used} of "
            f"{format_bytes(self._capacity)} are in use.{disk} This step cannot go on. Raise checkpointing_host_budget."
        )

    def _wait(self, wait: Callable[[], object]) -> None:
        began = time.perf_counter()
        try:
            wait()
        finally:
            with self._lock:
                self._waited_seconds += time.perf_counter() - began
