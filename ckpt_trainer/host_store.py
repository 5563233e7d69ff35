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
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ckpt_trainer.disk import DiskFile, Ticket
from ckpt_trainer.extents import UNIT, rounded_up
from ckpt_trainer.host_memory import HostPool, Pieces
from ckpt_trainer.log import logger
from ckpt_trainer.memory import format_bytes

# Of host memory in use and not on disk, from which on the earliest is written.
_FULL = 0.5

# Copies of slots that are gone of which it is not known that they are over; more are waited for.
_MANY = 256

# Seconds that room is waited for which others are about to give up.
_PATIENCE = 60.0
_PAUSE = 0.001

Wait = Callable[[], None]


@dataclass
class DiskCounts:
    """What the threads of the disk did, each of which has its own number.

    Args:
        bytes_written: Bytes that were written.
        bytes_read: Bytes that were read back.
        error: The last that was logged.
    """

    bytes_written: int = 0
    bytes_read: int = 0
    error: str = ""

    def wrote(self, reference: weakref.ref[Slot], error: OSError | None) -> None:
        """A write of a slot ended, in the thread that did it."""
        slot = reference()
        if error is not None and str(error) != self.error:
            self.error = str(error)
            logger.warning("offload to disk: %s Until then all stays in host memory.", error.strerror or error)
        if error is None and slot is not None:  # else it may not have been written
            self.bytes_written += slot.nbytes
            slot.on_disk = True


class Reading:
    """Bytes on their way back from disk.

    Args:
        counts: Where they are counted.
        nbytes: How many.

    Attributes:
        done: Is set once they are there, or cannot be.
        error: Why they cannot.
    """

    __slots__ = ("_counts", "_nbytes", "done", "error")

    def __init__(self, counts: DiskCounts, nbytes: int) -> None:
        self._counts = counts
        self._nbytes = nbytes
        self.done = threading.Event()
        self.error: OSError | None = None

    def end(self, error: OSError | None) -> None:
        """It ended, in the thread that did it."""
        self.error = error
        if error is None:
            self._counts.bytes_read += self._nbytes
        self.done.set()


@dataclass(frozen=True)
class Gone:
    """What has to be known of a slot that was collected.

    Args:
        number: Its number.
        stayed: Bytes of host memory that it had for good.
        doubled: Bytes of host memory that it had on disk too.
        wait: Makes the host wait for the last copy to or from its memory; None if there was none.
    """

    number: int
    stayed: int
    doubled: int
    wait: Wait | None


class Slot:
    """Where the bytes of one chunk are off the device. Gives back its room when it is collected.

    Args:
        pieces: Host memory for them.
        number: Slots are numbered as they are made.
        to_disk: They may be on disk only.
        gone: Where to leave a note in the end; None for nowhere.

    Attributes:
        nbytes: Number of bytes.
        room: Bytes of host memory that they take.
        pieces: In host memory; None while they are on disk only.
        ticket: On disk, or on their way there.
        on_disk: They are there.
        copied: Makes the host wait for the end of the copy to here; None until that has begun.
        read: The same for the last copy from here; None if there was none since they came back from disk.
        reading: Their way back from disk; None if they did not leave since.
    """

    __slots__ = (
        "__weakref__", "_gone", "_loan", "copied", "nbytes", "number", "on_disk", "pieces", "read", "reading", "room",
        "ticket", "to_disk",
    )  # fmt: skip

    def __init__(
        self, pieces: Pieces, number: int = 0, to_disk: bool = False, gone: deque[Gone] | None = None
    ) -> None:
        self._gone = gone
        self._loan: Callable[[], Pieces | None] = _nothing
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
        # Without parts of its own: the room goes back to the pool when the slot says so.
        loan = Pieces(self.pieces.tensors, (), deque())
        self._loan = weakref.ref(loan)
        return loan

    @property
    def may_leave(self) -> bool:
        """Whether the bytes are in host memory, and nobody is about to copy them."""
        return self.to_disk and self.pieces is not None and self.copied is not None and self._loan() is None

    @property
    def is_ahead(self) -> bool:
        """Whether they came back from disk and were not used since."""
        return self.reading is not None and self.read is None

    @property
    def state(self) -> tuple[Pieces | None, Reading | None, Wait | None]:
        """What is another once something was done with the bytes."""
        return self.pieces, self.reading, self.read

    def __del__(self) -> None:
        # Before the memory is given back: who takes it must find the note.
        if self._gone is not None:
            wait = None if self.pieces is None else self.read or self.copied
            doubled = self.pieces is not None and self.ticket is not None
            stayed = 0 if self.to_disk else self.room
            self._gone.append(Gone(self.number, stayed, self.room if doubled else 0, wait))


class HostStore:
    """The host's side of offloading, for all devices of a process.

    Args:
        pool: Host memory.
        folder: Where a file for what does not fit may be; None for none.

    Attributes:
        counts: Of bytes written to disk and read back.
        waited_seconds: Time for which the host waited for the disk, or on account of it.

    Raises:
        ValueError: The folder cannot be written to.
    """

    def __init__(self, pool: HostPool, folder: str | None = None) -> None:
        self.pool = pool
        self.counts = DiskCounts()
        self.waited_seconds = 0.0
        self._disk = None if folder is None else DiskFile(folder)
        self._lock = threading.RLock()
        self._number = 0
        self._largest = 0  # room of a slot that may be on disk, so far
        self._staying = 0  # room of slots that may not
        self._doubled = 0  # room of slots that are on disk too, or on their way there
        self._in_memory: dict[int, weakref.ref[Slot]] = {}  # of those that may be on disk
        self._unwritten: OrderedDict[int, weakref.ref[Slot]] = OrderedDict()  # earliest first
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
        room = rounded_up(nbytes)
        if not self._reserve(room, to_disk):
            return None
        pieces = self._take(nbytes, to_disk)
        with self._lock:
            if pieces is None:
                self._staying -= 0 if to_disk else room
                if to_disk and self._disk.failed is not None:
                    raise RuntimeError(f"offload to disk: {self._why_full(nbytes, 'keep what left the device')}")
                return None
            self._number += 1
            slot = Slot(pieces, self._number, to_disk, self._gone)
            if to_disk:
                self._in_memory[slot.number] = weakref.ref(slot)
            return slot

    def copied(self, slot: Slot, wait: Wait) -> None:
        """A copy to the slot was begun; `wait` makes the host wait for its end."""
        slot.copied = wait
        if slot.to_disk and self._disk is not None:
            with self._lock:
                self._unwritten[slot.number] = weakref.ref(slot)
                self._write_early(self._disk)

    def fetch(self, slot: Slot) -> Pieces:
        """The bytes in host memory. If they are on disk the host waits until they are read.

        They stay there for as long as what is returned lives; then `slot.read` has to tell of the copy that was begun.

        Raises:
            OSError: They cannot be read back.
            RuntimeError: There is no host memory to read them to, or nothing was ever copied to the slot.
        """
        if slot.copied is None:
            raise RuntimeError(
                f"offload: {format_bytes(slot.nbytes)} were asked for that never left the device, since an error came before. "
                "Run the forward again."
            )
        with self._lock:
            loan = slot.lend()
        if loan is None:
            loan = self._begin_read(slot, self._take_to_read(slot.nbytes))
        if slot.reading is not None:
            self._wait(slot.reading.done.wait)
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
        """Bytes written to disk and read back so far, and seconds that the host waited for that."""
        return {
            "bytes_written": self.counts.bytes_written,
            "bytes_read": self.counts.bytes_read,
            "waited_seconds": self.waited_seconds,
        }

    @property
    def _capacity(self) -> int:
        """Bytes that the pool has or may yet get."""
        return self.pool.held if self.pool.refused else self.pool.cap // UNIT * UNIT

    def _reserve(self, room: int, to_disk: bool) -> bool:
        """Whether each slot on disk can still come back if so much more is taken."""
        with self._lock:
            self._bury()
            largest = max(self._largest, room) if to_disk else self._largest
            staying = self._staying if to_disk else self._staying + room
            if staying + largest > self._capacity:
                return False
            self._largest, self._staying = largest, staying
            return True

    def _take(self, nbytes: int, to_disk: bool) -> Pieces | None:
        pieces = self.pool.take(nbytes)
        # What the system refuses may be less than was reserved.
        while pieces is None and (to_disk or self._reserve(0, False)) and self._make_room(nbytes):
            pieces = self.pool.take(nbytes)
        return pieces

    def _take_to_read(self, nbytes: int) -> Pieces:
        end = time.monotonic() + _PATIENCE
        while (pieces := self._take(nbytes, True)) is None:
            # What other threads copy, and what was collected while it was written, is free in a moment.
            if not self._will_fit(nbytes) or time.monotonic() > end:
                raise RuntimeError(f"offload to disk: {self._why_full(nbytes, 'read it back from disk')}")
            self._wait(partial(time.sleep, _PAUSE))
        return pieces

    def _make_room(self, nbytes: int) -> bool:
        """Let one slot be on disk only; False if so many bytes cannot become free by that."""
        with self._lock:
            slot = self._first_to_leave(nbytes)
            if slot is None:
                return False
            if slot.ticket is None:
                self._write(slot)
            ticket, state = slot.ticket, slot.state
        assert ticket is not None
        try:
            self._wait(ticket.wait)
        except OSError as error:
            self._not_written(slot, ticket, error)
            return True  # others may be on disk
        _, reading, read = state
        if reading is not None:
            self._wait(reading.done.wait)
        if read is not None:
            self._wait(read)
        with self._lock:
            # Meanwhile another thread may have done the same, or have used it.
            if slot.may_leave and all(now is then for now, then in zip(slot.state, state, strict=True)):
                self._leave(slot)
        return True

    def _first_to_leave(self, nbytes: int) -> Slot | None:
        self._bury()
        slots = [slot for slot in self._slots() if slot.may_leave]
        if self._capacity - self.pool.in_use + sum(slot.room for slot in slots) < nbytes:
            return None
        # The earliest; but before one is written those that are on disk, and last what was read ahead.
        return min(slots, key=lambda slot: (slot.is_ahead, slot.ticket is None, slot.number), default=None)

    def _slots(self) -> list[Slot]:
        """Those in memory that are on disk, or can be."""
        slots = [slot for reference in list(self._in_memory.values()) if (slot := reference()) is not None]
        failed = self._disk is None or self._disk.failed is not None
        return [slot for slot in slots if slot.on_disk or not failed]

    def _will_fit(self, nbytes: int) -> bool:
        """Whether so many bytes can be had once nobody is about to use what is in memory."""
        with self._lock:
            can = {slot.number for slot in self._slots()}
            slots = [reference() for number, reference in self._in_memory.items() if number not in can]
            fixed = self._staying + sum(slot.room for slot in slots if slot is not None)
            return fixed + rounded_up(nbytes) <= self._capacity

    def _leave(self, slot: Slot) -> None:
        """Keep the bytes on disk only."""
        assert slot.pieces is not None
        slot.pieces.give_back()
        slot.pieces = slot.read = slot.reading = None
        self._doubled -= slot.room
        del self._in_memory[slot.number]

    def _begin_read(self, slot: Slot, pieces: Pieces) -> Pieces:
        assert self._disk is not None
        assert slot.ticket is not None
        self._finish_copies()
        reading = Reading(self.counts, slot.nbytes)
        self._disk.read(slot.ticket, pieces, reading.end)
        with self._lock:
            slot.pieces, slot.reading = pieces, reading
            self._doubled += slot.room
            self._in_memory[slot.number] = weakref.ref(slot)
            loan = slot.lend()
        assert loan is not None
        return loan

    def _write_early(self, disk: DiskFile) -> None:
        self._bury()
        while self._unwritten and disk.failed is None:
            if self.pool.in_use - self._doubled <= _FULL * self._capacity:
                return
            _, reference = self._unwritten.popitem(last=False)
            slot = reference()
            if slot is not None and slot.ticket is None:
                self._write(slot)

    def _write(self, slot: Slot) -> None:
        assert self._disk is not None
        assert slot.pieces is not None
        assert slot.copied is not None
        slot.ticket = self._disk.write(slot.pieces, slot.copied, partial(self.counts.wrote, weakref.ref(slot)))
        self._doubled += slot.room

    def _not_written(self, slot: Slot, ticket: Ticket, error: OSError) -> None:
        assert self._disk is not None
        with self._lock:
            if slot.ticket is ticket:
                slot.ticket = None
                self._doubled -= slot.room
        if self._disk.failed is None:  # what failed is not the disk, and would do so again
            raise RuntimeError(f"offload to disk: {format_bytes(slot.nbytes)} could not be written: {error}") from error

    def _bury(self) -> None:
        """Forget slots that are gone."""
        while self._gone:
            gone = self._gone.popleft()
            self._in_memory.pop(gone.number, None)
            self._unwritten.pop(gone.number, None)
            self._staying -= gone.stayed
            self._doubled -= gone.doubled
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
        failed = self._disk.failed if self._disk is not None else None
        disk = "" if failed is None else f", and what is there cannot be written: {failed.strerror or failed}"
        return (
            f"{format_bytes(nbytes)} of host memory are needed to {purpose}, and {format_bytes(self.pool.in_use)} of "
            f"{format_bytes(self._capacity)} are in use{disk.removesuffix('.')}. Nothing is lost; this step cannot go on. "
            f"{'Raise' if failed is None else 'Free room on the disk, or raise'} checkpointing_host_budget."
        )

    def _wait(self, wait: Callable[[], object]) -> None:
        began = time.perf_counter()
        try:
            wait()
        finally:
            with self._lock:
                self.waited_seconds += time.perf_counter() - began


def _nothing() -> None:
    return None
