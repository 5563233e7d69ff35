"""A file that host memory is written to and read from, by threads of its own; what goes there is decided by `offload`.

NOTE on what can go wrong. The file has no name from the moment it is open, so that a killed process leaves nothing. Room is
reserved before anything is written. A ticket keeps a checksum of what was written; what is read is compared with it, so a
file that was cut short, or is damaged, gives an error and never other bytes. What was to be written stays in host memory
until its owner hears that it is on disk; after one write that failed no more is tried.
"""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from queue import SimpleQueue
from threading import Event, Lock, Thread, current_thread
from zlib import crc32

from ckpt_trainer.extents import Extents, Part, Taken, drain, rounded_up
from ckpt_trainer.host_memory import Pieces
from ckpt_trainer.log import logger
from ckpt_trainer.memory import format_bytes

# Bytes of one call: few enough that they are still in a cache when they are written after the checksum.
_CALL_BYTES = 2**22

# Of posix_fallocate, where a file system cannot reserve room.
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)

Job = Callable[[], None]
Then = Callable[[OSError | None], None]


class Ticket(Taken):
    """What was written to a `DiskFile`: owns its part of the file until it is collected.

    Attributes:
        nbytes: Bytes that were written, or are to be.
    """

    __slots__ = ("_checksum", "_done", "_error", "nbytes")

    def __init__(self, nbytes: int, returned: deque[Part]) -> None:
        super().__init__((), returned)
        self.nbytes = nbytes
        self._checksum = 0
        self._done = Event()
        self._error: OSError | None = None

    def wait(self) -> None:
        """Wait until it is written, and its owner has heard so.

        Raises:
            OSError: It could not be written.
        """
        self._done.wait()
        if self._error is not None:
            # Another one each time, and not by a name: one that is raised holds the frames that it comes through.
            raise OSError(*self._error.args)


class DiskFile:
    """A file without a name. It is made when the first bytes are written, and gone with this object or the process.

    Args:
        folder: Where the file takes its room.

    Raises:
        ValueError: There is no such folder, or no file can be written there.
    """

    def __init__(self, folder: str) -> None:
        if not hasattr(os, "pwrite"):
            raise ValueError("Offloading to disk was asked for, and this system has no pwrite. Offload to the host.")
        if not os.path.isdir(folder):
            raise ValueError(
                f"{folder!r} is not a folder. Offloading to disk needs one that exists; make it, or name another."
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(
                f"{folder!r} cannot be written to. Offloading to disk needs a folder that can; name another."
            )
        self._work = _Work(os.path.abspath(folder))
        # The threads hold `_work` and not this object, so that it can be collected while they wait for more.
        self._finish = weakref.finalize(self, self._work.finish)
        self._finish.atexit = False

    @property
    def failed(self) -> OSError | None:
        """What went wrong with a write, after which no other is tried."""
        return _fresh(self._work.file.failed)

    def write(self, pieces: Pieces, before: Callable[[], None], then: Then) -> Ticket:
        """Write host memory to disk, in the writer's thread.

        Args:
            pieces: What to write; not to be changed or given back before `then`.
            before: Called first, whatever happens: waits until the bytes are there.
            then: Called last, with None once the bytes are on disk, or with what went wrong. Must not wait for the ticket.
        """
        ticket = Ticket(pieces.nbytes, self._work.file.returned)
        work, reference = self._work, weakref.ref(ticket)
        work.enqueue("writer", lambda: _write(work.file, pieces, reference, before, then))
        return ticket

    def read(self, ticket: Ticket, pieces: Pieces, then: Then) -> None:
        """Read what was written into host memory of the same length, in the reader's thread.

        Args:
            ticket: What `write` gave; if need be, its write is waited for.
            pieces: Where to read to; not to be read or given back before `then`.
            then: Called last, with None once the bytes are there, or with what went wrong: then they are any bytes.
        """
        assert pieces.nbytes == ticket.nbytes, f"{ticket.nbytes} bytes do not go into {pieces.nbytes}"
        work = self._work
        work.enqueue("reader", lambda: _read(work.file, ticket, pieces, then))

    def close(self) -> None:
        """End the threads and give up the file. What is not written yet is not, and its `then` hears so."""
        self._finish()
        self._work.join()


class _Work:
    """The threads of a `DiskFile`, and the file that they share."""

    def __init__(self, folder: str) -> None:
        self.file = _File(folder)
        self._threads: dict[str, tuple[Thread, SimpleQueue[Job | None]]] = {}
        self._running = 0
        self._lock = Lock()

    def enqueue(self, name: str, job: Job) -> None:
        with self._lock:
            if self.file.closed:
                raise ValueError(
                    f"The file for offloading in {self.file.folder} is closed; nothing can be written or read."
                )
            if name not in self._threads:
                jobs: SimpleQueue[Job | None] = SimpleQueue()
                thread = Thread(target=_run, args=(self, jobs), name=f"ckpt_trainer disk {name}", daemon=True)
                thread.start()
                self._running += 1
                self._threads[name] = thread, jobs
            self._threads[name][1].put(job)

    def finish(self) -> None:
        with self._lock:
            self.file.closed = True
            for _, jobs in self._threads.values():
                jobs.put(None)

    def leave(self) -> None:
        """A thread ends; the last one closes the file."""
        with self._lock:
            self._running -= 1
            if not self._running:
                self.file.close()

    def join(self) -> None:
        threads = [thread for thread, _ in self._threads.values()]
        # One of them would wait for itself, or for one that waits for it.
        if current_thread() not in threads:
            for thread in threads:
                thread.join()


class _File:
    """The file itself: written by one thread, read by another."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.closed = False
        self.failed: OSError | None = None
        self.returned: deque[Part] = deque()
        self._descriptor = -1
        self._extents = Extents()

    def write(self, ticket: Ticket, pieces: Pieces) -> None:
        self._check_open()
        if self.failed is not None:
            raise OSError(*self.failed.args)
        try:
            ticket._parts += self._take(ticket.nbytes)
            done = checksum = 0
            for view, offset in _runs(pieces, ticket._parts):
                checksum = crc32(view, checksum)
                self._write_all(view, offset)
                done += len(view)
            getattr(os, "fdatasync", os.fsync)(self._descriptor)
        except OSError as error:
            self.failed = _explained(
                error,
                f"{format_bytes(ticket.nbytes)} could not be written to a file in {self.folder}",
                "Nothing is lost; no more is written there. Free room, or name another folder.",
            )
            raise OSError(*self.failed.args) from None
        # Whoever gave memory back too early may have had it overwritten before it was on disk.
        if done != ticket.nbytes or sum(tensor.numel() for tensor in pieces.tensors) != done:
            raise OSError(errno.EIO, "Host memory was given back while it was written to disk.")
        ticket._checksum = checksum
        self._drop_cache(ticket._parts)

    def read(self, ticket: Ticket, pieces: Pieces) -> None:
        self._check_open()
        parts = tuple(ticket._parts)
        done = checksum = 0
        try:
            for view, offset in _runs(pieces, parts):
                self._read_all(view, offset)
                checksum = crc32(view, checksum)
                done += len(view)
            if done != ticket.nbytes or checksum != ticket._checksum:
                raise OSError(errno.EIO, "it holds other bytes than were written")
        except OSError as error:
            raise _explained(
                error,
                f"{format_bytes(ticket.nbytes)} could not be read back from a file in {self.folder}",
                "They are lost, and this step with them. Check the disk, or offload to the host.",
            ) from None
        self._drop_cache(parts)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _check_open(self) -> None:
        if self.closed:
            raise OSError(errno.EBADF, f"The file in {self.folder} was closed before it was written or read.")

    def _take(self, nbytes: int) -> list[Part]:
        if self._descriptor < 0:
            self._descriptor = _open_without_name(self.folder)
        drain(self.returned, self._extents)
        missing = rounded_up(nbytes) - self._extents.free
        if missing > 0:
            _reserve(self._descriptor, self._extents.length, missing)
            self._extents.grow(missing)
        parts = self._extents.take_parts(nbytes)
        assert parts is not None, "the file has grown by what was missing"
        return parts

    def _write_all(self, view: memoryview, offset: int) -> None:
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            if written <= 0:
                raise OSError(errno.ENOSPC, f"nothing was written at byte {offset}")
            view, offset = view[written:], offset + written

    def _read_all(self, view: memoryview, offset: int) -> None:
        while view:
            if hasattr(os, "preadv"):
                got = os.preadv(self._descriptor, [view], offset)
            else:
                data = os.pread(self._descriptor, len(view), offset)
                got = len(data)
                view[:got] = data
            if got <= 0:
                raise OSError(errno.EIO, f"it ends at byte {offset}")
            view, offset = view[got:], offset + got

    def _drop_cache(self, parts: Sequence[Part]) -> None:
        """Leave no copy in the page cache: it would take the memory that is to be saved, and nobody reads it soon."""
        if hasattr(os, "posix_fadvise"):
            for offset, length in parts:
                with suppress(OSError):  # advice only
                    os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def _run(work: _Work, jobs: SimpleQueue[Job | None]) -> None:
    # No name for a job: it would live, with the memory it owns, until the next one comes.
    while _do(jobs.get()):
        pass
    work.leave()


def _do(job: Job | None) -> bool:
    if job is not None:
        job()
    return job is not None


def _write(file: _File, pieces: Pieces, reference: weakref.ref[Ticket], before: Callable[[], None], then: Then) -> None:
    error = None
    try:
        before()
        ticket = reference()
        if ticket is not None:  # else nobody will ever read it
            file.write(ticket, pieces)
    except Exception as problem:
        error = _plain(problem)
    ticket = reference()
    if ticket is not None:
        ticket._error = _fresh(error)
    _tell(then, error)
    if ticket is not None:
        ticket._done.set()


def _read(file: _File, ticket: Ticket, pieces: Pieces, then: Then) -> None:
    error = None
    try:
        ticket.wait()
        file.read(ticket, pieces)
    except Exception as problem:
        error = _plain(problem)
    _tell(then, error)


def _tell(then: Then, error: OSError | None) -> None:
    try:
        then(error)
    except Exception:
        # The thread goes on: others wait for it.
        logger.exception("What was to follow a write to disk or a read from it failed.")


def _plain(problem: Exception) -> OSError:
    """The same without the frames that it came through, which hold host memory."""
    if isinstance(problem, OSError):
        return OSError(*problem.args)
    return OSError(errno.EIO, f"{type(problem).__name__}: {problem}")


def _explained(error: OSError, found: str, do: str) -> OSError:
    return OSError(error.errno or errno.EIO, f"{found}: {error.strerror or error}. {do}")


def _fresh(error: OSError | None) -> OSError | None:
    """Another one, because one that is raised holds the frames that it comes through."""
    return None if error is None else OSError(*error.args)


def _runs(pieces: Pieces, parts: Sequence[Part]) -> Iterator[tuple[memoryview, int]]:
    """Stretches of host memory that are one stretch of the file, with their offsets there."""
    left = deque(parts)
    for tensor in pieces.tensors:
        view = memoryview(tensor.numpy())  # type: ignore[arg-type]
        while view and left:
            offset, length = left.popleft()
            run = view[: min(length, _CALL_BYTES)]
            yield run, offset
            view = view[len(run) :]
            if length > len(run):
                left.appendleft((offset + len(run), length - len(run)))


def _open_without_name(folder: str) -> int:
    if hasattr(os, "O_TMPFILE"):
        # Not all file systems have it; what else may be wrong shows below.
        with suppress(OSError):
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    descriptor, path = tempfile.mkstemp(prefix="ckpt_trainer-", dir=folder)
    try:
        os.unlink(path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _reserve(descriptor: int, offset: int, length: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, offset, length)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise
