"""What goes to disk and comes back, and when: with a disk that the test steps, with exact counts, and with threads."""

import errno
import gc
import random
import threading
import time
import weakref
from collections import deque
from functools import partial

import pytest
import torch

from ckpt_trainer import host_store
from ckpt_trainer.disk import Ticket
from ckpt_trainer.host_memory import HostPool
from ckpt_trainer.host_store import HostStore

UNIT = 4096
TIMEOUT = 30
FULL = OSError(errno.ENOSPC, "4.00 KiB could not be written to a file in /there: No space left on device.")
BROKEN = OSError(errno.EIO, "4.00 KiB could not be read back from a file in /there: it ends at byte 0.")


class Job:
    """A write or a read that was asked for; ends when the test, or who waits for it, says so."""

    def __init__(self, disk, kind, pieces, ticket, before, then):
        self.disk, self.kind = disk, kind
        self.pieces, self.ticket, self.before, self.then = pieces, ticket, before, then

    def end(self, error=None):
        jobs = self.disk.writes if self.kind == "write" else self.disk.reads
        assert jobs.popleft() is self
        try:
            self.before()
            error = error or (self.write if self.kind == "write" else self.read)()
        except RuntimeError as problem:
            error = OSError(errno.EIO, str(problem))
        ticket = self.ticket()
        if self.kind == "write" and ticket is not None:
            ticket._error = error
        self.then(error)
        if self.kind == "write" and ticket is not None:
            ticket._done.set()
        self.pieces = self.then = self.before = None

    def write(self):
        if self.ticket() is not None:
            self.disk.failed = self.disk.failing
        if self.disk.failed is None and self.ticket() is not None:
            self.ticket().bytes = torch.cat(self.pieces.tensors)
            self.disk.written.append(int(self.ticket().bytes[0]))
        return self.disk.failed

    def read(self):
        self.disk.read_back.append(int(self.ticket().bytes[0]))
        parts = self.ticket().bytes.split([tensor.numel() for tensor in self.pieces.tensors])
        for tensor, part in zip(self.pieces.tensors, parts, strict=True):
            tensor.copy_(part)


class SteppedTicket(Ticket):
    __slots__ = ("bytes", "disk")

    def wait(self):
        self.disk.waits += 1
        while not self.disk.holds_writes and not self._done.is_set():
            self.disk.writes[0].end()
        assert self._done.wait(TIMEOUT)
        if self._error is not None:
            raise OSError(*self._error.args)


class SteppedDisk:
    """In place of `DiskFile`. Reads end at once, writes when they are waited for, unless they are held.

    Attributes:
        written: First byte of what was written, in order; `read_back` likewise.
        waits: How often a ticket was waited for.
    """

    def __init__(self, folder):
        self.folder = folder
        self.failed = self.failing = None
        self.holds_reads = self.holds_writes = False
        self.writes, self.reads = deque(), deque()
        self.written, self.read_back, self.waits = [], [], 0
        self.tickets = weakref.WeakSet()

    def write(self, pieces, before, then):
        ticket = SteppedTicket(pieces.nbytes, deque())
        ticket.disk = self
        self.tickets.add(ticket)
        self.writes.append(Job(self, "write", pieces, weakref.ref(ticket), before, then))
        return ticket

    def read(self, ticket, pieces, then):
        assert pieces.nbytes == ticket.nbytes
        assert ticket._done.is_set()
        self.reads.append(Job(self, "read", pieces, lambda: ticket, lambda: None, then))
        if not self.holds_reads:
            self.reads[0].end()

    def end_writes(self):
        while self.writes:
            self.writes[0].end()

    def fail(self, error=FULL):
        """The next write fails, and so do all after it."""
        self.failing = error


class Host:
    """A store of so many units, and what a device does with it.

    Attributes:
        log: The copies that the host waited for, in order.
    """

    def __init__(self, units, folder="/there"):
        self.pool = HostPool(units * UNIT, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
        self.store = HostStore(self.pool, folder)
        self.disk = self.store._disk
        self.log = []

    def put(self, value, units=1, to_disk=True):
        """A slot that holds bytes of this value, or None."""
        slot = self.store.put(units * UNIT, to_disk)
        if slot is not None:
            for tensor in slot.pieces.tensors:
                tensor.fill_(value)
            self.store.copied(slot, partial(self.log.append, f"out {value}"))
        return slot

    def get(self, slot):
        """The value that all bytes of a slot have."""
        loan = self.store.fetch(slot)
        (value,) = torch.cat(loan.tensors).unique().tolist()
        slot.read = partial(self.log.append, f"in {value}")
        return value

    def fill(self, number, **options):
        return [self.put(value, **options) for value in range(number)]

    @property
    def counts(self):
        report = self.store.report()
        return report["bytes_written"] / UNIT, report["bytes_read"] / UNIT

    @property
    def in_use(self):
        return self.pool.in_use // UNIT


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setattr(host_store, "DiskFile", SteppedDisk)
    return Host


class Running(threading.Thread):
    """Something in a thread of its own."""

    def __init__(self, function, *args):
        super().__init__(daemon=True)
        self.function, self.args, self.result, self.error = function, args, None, None
        self.start()

    def run(self):
        try:
            self.result = self.function(*self.args)
        except Exception as error:
            self.error = error

    def end(self):
        self.join(TIMEOUT)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.result


def until(condition):
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def in_memory(slots):
    return [number for number, slot in enumerate(slots) if slot.pieces is not None]


# --- without a disk ---------------------------------------------------------------------------------------------------


def test_without_a_folder_there_is_memory_only():
    host = Host(3, folder=None)
    slots = host.fill(4, to_disk=True)
    assert slots[3] is None
    assert [host.get(slot) for slot in slots[:3]] == [0, 1, 2]
    host.store.fetch_ahead(slots[0])
    assert host.store.report() == {"bytes_written": 0, "bytes_read": 0, "waited_seconds": 0.0}
    del slots
    assert (host.in_use, host.log, len(host.store._gone)) == (0, [], 0)


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        HostStore(HostPool(UNIT, torch.empty), str(tmp_path / "missing"))


# --- to disk ----------------------------------------------------------------------------------------------------------


def test_the_earliest_are_written_once_half_of_the_memory_is_in_use(host):
    host = host(8)
    slots = host.fill(4)
    assert len(host.disk.writes) == 0
    for number in range(4, 8):
        slots.append(host.put(number))
        assert len(host.disk.writes) == number - 3
    assert (host.log, host.disk.waits) == ([], 0)
    host.disk.end_writes()
    assert host.disk.written == [0, 1, 2, 3]
    assert host.log == ["out 0", "out 1", "out 2", "out 3"]  # each copy is over before it is written
    assert [slot.on_disk for slot in slots] == [True] * 4 + [False] * 4
    assert in_memory(slots) == list(range(8))
    assert host.counts == (4, 0)


def test_nothing_is_written_before_its_copy_has_begun(host):
    host = host(4)
    slots = [host.store.put(UNIT, True) for _ in range(4)]
    assert len(host.disk.writes) == 0
    assert host.store.put(UNIT, True) is None
    assert (len(host.disk.writes), in_memory(slots)) == (0, [0, 1, 2, 3])
    host.store.copied(slots[2], partial(host.log.append, "out"))
    assert len(host.disk.writes) == 1  # it alone may go
    assert host.put(9) is not None
    assert (in_memory(slots), host.log) == ([0, 1, 3], ["out"])


def test_what_does_not_fit_pushes_the_earliest_out(host):
    host = host(4)
    slots = host.fill(10)
    assert in_memory(slots) == [6, 7, 8, 9]
    assert host.disk.written == [0, 1, 2, 3, 4, 5]
    assert host.disk.waits == 6
    assert [slot.ticket is not None for slot in slots[6:]] == [True, True, False, False]
    assert [len(slot.pieces.tensors) for slot in slots[6:]] == [1] * 4
    assert [host.get(slot) for slot in slots] == list(range(10))
    assert (host.in_use, host.pool.peak) == (4, 4 * UNIT)


def test_room_is_free_at_once_though_the_writer_may_still_have_it(host):
    host = host(2)
    slots = host.fill(2)
    held = [slot.pieces for slot in slots]
    slots.append(host.put(2))
    assert in_memory(slots) == [1, 2]
    assert [piece.tensors == () for piece in held] == [True, False]


def test_room_is_made_for_a_large_one_by_several(host):
    host = host(6)
    slots = host.fill(6)
    large = host.put(9, units=5)
    assert in_memory(slots) == [5]
    assert host.get(large) == 9
    assert [host.get(slot) for slot in slots] == list(range(6))
    assert host.get(large) == 9


def test_nothing_is_pushed_out_in_vain(host):
    host = host(4)
    stays, slots = host.put(8, units=2, to_disk=False), host.fill(2)
    assert host.put(9, units=3) is None
    assert host.put(9, units=3, to_disk=False) is None
    assert host.put(9, units=5) is None
    assert (in_memory(slots), host.disk.waits, host.get(stays)) == ([0, 1], 0, 8)
    held = [host.store.fetch(slot) for slot in slots]
    assert host.put(9) is None
    assert (in_memory(slots), host.disk.waits, len(held)) == ([0, 1], 0, 2)
    del held[1], stays
    assert host.put(9, units=4) is None  # one is in use
    assert (in_memory(slots), host.disk.waits) == ([0, 1], 0)
    assert host.put(9, units=3) is not None
    assert (in_memory(slots), host.disk.waits) == ([0], 1)


def test_what_left_once_is_not_written_again(host):
    host = host(2)
    slots = host.fill(3)
    for _ in range(3):
        assert [host.get(slot) for slot in slots] == [0, 1, 2]
    # Two take turns in the room of one, and the third one stays.
    assert (host.disk.written, host.disk.read_back) == ([0, 1], [0, 1] * 3)
    assert host.counts == (2, 6)


def test_what_is_on_its_way_to_disk_leaves_before_another_is_written(host):
    host = host(4)
    late = host.store.put(UNIT, True)
    slots = [host.put(number) for number in range(1, 4)]
    host.store.copied(late, lambda: None)
    assert host.store.put(UNIT, True) is not None
    assert (in_memory(slots), late.ticket) == ([1, 2], None)


def test_those_on_disk_leave_before_others_are_written(host):
    host = host(4)
    slots = host.fill(4)  # half of them are written
    assert host.get(slots[3]) == 3
    slots += [host.put(4), host.put(5)]
    assert host.disk.written == [0, 1]
    assert in_memory(slots) == [2, 3, 4, 5]
    assert host.get(slots[0]) == 0  # pushes 2 out, which was on its way
    assert host.disk.written == [0, 1, 2]
    assert host.put(6) is not None  # pushes out the one of those on disk that is free
    assert in_memory(slots) == [3, 4, 5]


# --- host and disk ----------------------------------------------------------------------------------------------------


def test_what_may_not_go_on_never_does(host):
    host = host(8)
    stay, go = [], []
    for number in range(4):
        stay.append(host.put(number, to_disk=False))
        go += [host.put(10 + number), host.put(20 + number)]
    assert [slot.to_disk for slot in stay] == [False] * 4
    assert in_memory(stay) == [0, 1, 2, 3]
    assert set(host.disk.written) <= {10, 11, 12, 13, 20, 21, 22, 23}
    assert [host.get(slot) for slot in stay] == [0, 1, 2, 3]
    assert [host.get(slot) for slot in go] == [10, 20, 11, 21, 12, 22, 13, 23]
    assert in_memory(stay) == [0, 1, 2, 3]
    assert (len(stay[0].__dict__), stay[0].ticket) == (len(go[0].__dict__), None)


def test_what_may_not_go_on_leaves_room_for_what_has_to_come_back(host):
    host = host(6)
    large = host.put(9, units=3)
    stay = host.fill(6, to_disk=False)
    assert [slot is not None for slot in stay] == [True] * 3 + [False] * 3
    assert large.pieces is not None
    more = [host.put(7), host.put(8)]
    assert (large.pieces, [slot is None for slot in more]) == (None, [False, False])
    assert [host.get(slot) for slot in (large, *more, *stay[:3])] == [9, 7, 8, 0, 1, 2]
    # When one of them is gone there is room for another.
    stay[0] = None
    stay[0] = host.put(5, to_disk=False)
    assert stay[0] is not None
    assert host.put(6, to_disk=False) is None
    assert host.get(large) == 9


def test_what_never_could_come_back_does_not_go(host):
    host = host(4)
    stay = host.fill(2, to_disk=False)
    assert host.put(9, units=3) is None
    # Nor is room kept for it.
    stay += [host.put(2, to_disk=False), host.put(3, to_disk=False)]
    assert in_memory(stay) == [0, 1, 2, 3]


def test_what_the_system_refuses_cannot_be_reserved(host):
    host, granted = host(6), []

    def allocate(nbytes):
        if sum(granted) + nbytes > 4 * UNIT:
            raise RuntimeError("no more")
        granted.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    host.pool._allocate = allocate
    large = host.put(9, units=2)
    stay = host.fill(4, to_disk=False)
    assert [slot is not None for slot in stay] == [True, True, False, False]
    assert host.pool.refused == "no more"
    more = host.put(8, units=2)
    assert [host.get(slot) for slot in (large, more, large)] == [9, 8, 9]
    assert host.put(7, units=3) is None


def test_room_that_was_not_had_is_not_reserved(host):
    host = host(5)
    bad = host.store.put(2 * UNIT, True)
    host.store.copied(bad, broken_device)
    good = host.put(1, units=2)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="the device is gone"):
            host.put(2, units=2, to_disk=False)
    loans = host.store.fetch(bad), host.store.fetch(good)
    assert host.put(2, units=2, to_disk=False) is None
    assert (host.store._staying, len(loans)) == (0, 2)


# --- back -------------------------------------------------------------------------------------------------------------


def test_what_is_in_memory_is_not_read(host):
    host = host(4)
    slots = host.fill(4)
    assert [host.get(slot) for slot in slots] == [0, 1, 2, 3]
    assert host.counts[1] == 0
    slots += [host.put(4)]
    assert host.get(slots[0]) == host.get(slots[0]) == 0
    assert host.disk.read_back == [0]
    assert host.counts[1] == 1


def test_what_is_read_ahead_is_read_once(host):
    host = host(4)
    slots = host.fill(7)
    host.store.fetch_ahead(slots[0])
    assert host.disk.read_back == []  # no room
    del slots[5:]
    for slot in (slots[0], slots[0], slots[1], slots[2], slots[3], slots[4]):
        host.store.fetch_ahead(slot)
    assert host.disk.read_back == [0, 1]
    assert [host.get(slot) for slot in slots[:2]] == [0, 1]
    assert host.disk.read_back == [0, 1]


def test_the_host_waits_for_what_is_on_its_way_back(host):
    host = host(2)
    slots = host.fill(4)
    del slots[2:]
    host.disk.end_writes()
    host.disk.holds_reads = True
    host.store.fetch_ahead(slots[1])
    first, second = Running(host.get, slots[1]), Running(host.get, slots[0])
    until(lambda: len(host.disk.reads) == 2)
    assert (first.is_alive(), second.is_alive(), host.counts[1]) == (True, True, 0)
    host.disk.reads[0].end()
    assert first.end() == 1
    assert second.is_alive()
    host.disk.reads[0].end()
    assert (second.end(), host.counts[1]) == (0, 2)


def test_what_is_needed_now_takes_the_room_of_what_was_read_ahead(host):
    host = host(2)
    slots = host.fill(6)
    del slots[4:]
    host.disk.end_writes()
    for slot in slots[2:]:
        host.store.fetch_ahead(slot)
    assert host.disk.read_back == [2, 3]
    assert host.get(slots[0]) == 0
    assert (in_memory(slots), host.disk.read_back) == ([0, 3], [2, 3, 0])  # what backward needs later goes first
    assert host.get(slots[1]) == 1
    assert in_memory(slots) == [1, 3]  # and what was used before that
    assert host.put(9) is not None
    assert in_memory(slots) == [3]
    assert host.put(8) is not None
    assert (in_memory(slots), host.get(slots[3])) == ([3], 3)
    assert host.disk.read_back == [2, 3, 0, 1]


def test_what_was_read_ahead_stays_while_others_can_go(host):
    host = host(2)
    slots = host.fill(6)
    del slots[4:]
    host.disk.end_writes()
    assert [host.get(slots[number]) for number in (1, 2, 3)] == [1, 2, 3]
    host.put(9)  # takes the room of 2, and gives it back
    host.disk.end_writes()
    host.disk.read_back.clear()
    host.store.fetch_ahead(slots[1])
    assert host.get(slots[2]) == 2
    assert (in_memory(slots), host.get(slots[1])) == ([1, 2], 1)
    assert host.disk.read_back == [1, 2]


def test_memory_that_is_read_to_is_not_given_to_others_before_the_end(host):
    host = host(1)
    slots = host.fill(3)
    del slots[2]
    host.disk.end_writes()
    host.disk.holds_reads = True
    host.store.fetch_ahead(slots[0])
    other = Running(host.get, slots[1])
    time.sleep(0.02)
    assert (len(host.disk.reads), slots[0].pieces is None) == (1, False)
    host.disk.reads[0].end()
    until(lambda: host.disk.reads)
    assert slots[0].pieces is None
    host.disk.reads[0].end()
    assert other.end() == 1


# --- nobody takes what another one uses ---------------------------------------------------------------------------------


def test_what_is_about_to_be_copied_does_not_leave(host):
    host = host(2)
    slots = host.fill(2)
    loan = host.store.fetch(slots[0])
    more = [host.put(2)]
    assert in_memory(slots) == [0]
    assert host.put(3) is not None  # pushes 2 out, which is gone by then or not
    loans = loan, host.store.fetch(more[0])
    assert host.put(4) is None
    assert torch.cat(loan.tensors).unique().tolist() == [0]
    del loan, loans
    assert host.put(5) is not None
    assert in_memory(slots) == []


def test_a_copy_from_memory_is_over_before_it_is_given_away(host):
    host = host(1)
    slots = host.fill(2)
    assert [host.get(slot) for slot in slots] == [0, 1]
    assert host.log == ["out 0", "out 1", "in 0"]
    host.get(slots[0])
    assert host.log == ["out 0", "out 1", "in 0", "in 1"]


def test_a_loan_that_came_to_nothing_ends_with_its_frame(host):
    host = host(1)
    slots = host.fill(2)

    def fails():
        loan = host.store.fetch(slots[1])
        raise MemoryError(loan)

    with pytest.raises(MemoryError) as caught:
        fails()
    assert (host.store.put(UNIT, True), host.store.put(UNIT, False)) == (None, None)
    del caught
    gc.collect()
    assert host.get(slots[0]) == 0


def test_what_another_thread_is_about_to_copy_is_waited_for(host):
    host = host(1)
    slots = host.fill(2)
    loan = host.store.fetch(slots[1])
    other = Running(host.get, slots[0])
    time.sleep(0.02)
    assert (other.is_alive(), slots[1].pieces is None) == (True, False)
    slots[1].read = partial(host.log.append, "in 1")
    del loan
    assert other.end() == 0
    assert host.log[-1] == "in 1"
    assert host.get(slots[1]) == 1


def test_what_was_used_again_while_it_was_about_to_leave_stays(host):
    host = host(2)
    slots = host.fill(2)
    host.disk.holds_writes = True
    other = Running(host.put, 2)
    until(lambda: host.disk.waits)
    assert host.get(slots[0]) == 0  # a copy that who waits for the write does not know of
    copy, slots[0].read = threading.Event(), lambda: copy.wait(TIMEOUT)
    host.disk.writes[0].end()
    time.sleep(0.02)
    assert (other.is_alive(), in_memory(slots)) == (True, [0, 1])
    copy.set()
    assert other.end() is not None
    assert in_memory(slots) == [1]


def test_what_another_thread_asked_for_while_it_was_about_to_leave_stays(host):
    host = host(2)
    slots = host.fill(2)
    host.disk.holds_writes = True
    other = Running(host.put, 2)
    until(lambda: host.disk.waits)
    loan = host.store.fetch(slots[0])
    host.disk.writes[0].end()
    until(lambda: host.disk.waits == 2)  # for the next one
    assert torch.cat(loan.tensors).unique().tolist() == [0]
    host.disk.writes[0].end()
    assert other.end() is not None
    assert in_memory(slots) == [0]


def test_two_threads_that_make_room_by_the_same_slot(host):
    host = host(4)
    slots = host.fill(4)
    host.disk.holds_writes = True
    others = [Running(host.put, number) for number in (4, 5)]
    until(lambda: host.disk.waits == 2)
    for _ in range(2):
        host.disk.writes[0].end()
    until(lambda: not any(other.is_alive() for other in others) or len(host.disk.writes) > 1)
    host.disk.holds_writes = False
    host.disk.end_writes()
    slots += [other.end() for other in others]
    assert in_memory(slots) == [2, 3, 4, 5]
    assert [host.get(slot) for slot in slots] == [0, 1, 2, 3, 4, 5]


def test_the_lock_is_free_while_the_disk_is_waited_for(host):
    host = host(4)
    slots = host.fill(6)
    host.disk.holds_writes = host.disk.holds_reads = True
    reader = Running(host.get, slots[0])
    until(lambda: host.disk.waits > 2)
    assert host.get(slots[5]) == 5  # in memory, so nothing has to be waited for
    host.disk.end_writes()
    until(lambda: host.disk.reads)
    assert host.get(slots[4]) == 4
    host.disk.reads[0].end()
    assert reader.end() == 0


# --- slots that are gone ----------------------------------------------------------------------------------------------


def test_a_slot_that_is_gone_leaves_nothing(host):
    host = host(4)
    slots = host.fill(9)
    host.get(slots[0])
    host.store.fetch_ahead(slots[1])
    del slots
    host.disk.end_writes()
    assert (host.in_use, len(host.disk.tickets)) == (0, 0)
    stays = host.put(1, to_disk=False)
    assert (host.store._in_memory, host.store._staying, len(host.store._gone)) == ({}, UNIT, 0)
    del stays
    host.store.put(UNIT, True)
    assert (host.store._staying, host.store._gone[0].wait) == (0, None)


def test_a_slot_that_is_gone_before_its_turn_is_not_written(host):
    host = host(4)
    slots = host.fill(4)
    assert len(host.disk.writes) == 2
    written = slots[1].nbytes
    del slots[0]
    assert host.in_use == 4  # as long as it may be written
    host.disk.end_writes()
    assert host.in_use == 3
    assert (host.disk.written, host.store.report()["bytes_written"]) == ([1], written)


def test_memory_that_is_written_is_not_given_to_others_before_the_end(host):
    host = host(2)
    host.disk.holds_writes = True
    slots = host.fill(2)
    loan = host.store.fetch(slots[1])
    del slots[0]
    assert (len(host.disk.writes), host.in_use, host.store.put(UNIT, True)) == (1, 2, None)
    host.disk.end_writes()
    assert (host.in_use, len(loan.tensors)) == (1, 1)
    assert host.store.put(UNIT, True) is not None


def test_memory_of_one_that_is_gone_but_still_written_is_waited_for(host):
    host = host(1)
    slots = host.fill(2)
    host.disk.writes.clear()
    host.disk.holds_writes = True
    host.store._write(slots[1])
    del slots[1]
    reader = Running(host.get, slots[0])
    time.sleep(0.02)
    assert reader.is_alive()
    host.disk.writes[0].end()
    assert reader.end() == 0


def test_a_slot_that_is_gone_while_it_is_read(host):
    host = host(1)
    slots = host.fill(2)
    del slots[1]
    host.disk.end_writes()
    host.disk.holds_reads = True
    host.store.fetch_ahead(slots[0])
    del slots
    assert (host.in_use, host.store.put(UNIT, True)) == (1, None)
    host.disk.reads[0].end()
    assert (host.in_use, len(host.disk.tickets)) == (0, 0)
    assert host.put(3) is not None


class Order:
    """Notes when the disk reads to memory, beside the copies that were waited for."""

    def __init__(self, host):
        self.host, read = host, host.disk.read
        host.disk.read = lambda *args: (host.log.append("read"), read(*args))


def test_copies_of_slots_that_are_gone_are_over_before_the_disk_writes_to_memory(host):
    host = host(4)
    slots = host.fill(8)
    Order(host)
    host.log.clear()
    host.get(slots[7])
    del slots[6:]
    host.store.fetch_ahead(slots[0])
    assert sorted(host.log[:2]) == ["in 7", "out 6"]
    assert host.log[2:] == ["read"]
    host.get(slots[1])
    assert host.log[3:] == ["read"]  # each is waited for once
    host.log.clear()
    slots[0] = None  # its memory was not copied since it came back
    assert host.get(slots[2]) == 2
    assert host.log == ["out 0", "read"]


def test_also_those_of_slots_that_stay(host):
    host = host(4)
    slots = host.fill(4)
    stays = host.put(9, to_disk=False)
    host.get(stays)
    Order(host)
    host.log.clear()
    del stays
    assert host.get(slots[0]) == 0
    assert host.log == ["in 9", "read"]


def test_another_thread_waits_for_the_same_copies(host):
    host = host(4)
    slots = host.fill(8)
    copy, waiting = threading.Event(), []
    slots[7].read = lambda: (waiting.append(1), copy.wait(TIMEOUT))
    slots[6].read = lambda: None
    del slots[6:]
    readers = [Running(host.get, slots[0]), Running(host.get, slots[1])]
    until(lambda: len(waiting) == 2)
    assert host.disk.read_back == []
    copy.set()
    assert sorted(reader.end() for reader in readers) == [0, 1]
    assert host.store._unfinished == {}


def test_nothing_is_waited_for_where_nothing_is_read(host):
    host = host(8)
    for _ in range(10):
        slots = host.fill(3)
        for slot in slots:
            host.get(slot)
        del slots, slot
    assert host.log == []


def test_only_so_many_copies_are_kept_in_mind(host):
    host = host(8)
    for number in range(host_store._MANY + 7):
        host.put(number % 100)
    assert host.log == [f"out {number}" for number in range(6)]  # the earliest
    assert len(host.store._unfinished) <= host_store._MANY + 1


def test_slots_go_without_the_garbage_collector(host):
    host = host(2)
    gc.disable()
    try:
        slots = host.fill(5)
        references = [weakref.ref(slot) for slot in slots]
        assert [host.get(slot) for slot in slots] == [0, 1, 2, 3, 4]
        del slots
        host.disk.end_writes()
        assert [reference() for reference in references] == [None] * 5
        assert (host.in_use, len(host.disk.tickets)) == (0, 0)
    finally:
        gc.enable()


# --- a disk that fails ------------------------------------------------------------------------------------------------


def broken_device():
    raise RuntimeError("the device is gone")


def test_what_cannot_be_written_stays_in_memory(host, caplog):
    host = host(4)
    slots = host.fill(3)
    host.disk.fail()
    host.disk.writes[0].end()
    slots += [host.put(3)]
    assert (in_memory(slots), len(host.disk.writes)) == ([0, 1, 2, 3], 0)
    assert [host.get(slot) for slot in slots] == [0, 1, 2, 3]
    with pytest.raises(RuntimeError) as caught:
        host.put(4)
    assert str(caught.value) == (
        "offload to disk: 4.00 KiB of host memory are needed to move more off the device, and 16.0 KiB of 16.0 KiB are in "
        f"use. What is there cannot go on to disk: {FULL.strerror} This step cannot go on. Raise checkpointing_host_budget."
    )
    assert [host.get(slot) for slot in slots] == [0, 1, 2, 3]
    assert host.counts == (0, 0)
    assert [record.message for record in caplog.records] == [f"offload to disk: {FULL}"]
    del slots[2:]
    assert host.put(5) is not None


def test_a_write_that_fails_while_it_is_waited_for(host, caplog):
    host = host(2)
    slots = host.fill(2)
    host.disk.fail()
    with pytest.raises(RuntimeError, match="No space left on device"):
        host.put(2)
    assert host.put(2, to_disk=False) is None  # stays on the device
    assert [host.get(slot) for slot in slots] == [0, 1]
    assert len(caplog.records) == 1


def test_several_writes_that_fail_alike_are_said_once(host, caplog):
    host = host(8)
    slots = host.fill(8)
    assert len(host.disk.writes) == 4
    host.disk.fail()
    host.disk.end_writes()
    assert (len(caplog.records), in_memory(slots)) == (1, list(range(8)))


def test_what_was_written_before_the_disk_failed_can_leave_and_come_back(host):
    host = host(4)
    slots = host.fill(6)
    host.disk.fail()
    assert host.disk.written == [0, 1]
    assert host.get(slots[5]) == 5
    with pytest.raises(RuntimeError, match="needed to read back what is on disk"):
        host.get(slots[0])
    assert in_memory(slots) == [2, 3, 4, 5]
    del slots[5]
    for _ in range(2):  # by turns
        assert [host.get(slot) for slot in slots] == [0, 1, 2, 3, 4]
    # They keep what room they have, to be able to come back.
    with pytest.raises(RuntimeError, match="needed to move more off the device"):
        host.put(6)
    assert host.put(6, to_disk=False) is None
    assert in_memory(slots) == [1, 2, 3, 4]


def test_a_copy_that_failed_is_an_error_of_this_slot_only(host):
    host = host(2)
    slot = host.store.put(UNIT, True)
    host.store.copied(slot, broken_device)
    other = host.put(1)
    with pytest.raises(RuntimeError, match=r"4\.00 KiB could not be written: .*the device is gone"):
        host.put(2)
    assert (host.disk.failed, host.disk.written) == (None, [])
    assert (slot.pieces is None, slot.ticket) == (False, None)
    del slot
    assert host.put(2) is not None
    assert host.get(other) == 1


def test_a_read_that_fails_raises_and_may_be_tried_again(host):
    host = host(1)
    slots = host.fill(2)
    host.disk.holds_reads = True
    reader = Running(host.get, slots[0])
    until(lambda: host.disk.reads)
    assert host.disk.reads[0].pieces.tensors[0].fill_(99) is not None  # any bytes
    host.disk.reads[0].end(BROKEN)
    with pytest.raises(OSError, match="could not be read back") as caught:
        reader.end()
    assert caught.value is not BROKEN
    assert (BROKEN.__traceback__, slots[0].pieces, host.in_use) == (None, None, 0)
    assert host.counts[1] == 0
    host.disk.holds_reads = False
    assert [host.get(slot) for slot in slots] == [0, 1]


def test_a_failed_read_ahead_is_an_error_once_it_is_asked_for(host):
    host = host(1)
    slots = host.fill(3)
    del slots[2]
    host.disk.end_writes()
    host.disk.holds_reads = True
    host.store.fetch_ahead(slots[0])
    host.disk.reads[0].end(BROKEN)
    with pytest.raises(OSError, match="could not be read back"):
        host.store.fetch(slots[0])
    assert host.in_use == 0
    host.store.fetch_ahead(slots[0])
    host.disk.reads[0].end(BROKEN)
    host.disk.holds_reads = False
    assert host.get(slots[1]) == 1  # takes its room
    assert host.get(slots[0]) == 0


def test_an_error_holds_no_slot(host):
    host = host(1)
    slots = host.fill(2)
    del slots[1]
    host.disk.end_writes()
    host.disk.holds_reads = True
    reference = weakref.ref(slots[0])
    gc.disable()
    try:
        for _ in range(2):
            host.store.fetch_ahead(slots[0])
            host.disk.reads[0].end(BROKEN)
            with pytest.raises(OSError, match="could not be read back"):
                host.store.fetch(slots[0])
        del slots
        assert reference() is None
    finally:
        gc.enable()


def test_what_was_never_copied_is_not_handed_out(host):
    for folder in (None, "/there"):
        store = host(2, folder=folder).store
        with pytest.raises(RuntimeError, match="no copy to the host was begun"):
            store.fetch(store.put(UNIT, True))


def test_a_thread_that_the_system_refuses_is_no_error_of_the_copy(host, caplog):
    host = host(2)

    def refuse(*args):
        raise RuntimeError("can't start new thread")

    host.disk.write = refuse
    slots = host.fill(2)
    assert [host.get(slot) for slot in slots] == [0, 1]
    assert "nothing is written early: can't start new thread" in caplog.text
    with pytest.raises(RuntimeError, match="can't start new thread"):
        host.put(2)


def test_room_that_never_comes_is_an_error(host, monkeypatch):
    host = host(1)
    slots = host.fill(2)
    loan = host.store.fetch(slots[1])
    monkeypatch.setattr(host_store, "_PATIENCE", 0.01)
    with pytest.raises(RuntimeError) as caught:
        host.get(slots[0])
    assert str(caught.value) == (
        "offload to disk: 4.00 KiB of host memory are needed to read back what is on disk, and 4.00 KiB of 4.00 KiB are in "
        "use. This step cannot go on. Raise checkpointing_host_budget."
    )
    del loan
    assert host.get(slots[0]) == 0


def test_room_that_cannot_come_is_an_error_at_once(host, monkeypatch):
    host = host(1)
    slots = host.fill(2)
    host.disk.fail()
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(RuntimeError, match="cannot go on to disk"):
        host.get(slots[0])


def test_time_that_the_host_waits_is_counted(host, monkeypatch):
    host, clock = host(2), iter(range(1000))
    monkeypatch.setattr(host_store.time, "perf_counter", lambda: next(clock))
    slots = host.fill(2)
    assert host.store.report()["waited_seconds"] == 0
    slots += [host.put(2)]  # for a write
    assert host.store.report()["waited_seconds"] == 1
    host.get(slots[2])
    assert host.store.report()["waited_seconds"] == 1
    host.get(slots[0])  # for a write of another one, and for its read
    assert host.store.report()["waited_seconds"] == 3


# --- with the real disk, and a device that is late ------------------------------------------------------------------------


class LateDevice(threading.Thread):
    """Copies in order, some time after they were asked for; it does not keep memory from being handed out again."""

    def __init__(self, seed):
        super().__init__(daemon=True)
        self.random = random.Random(seed)
        self.copies = deque()
        self.lock = threading.Lock()
        self.more = threading.Semaphore(0)
        self.start()

    def copy(self, targets, sources):
        done = threading.Event()
        with self.lock:
            self.copies.append((targets, sources, done))
        self.more.release()
        return lambda: done.wait(TIMEOUT) or pytest.fail("the device is late")

    def run(self):
        while True:
            self.more.acquire()
            targets, sources, done = self.copies.popleft()
            if targets is None:
                return
            if self.random.random() < 0.3:
                time.sleep(self.random.random() * 0.002)
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
            done.set()


class Lane(threading.Thread):
    """What one device's thread does with its slots, at random."""

    def __init__(self, store, device, seed, steps):
        super().__init__(daemon=True)
        self.store, self.device, self.steps = store, device, steps
        self.random = random.Random(seed)
        self.slots, self.results, self.error = [], [], None
        self.start()

    def run(self):
        try:
            for step in range(self.steps):
                action = self.random.choices((self.leave, self.back, self.ahead, self.drop), (6, 6, 2, 1))[0]
                action(step)
            for number in range(len(self.slots)):
                self.back(number)
            self.slots.clear()
        except BaseException as error:
            self.error = error

    def leave(self, step):
        if len(self.slots) > 15:
            return
        nbytes, value = self.random.randint(1, 3 * UNIT), self.random.randint(0, 255)
        slot = self.store.put(nbytes, self.random.random() < 0.8)
        if slot is None:
            time.sleep(0.001)  # Another lane has the room, or what is gone is still written.
        else:
            source = [torch.full((t.numel(),), value, dtype=torch.uint8) for t in slot.pieces.tensors]
            self.store.copied(slot, self.device.copy(slot.pieces.tensors, source))
            self.slots.append((slot, value))

    def back(self, step):
        if self.slots:
            slot, value = self.slots[step % len(self.slots)]
            loan = self.store.fetch(slot)
            targets = [torch.empty_like(tensor) for tensor in loan.tensors]
            slot.read = self.device.copy(targets, loan.tensors)
            self.results.append((targets, value))
            if self.random.random() < 0.4:
                self.slots.pop(step % len(self.slots))

    def ahead(self, step):
        if self.slots:
            self.store.fetch_ahead(self.random.choice(self.slots)[0])

    def drop(self, step):
        if self.slots:
            self.slots.pop(self.random.randrange(len(self.slots)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("units", [5, 12])
def test_threads_get_what_they_put(tmp_path, units, seed):
    pool = HostPool(units * UNIT, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    store, device = HostStore(pool, str(tmp_path)), LateDevice(seed)
    lanes = [Lane(store, device, 10 * seed + number, steps=250) for number in range(2)]
    for lane in lanes:
        lane.join(TIMEOUT)
        assert not lane.is_alive()
        if lane.error is not None:
            raise lane.error
    device.copy(None, None)
    device.join(TIMEOUT)
    results = [result for lane in lanes for result in lane.results]
    assert [value for targets, value in results if any((target != value).any() for target in targets)] == []
    assert len(results) > 100
    assert pool.held <= units * UNIT
    assert store.report()["bytes_read"] > 0
    until(lambda: pool.in_use == 0)
    taken = store._disk._work.file
    until(lambda: sum(length for _, length in taken.returned) + taken._extents.free == taken._extents.length)
