"""Where bytes are that left the device: in host memory, and on disk when that gets full.

`HostStore` decides what is written to disk and read back, and when; `host_memory` and `disk` have the room. What is
written: the earliest first, since backward needs it last, as soon as half of the host memory is in use, so that its room
can be handed out at once when the rest is. What failed to be written stays in host memory.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial

from ckpt_trainer.disk import DiskFile, Ticket
from ckpt_trainer.host_memory import HostPool, Pieces
from ckpt_trainer.log import logger
from ckpt_trainer.memory import format_bytes

# Of host memory in use, from which on the earliest is written to disk.
_FULL = 0.5

Wait = Callable[[], None]


class Slot:
    """Where the bytes of one chunk are off the device. Gives back its room when it is collected.

    Attributes:
        nbytes: Number of bytes.
        pieces: In host memory; None while they are on disk only.
        ticket: On disk, or on their way there.
        copied: Makes the host wait for the end of the copy to here; None until that has begun.
        read: The same for the last copy from here; None until that has begun.
        reading: Is set once they are read back from disk; None if that was not asked for.
        error: Why they could not be written, or read back.
    """

    __slots__ = ("__weakref__", "copied", "error", "nbytes", "pieces", "read", "reading", "ticket")

    def __init__(self, pieces: Pieces) -> None:
        self.nbytes = pieces.nbytes
        self.pieces: Pieces | None = pieces
        self.ticket: Ticket | None = None
        self.copied: Wait | None = None
        self.read: Wait | None = None
        self.reading: threading.Event | None = None
        self.error: OSError | None = None

    @property
    def may_leave(self) -> bool:
        """Whether the bytes are in host memory, and not just read back for a copy that is to come."""
        return self.pieces is not None and self.copied is not None and (self.reading is None or self.read is not None)

    def leave_memory(self) -> None:
        """Keep the bytes on disk only."""
        assert self.pieces is not None
        if self.read is not None:
            self.read()
        self.pieces.give_back()
        self.pieces = self.read = self.reading = None


class HostStore:
    """The host's side of offloading, for all devices of a process.

    Args:
        pool: Host memory.
        folder: Where a file for what does not fit may be; None for none.

    Attributes:
        bytes_written: To disk.
        bytes_read: From disk.
        waited_seconds: Time for which the host waited for the disk.

    Raises:
        ValueError: The folder cannot be written to.
    """

    def __init__(self, pool: HostPool, folder: str | None = None) -> None:
        self.pool = pool
        self.bytes_written = 0
        self.bytes_read = 0
        self.waited_seconds = 0.0
        self._disk = None if folder is None else DiskFile(folder)
        self._slots: deque[weakref.ref[Slot]] = deque()  # earliest first
        self._lock = threading.RLock()

    def put(self, nbytes: int, to_disk: bool = False) -> Slot | None:
        """Room for so many bytes in host memory; None where there is none.

        Args:
            to_disk: They may go on to disk.

        Raises:
            RuntimeError: There is none since the disk failed.
        """
        pieces = self._take(nbytes)
        if pieces is None:
            return None
        slot = Slot(pieces)
        if to_disk and self._disk is not None:
            with self._lock:
                self._slots.append(weakref.ref(slot))
        return slot

    def copied(self, slot: Slot, wait: Wait) -> None:
        """A copy to the slot was begun; `wait` makes the host wait for its end."""
        slot.copied = wait
        if self._disk is not None:
            with self._lock:
                self._write_early()

    def fetch(self, slot: Slot) -> Pieces:
        """The bytes in host memory. If they are on disk the host waits until they are read.

        Raises:
            OSError: They cannot be read back.
            RuntimeError: There is no host memory to read them to.
        """
        if slot.pieces is None:
            with self._lock:
                if not self._begin_read(slot, self._take(slot.nbytes)):
                    raise RuntimeError(
                        f"no host memory is left to read {format_bytes(slot.nbytes)} back from disk. Raise "
                        "checkpointing_host_budget."
                    )
        if slot.reading is not None:
            self._wait(slot.reading.wait)
            if slot.error is not None:
                raise slot.error
        assert slot.pieces is not None
        return slot.pieces

    def fetch_ahead(self, slot: Slot) -> None:
        """Begin to read the bytes, if they are on disk and there is room."""
        if slot.pieces is None:
            with self._lock:
                self._begin_read(slot, self.pool.take(slot.nbytes))

    def report(self) -> dict[str, float]:
        """Bytes written to disk and read back so far, and seconds that the host waited for that."""
        return {
            "bytes_written": self.bytes_written,
            "bytes_read": self.bytes_read,
            "waited_seconds": self.waited_seconds,
        }

    def _begin_read(self, slot: Slot, pieces: Pieces | None) -> bool:
        if pieces is None:
            return False
        assert self._disk is not None
        assert slot.ticket is not None
        slot.pieces, slot.reading = pieces, threading.Event()
        self.bytes_read += slot.nbytes
        self._disk.read(slot.ticket, pieces, partial(_note, weakref.ref(slot), slot.reading))
        return True

    def _take(self, nbytes: int) -> Pieces | None:
        pieces = self.pool.take(nbytes)
        while pieces is None and self._disk is not None:
            with self._lock:
                if not self._make_room():
                    break
            pieces = self.pool.take(nbytes)
        return pieces

    def _make_room(self) -> bool:
        """Let the earliest slot in host memory be on disk only; False if there is none that can be."""
        for slot in self._in_memory():
            self._write(slot)
            assert slot.ticket is not None
            try:
                self._wait(slot.ticket.wait)
            except OSError as error:
                raise RuntimeError(
                    f"offload to disk: the host budget is reached ({format_bytes(self.pool.in_use)} in use), and {error} "
                    "Nothing is lost; this step cannot go on. Free room on the disk, or raise checkpointing_host_budget."
                ) from error
            slot.leave_memory()
            return True
        return False

    def _write_early(self) -> None:
        ahead = self.pool.in_use - _FULL * self.pool.cap
        for slot in self._in_memory():
            if ahead <= 0 or self._disk is None or self._disk.failed is not None:
                return
            ahead -= slot.nbytes
            self._write(slot)

    def _write(self, slot: Slot) -> None:
        if slot.ticket is None or slot.error is not None:
            assert self._disk is not None
            assert slot.pieces is not None
            assert slot.copied is not None
            slot.error = None
            self.bytes_written += slot.nbytes
            slot.ticket = self._disk.write(slot.pieces, slot.copied, partial(_note, weakref.ref(slot), None))

    def _in_memory(self) -> list[Slot]:
        """Those that could be on disk instead, the earliest first."""
        self._slots = deque(reference for reference in self._slots if reference() is not None)
        slots = (reference() for reference in self._slots)
        return [slot for slot in slots if slot is not None and slot.may_leave]

    def _wait(self, wait: Callable[[], object]) -> None:
        began = time.perf_counter()
        try:
            wait()
        finally:
            self.waited_seconds += time.perf_counter() - began


def _note(reference: weakref.ref[Slot], event: threading.Event | None, error: OSError | None) -> None:
    """A write or a read ended, in the thread that did it."""
    slot = reference()
    if slot is not None:
        slot.error = error
    if error is not None:
        logger.warning("offload to disk: %s", error)
    if event is not None:
        event.set()
