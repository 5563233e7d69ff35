"""Host memory on disk: back come the same bytes or an error, and nothing is left behind."""

import contextlib
import errno
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from ckpt_trainer import disk
from ckpt_trainer.disk import DiskFile
from ckpt_trainer.host_memory import HostPool

KIB, MIB = 2**10, 2**20
UNIT = 4096
TIMEOUT = 60


@pytest.fixture
def pool():
    return HostPool(64 * MIB, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))


@pytest.fixture
def file(tmp_path):
    file = DiskFile(str(tmp_path))
    yield file
    file.close()


@pytest.fixture
def on_proc():
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc")


class Told:
    """A `then` that remembers what it was told."""

    def __init__(self):
        self.errors, self.event = [], threading.Event()

    def __call__(self, error):
        self.errors.append(error)
        self.event.set()

    def wait(self):
        assert self.event.wait(TIMEOUT)
        (error,) = self.errors
        return error


def filled(pool, nbytes, seed=0):
    pieces = pool.take(nbytes)
    content = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    put(pieces, content)
    return pieces, content


def put(pieces, content):
    for tensor, part in zip(pieces.tensors, content.split([tensor.numel() for tensor in pieces.tensors]), strict=True):
        tensor.copy_(part)


def nothing():
    pass


def write(file, pieces, before=nothing):
    told = Told()
    ticket = file.write(pieces, before, told)
    error = told.wait()
    if error:
        with pytest.raises(OSError):
            ticket.wait()
    else:
        ticket.wait()
    return ticket, error


def read(file, ticket, pool):
    pieces, told = pool.take(ticket.nbytes), Told()
    for tensor in pieces.tensors:
        tensor.fill_(7)
    file.read(ticket, pieces, told)
    error = told.wait()
    return error or torch.cat([*pieces.tensors, torch.empty(0, dtype=torch.uint8)])


def descriptors(folder):
    """Open files of this process that lie in a folder, with or without a name."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith(f"{folder}/"):
            found.append(int(name))
    return found


def disk_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ckpt_trainer disk")]


def until(condition):
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
    return True


# --- what is written comes back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, UNIT - 1, UNIT, UNIT + 1, 100_003, 5 * MIB + 17])
def test_bytes_come_back(file, pool, nbytes):
    pieces, content = filled(pool, nbytes)
    ticket, error = write(file, pieces)
    assert error is None
    assert ticket.nbytes == nbytes
    pieces.give_back()
    for _ in range(2):  # any number of times
        assert torch.equal(read(file, ticket, pool), content)


def fragments(pool, length, skip):
    """Pieces that are not in one piece, since every other part of the pool is taken."""
    rest = pool.take(pool.cap - pool.in_use - 2 * length)
    parts = [pool.take(skip) for _ in range(2 * length // skip)]
    for part in parts[::2]:
        part.give_back()
    pieces = pool.take(length)
    assert len(pieces.tensors) == length // skip
    return pieces, (rest, parts)


def test_neither_pieces_nor_parts_of_the_file_need_be_one(file):
    pools = [HostPool(MIB, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8)) for _ in range(2)]
    # The file has holes of 8 KiB; the memory to write is in pieces of 12 KiB, the memory to read in pieces of 20 KiB.
    small = [write(file, filled(pools[0], 8 * KIB, seed)[0])[0] for seed in range(60)]
    del small[::2]
    pieces, _others = fragments(pools[0], 240 * KIB, 12 * KIB)
    content = torch.randint(0, 256, (240 * KIB,), dtype=torch.uint8)
    put(pieces, content)
    ticket, _ = write(file, pieces)
    assert len(ticket._parts) == 30
    target, _more = fragments(pools[1], 240 * KIB, 20 * KIB)
    told = Told()
    file.read(ticket, target, told)
    assert told.wait() is None
    assert torch.equal(torch.cat(target.tensors), content)


@pytest.mark.parametrize("seed", range(4))
def test_random_use_gives_what_was_written(file, pool, seed):
    rng, live = random.Random(seed), []
    for step in range(120):
        if live and rng.random() < 0.4:
            ticket, content = live.pop(rng.randrange(len(live)))
            assert torch.equal(read(file, ticket, pool), content)
            del ticket
        else:
            pieces, content = filled(pool, rng.randint(1, 100 * KIB), step)
            live.append((file.write(pieces, nothing, Told()), content))
            del pieces
    assert all(torch.equal(read(file, ticket, pool), content) for ticket, content in live)


def test_parts_of_the_file_are_used_again(file, pool, tmp_path, on_proc):
    def size():
        (descriptor,) = descriptors(tmp_path)
        return os.fstat(descriptor).st_size

    lengths, rng, most = [rng_length * KIB for rng_length in (40, 12, 100, 8, 60, 33)], random.Random(0), None
    for _ in range(10):
        rng.shuffle(lengths)
        tickets = [write(file, filled(pool, length, seed)[0])[0] for seed, length in enumerate(lengths)]
        most = most or size()
        assert size() == most
        rng.shuffle(tickets)
        while tickets:
            tickets.pop()
    assert most == sum(-(-length // UNIT) * UNIT for length in lengths)


def test_partial_calls_are_continued(file, pool, monkeypatch):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: pwrite(fd, view[:1000], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:1500]], offset))
    pieces, content = filled(pool, 100_003)
    ticket, _ = write(file, pieces)
    assert torch.equal(read(file, ticket, pool), content)


@pytest.mark.parametrize("missing", ["O_TMPFILE", "posix_fallocate", "posix_fadvise", "fdatasync", "preadv", "all"])
def test_what_a_system_lacks_is_done_without(file, pool, tmp_path, monkeypatch, missing):
    names = ["O_TMPFILE", "posix_fallocate", "posix_fadvise", "fdatasync", "preadv"] if missing == "all" else [missing]
    for name in names:
        monkeypatch.delattr(os, name, raising=False)
    pieces, content = filled(pool, 5 * MIB + 3)
    ticket, _ = write(file, pieces)
    assert os.listdir(tmp_path) == []
    assert torch.equal(read(file, ticket, pool), content)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_is_written_to(file, pool, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, "not here")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    monkeypatch.setattr(os, "posix_fadvise", refuse)
    pieces, content = filled(pool, MIB)
    ticket, error = write(file, pieces)
    assert error is None
    assert torch.equal(read(file, ticket, pool), content)


def test_a_file_system_without_nameless_files_has_no_name_left(file, pool, tmp_path, monkeypatch):
    real = os.open
    refused = []

    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            refused.append(path)
            raise OSError(errno.EOPNOTSUPP, "not here")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    pieces, content = filled(pool, MIB)
    ticket, _ = write(file, pieces)
    assert refused == [str(tmp_path)]
    assert os.listdir(tmp_path) == []
    assert torch.equal(read(file, ticket, pool), content)


# --- order ------------------------------------------------------------------------------------------------------------


def test_before_comes_before_the_bytes_are_read_and_then_after_they_are_on_disk(file, pool, monkeypatch):
    seen, release = [], threading.Event()
    pieces, content = filled(pool, MIB)
    sync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (seen.append("sync"), sync(fd))[1])

    def before():
        assert release.wait(TIMEOUT)
        put(pieces, content.flip(0))
        seen.append("before")

    ticket = file.write(pieces, before, lambda error: seen.append(("then", error)))
    assert seen == []
    release.set()
    ticket.wait()
    assert seen == ["before", "sync", ("then", None)]
    assert torch.equal(read(file, ticket, pool), content.flip(0))


def test_room_is_reserved_before_anything_is_written(file, pool, monkeypatch):
    seen = []
    for name in ("posix_fallocate", "pwrite"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, name=name: (seen.append(name), real(*args))[1])
    ticket, _ = write(file, filled(pool, MIB)[0])
    assert seen == ["posix_fallocate", "pwrite"]
    del ticket
    write(file, filled(pool, MIB)[0])
    assert seen == ["posix_fallocate", "pwrite", "pwrite"]


def test_what_is_written_leaves_the_page_cache(file, pool, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *args: seen.append(args))
    ticket, _ = write(file, filled(pool, 5000)[0])
    read(file, ticket, pool)
    assert until(lambda: len(seen) == 2)
    assert seen == [(0, 2 * UNIT, os.POSIX_FADV_DONTNEED)] * 2


def test_a_read_waits_for_its_write(file, pool):
    release, told = threading.Event(), Told()
    pieces, content = filled(pool, MIB)
    ticket = file.write(pieces, lambda: release.wait(TIMEOUT), nothing_told := Told())
    target = pool.take(MIB)
    file.read(ticket, target, told)
    assert not told.event.wait(0.05)
    release.set()
    assert told.wait() is None
    assert nothing_told.wait() is None
    assert torch.equal(torch.cat(target.tensors), content)


def test_a_ticket_waits_until_then_has_run(file, pool):
    pieces, _ = filled(pool, MIB)
    release = threading.Event()

    def then(error):
        assert release.wait(TIMEOUT)
        pieces.give_back()

    ticket = file.write(pieces, nothing, then)
    threading.Timer(0.05, release.set).start()
    ticket.wait()
    assert pool.in_use == 0


def test_what_nobody_will_read_is_not_written_but_waited_for(file, pool, monkeypatch):
    written, seen = [], []
    monkeypatch.setattr(os, "pwrite", lambda *args: written.append(args))
    release = threading.Event()
    told = [Told(), Told()]
    first = file.write(pool.take(0), lambda: release.wait(TIMEOUT), told[0])
    second = file.write(filled(pool, MIB)[0], lambda: seen.append("before"), told[1])
    del second
    release.set()
    first.wait()
    assert told[1].wait() is None
    assert (written, seen) == ([], ["before"])


def test_nothing_is_held_once_it_is_done(file, pool):
    pieces, _ = filled(pool, MIB)
    gone = weakref.ref(pieces)
    ticket = file.write(pieces, nothing, Told())
    del pieces
    ticket.wait()
    assert until(lambda: gone() is None)
    target, told = pool.take(MIB), Told()
    gone, ticket_gone = weakref.ref(target), weakref.ref(ticket)
    file.read(ticket, target, told)
    del target, ticket
    assert told.wait() is None
    assert until(lambda: gone() is None and ticket_gone() is None)
    assert pool.in_use == 0


def test_what_failed_holds_nothing_either(file, pool, monkeypatch):
    monkeypatch.setattr(os, "pwrite", full)
    gc.disable()
    try:
        pieces, _ = filled(pool, MIB)
        gone, told = weakref.ref(pieces), Told()
        ticket = file.write(pieces, nothing, told)
        del pieces
        for _ in range(2):
            with pytest.raises(OSError):
                ticket.wait()
        with pytest.raises(OSError):
            raise told.errors[0]
        assert told.errors[0] is not file.failed
        assert until(lambda: gone() is None)
        assert pool.in_use == 0
    finally:
        gc.enable()


def test_errors_that_were_raised_hold_no_frames(file, pool, monkeypatch):
    monkeypatch.setattr(os, "pwrite", full)
    gone = []

    class Local:
        pass

    def catch(action):
        local = Local()
        gone.append(weakref.ref(local))
        with contextlib.suppress(OSError):
            action()

    def throw(error):
        try:
            raise error
        finally:
            del error

    gc.disable()
    try:
        told = Told()
        ticket = file.write(filled(pool, MIB)[0], nothing, told)
        for _ in range(2):
            catch(ticket.wait)
            catch(lambda: throw(file.failed))
        catch(lambda: throw(told.errors.pop()))
        assert [reference() for reference in gone] == [None] * 5
    finally:
        gc.enable()


# --- errors -----------------------------------------------------------------------------------------------------------


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fdatasync"])
def test_a_full_disk_is_said_and_no_more_is_written(file, pool, tmp_path, monkeypatch, call):
    good, content = filled(pool, MIB, 1)
    kept, _ = write(file, good)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        pieces, same = filled(pool, 2 * MIB, 2)
        _, error = write(file, pieces)
    assert error.errno == errno.ENOSPC
    assert str(error) == (
        f"[Errno {errno.ENOSPC}] 2.00 MiB could not be written to a file in {tmp_path}: No space left on device. "
        "Nothing is lost; no more is written there. Free room, or name another folder."
    )
    assert torch.equal(torch.cat(pieces.tensors), same)
    assert str(file.failed) == str(error)
    # There would be room again, and still nothing is written.
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("written"))
    assert str(write(file, good)[1]) == str(error)
    # What was written before is there.
    assert torch.equal(read(file, kept, pool), content)


def test_a_disk_that_fills_up_halfway_is_said(file, pool, monkeypatch):
    real, calls = os.pwrite, []

    def some(fd, view, offset):
        calls.append(offset)
        return real(fd, view[:5000], offset) if len(calls) < 3 else full()

    monkeypatch.setattr(os, "pwrite", some)
    assert write(file, filled(pool, MIB)[0])[1].errno == errno.ENOSPC
    assert calls == [0, 5000, 10000]


def test_a_disk_that_takes_nothing_is_full(file, pool, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    error = write(file, filled(pool, MIB)[0])[1]
    assert error.errno == errno.ENOSPC
    assert "nothing was written at byte 0" in str(error)


def test_a_failed_write_cannot_be_read(file, pool, monkeypatch):
    monkeypatch.setattr(os, "pwrite", full)
    ticket, error = write(file, filled(pool, MIB)[0])
    assert str(read(file, ticket, pool)) == str(error)


@pytest.mark.parametrize("length", [0, 1, MIB // 2, MIB - 1])
def test_a_file_that_was_cut_short_is_an_error(file, pool, tmp_path, on_proc, length):
    ticket, _ = write(file, filled(pool, MIB)[0])
    (descriptor,) = descriptors(tmp_path)
    os.truncate(f"/proc/self/fd/{descriptor}", length)
    error = read(file, ticket, pool)
    assert error.errno == errno.EIO
    assert f"it ends at byte {length}" in str(error)
    assert f"1.00 MiB could not be read back from a file in {tmp_path}" in str(error)


@pytest.mark.parametrize("position", [0, 1, 500_000, MIB - 1])
def test_a_byte_that_changed_is_an_error(file, pool, tmp_path, on_proc, position):
    ticket, _ = write(file, filled(pool, MIB)[0])
    (descriptor,) = descriptors(tmp_path)
    (byte,) = os.pread(descriptor, 1, position)
    os.pwrite(descriptor, bytes([byte ^ 1]), position)
    error = read(file, ticket, pool)
    assert error.errno == errno.EIO
    assert "it holds other bytes than were written" in str(error)


def test_a_hole_is_an_error_and_what_was_written_after_it_is_not(file, pool, tmp_path, on_proc):
    first, _ = write(file, filled(pool, MIB, 1)[0])
    (descriptor,) = descriptors(tmp_path)
    os.truncate(f"/proc/self/fd/{descriptor}", 5000)
    pieces, content = filled(pool, MIB, 2)
    second, _ = write(file, pieces)
    assert os.fstat(descriptor).st_size == 2 * MIB
    assert "it holds other bytes than were written" in str(read(file, first, pool))
    assert torch.equal(read(file, second, pool), content)


def test_a_part_that_another_write_took_is_an_error(file, pool):
    first, _ = write(file, filled(pool, MIB, 1)[0])
    parts = list(first._parts)
    first.give_back()
    second, _ = write(file, filled(pool, MIB, 2)[0])
    assert second._parts == parts
    assert "other bytes" in str(read(file, first, pool))
    first._parts += parts
    assert "other bytes" in str(read(file, first, pool))
    first._parts.clear()


def test_nothing_is_not_taken_for_bytes_whose_checksum_is_that_of_nothing(file, pool):
    pieces = pool.take(4)
    put(pieces, torch.tensor([0x9D, 0x0A, 0xD9, 0x6D], dtype=torch.uint8))
    ticket, _ = write(file, pieces)
    assert ticket._checksum == 0
    ticket.give_back()
    assert "other bytes" in str(read(file, ticket, pool))


def test_memory_that_was_given_back_too_early_is_an_error(file, pool, monkeypatch):
    real, pieces = os.fdatasync, filled(pool, MIB)[0]
    monkeypatch.setattr(os, "fdatasync", lambda fd: (pieces.give_back(), real(fd))[1])
    error = write(file, pieces)[1]
    assert "given back while it was written" in str(error)
    assert file.failed is None
    early, _ = filled(pool, MIB)
    early.give_back()
    assert "given back" in str(write(file, early)[1])


def test_a_wait_that_fails_is_an_error_of_this_write_only(file, pool):
    def before():
        raise RuntimeError("the device is gone")

    error = write(file, filled(pool, MIB)[0], before)[1]
    assert isinstance(error, OSError)
    assert "RuntimeError: the device is gone" in str(error)
    assert file.failed is None
    assert write(file, filled(pool, MIB)[0])[1] is None


def test_a_then_that_fails_is_logged_and_the_thread_goes_on(file, pool, caplog):
    def then(error):
        raise KeyError("oh")

    ticket = file.write(filled(pool, MIB)[0], nothing, then)
    ticket.wait()
    assert "KeyError: 'oh'" in caplog.text
    file.read(ticket, pool.take(MIB), then)
    assert write(file, filled(pool, MIB)[0])[1] is None


def test_other_lengths_are_refused(file, pool):
    ticket, _ = write(file, filled(pool, MIB)[0])
    with pytest.raises(AssertionError):
        file.read(ticket, pool.take(MIB + 1), Told())


def test_a_folder_has_to_be_there_and_writable(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is not a folder"):
        DiskFile(str(tmp_path / "missing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a folder"):
        DiskFile(str(tmp_path / "file"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(ValueError, match="cannot be written to"):
            DiskFile(str(tmp_path))
    monkeypatch.delattr(os, "pwrite")
    with pytest.raises(ValueError, match="no pwrite"):
        DiskFile(str(tmp_path))


def test_a_folder_that_went_away_is_said_by_the_write(pool, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    file = DiskFile(str(folder))
    folder.rmdir()
    assert write(file, filled(pool, MIB)[0])[1].errno == errno.ENOENT
    file.close()


def test_another_working_folder_does_not_matter(pool, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    file = DiskFile("folder")
    monkeypatch.chdir("/")
    assert write(file, filled(pool, MIB)[0])[1] is None
    file.close()


# --- nothing is left --------------------------------------------------------------------------------------------------


def test_nothing_begins_before_it_is_needed(file, pool, tmp_path, on_proc):
    assert disk_threads() == []
    assert descriptors(tmp_path) == []
    ticket, _ = write(file, filled(pool, MIB)[0])
    (writer,) = disk_threads()
    assert writer.daemon
    assert len(descriptors(tmp_path)) == 1
    read(file, ticket, pool)
    assert len(disk_threads()) == 2
    assert all(thread.daemon for thread in disk_threads())
    assert len(descriptors(tmp_path)) == 1
    assert os.listdir(tmp_path) == []


def test_a_closed_file_has_no_threads_and_no_descriptor(pool, tmp_path, on_proc):
    file = DiskFile(str(tmp_path))
    ticket, _ = write(file, filled(pool, MIB)[0])
    read(file, ticket, pool)
    file.close()
    file.close()
    assert disk_threads() == []
    assert descriptors(tmp_path) == []
    with pytest.raises(ValueError, match="is closed"):
        file.write(pool.take(1), nothing, Told())
    with pytest.raises(ValueError, match="is closed"):
        file.read(ticket, pool.take(MIB), Told())


def test_an_unused_file_is_closed(pool, tmp_path):
    file = DiskFile(str(tmp_path))
    file.close()
    with pytest.raises(ValueError, match="is closed"):
        file.write(pool.take(1), nothing, Told())


@pytest.mark.parametrize("reads", [False, True])
def test_a_collected_file_has_no_threads_and_no_descriptor(pool, tmp_path, on_proc, reads):
    gc.disable()
    try:
        file = DiskFile(str(tmp_path))
        ticket, _ = write(file, filled(pool, MIB)[0])
        if reads:
            read(file, ticket, pool)
        del file
        assert until(lambda: disk_threads() == [] and descriptors(tmp_path) == [])
    finally:
        gc.enable()
    ticket.give_back()


def test_closing_tells_those_who_wait(pool, tmp_path):
    file, release = DiskFile(str(tmp_path)), threading.Event()
    told = [Told() for _ in range(4)]
    first = file.write(filled(pool, MIB)[0], lambda: release.wait(TIMEOUT), told[0])
    second = file.write(filled(pool, MIB)[0], nothing, told[1])
    file.read(first, pool.take(MIB), told[2])
    file.read(second, pool.take(MIB), told[3])
    closing = threading.Thread(target=file.close)
    closing.start()
    assert until(lambda: file._work.file.closed)
    release.set()
    closing.join(TIMEOUT)
    assert not closing.is_alive()
    assert [error.wait().errno for error in told] == [errno.EBADF] * 4
    for ticket in (first, second):
        with pytest.raises(OSError):
            ticket.wait()
    assert file.failed is None


def test_a_read_that_comes_after_closing_is_told(pool, tmp_path):
    file, entered, release = DiskFile(str(tmp_path)), threading.Event(), threading.Event()
    ticket, _ = write(file, filled(pool, MIB)[0])
    file.read(ticket, pool.take(MIB), lambda error: (entered.set(), release.wait(TIMEOUT)))
    told = Told()
    file.read(ticket, pool.take(MIB), told)
    assert entered.wait(TIMEOUT)
    closing = threading.Thread(target=file.close)
    closing.start()
    assert until(lambda: file._work.file.closed)
    release.set()
    assert told.wait().errno == errno.EBADF
    closing.join(TIMEOUT)
    assert not closing.is_alive()


def test_a_thread_of_the_file_may_close_it(pool, tmp_path, caplog):
    file, release, told = DiskFile(str(tmp_path)), threading.Event(), Told()
    ticket = file.write(filled(pool, MIB)[0], lambda: release.wait(TIMEOUT), lambda error: file.close())
    file.read(ticket, pool.take(MIB), told)  # waits for a write that waits for the reader if `close` does
    release.set()
    assert told.wait().errno == errno.EBADF
    assert until(lambda: disk_threads() == [])
    assert caplog.text == ""


def test_many_files_leave_nothing(pool, tmp_path, on_proc):
    for _ in range(30):
        file = DiskFile(str(tmp_path))
        ticket, _ = write(file, filled(pool, 10_000)[0])
        assert isinstance(read(file, ticket, pool), torch.Tensor)
        file.close()
    assert descriptors(tmp_path) == []
    assert disk_threads() == []


CHILD = """
import os, resource, signal, sys, threading, types
import torch
# Without what the package itself imports, which takes seconds.
sys.modules["ckpt_trainer"] = types.ModuleType("ckpt_trainer")
sys.modules["ckpt_trainer"].__path__ = [sys.argv[2]]
from ckpt_trainer.disk import DiskFile
from ckpt_trainer.host_memory import HostPool
pool = HostPool(2**24, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
kept = []
def spill(file):
    pieces = pool.take(2**20)
    pieces.tensors[0].fill_(3)
    kept.append(file.write(pieces, lambda: None, lambda error: None))
file = DiskFile(sys.argv[1])
"""


def child(text, folder):
    command = [sys.executable, "-c", CHILD + text, str(folder), str(Path(disk.__file__).parent)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.distributed
def test_a_killed_process_leaves_nothing(tmp_path):
    text = """
spill(file)
kept[-1].wait()
if hasattr(os, "O_TMPFILE"):
    del os.O_TMPFILE
other = DiskFile(sys.argv[1])  # made with a name
spill(other)
kept[-1].wait()
print("written", flush=True)
while True:
    spill(file), spill(other), kept.pop(0).wait(), kept.pop(0).wait()
"""
    with child(text, tmp_path) as process:
        assert process.stdout.readline() == "written\n"
        assert os.listdir(tmp_path) == []
        if Path(f"/proc/{process.pid}/fd").is_dir():
            links = [os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
            assert sum(link.startswith(f"{tmp_path}/") for link in links) == 2
        process.send_signal(signal.SIGKILL)
        assert process.wait(TIMEOUT) == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


@pytest.mark.distributed
def test_a_limit_of_the_file_size_is_said_and_what_is_there_stays(tmp_path):
    pytest.importorskip("resource")
    text = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 2**19, unlimited[1]))
for _ in range(3):
    spill(file)
for ticket in kept:
    try:
        ticket.wait(); print("written")
    except OSError as error:
        print(error.errno, "could not be written" in str(error))
for ticket in kept[:2]:
    pieces, done = pool.take(2**20), threading.Event()
    file.read(ticket, pieces, lambda error: (print(error), done.set()))
    done.wait()
    print(bool((pieces.tensors[0] == 3).all()))
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
other = DiskFile(sys.argv[1])
for _ in range(8):
    spill(other)  # and end in the middle of it
"""
    with child(text, tmp_path) as process:
        out, _ = process.communicate(timeout=TIMEOUT)
    assert out.splitlines() == ["written", "written", f"{errno.EFBIG} True", "None", "True", "None", "True"]
    assert process.returncode == 0
    assert os.listdir(tmp_path) == []
