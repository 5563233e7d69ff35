"""A chunk goes to the host once, frees its memory and comes back as often as it is asked for; streams wait as they must."""

import gc
import pickle
import weakref
from copy import deepcopy

import pytest
import torch
from fake_device import FakeStreams

from ckpt_trainer.chunks import Channel, Chunk, OffloadCounts, known_chunk, mark_of, remember_chunk, seen, send
from ckpt_trainer.host_memory import HostPool
from ckpt_trainer.host_store import HostStore

NBYTES = 3 * 4096


class Waits(FakeStreams):
    """Notes who waits: (stream, stream of the event, counted)."""

    def __init__(self, *args, **options):
        self.waits = []
        super().__init__(*args, **options)

    def wait(self, stream, event, counted=False):
        self.waits.append((stream.number, event.stream, counted))
        super().wait(stream, event, counted)

    def taken_waits(self):
        waits, self.waits = self.waits, []
        return waits


LIVE, OUTWARD, INWARD = range(3)


class Way:
    """A channel over the fake device."""

    def __init__(self, timing="lazy", cap=2**20):
        self.fake = Waits(timing)
        self.pool = HostPool(cap, self.fake.host)
        self.store = HostStore(self.pool)
        self.counts = OffloadCounts()
        self.channels = []
        self.channel = self.another(self.fake)

    def another(self, fake):
        channel = Channel(fake, self.store, self.counts, self.channels)
        self.channels.append(channel)
        return channel

    def tensor(self, nbytes=NBYTES):
        tensor = torch.randn(nbytes // 4)
        self.fake.made(tensor)
        return tensor

    def chunk(self, tensor, start=0, nbytes=None):
        chunk = Chunk(
            self.channel, tensor, start, tensor.untyped_storage().nbytes() - start if nbytes is None else nbytes
        )
        remember_chunk(tensor, chunk)
        return chunk

    def known(self, tensor, start=0, end=None):
        return known_chunk(tensor, self.channel, start, tensor.untyped_storage().nbytes() if end is None else end)

    def back(self, chunk):
        """The values, brought back and used."""
        memory, back = chunk.bring_back()
        back.wait()
        self.fake.used(memory)
        return memory[: chunk.nbytes].view(torch.float32).clone()


@pytest.fixture
def way():
    gc.disable()
    yield Way()
    gc.enable()


def memory_of(tensor):
    return weakref.ref(tensor.untyped_storage())


def test_there_and_back(way):
    tensor = way.tensor()
    values, memory = tensor.clone(), memory_of(tensor)
    chunk = way.chunk(tensor)
    del tensor
    assert send([chunk]) == []
    assert memory() is not None
    chunk.settle()
    assert memory() is None
    assert torch.equal(way.back(chunk), values)
    assert torch.equal(way.back(chunk), values)
    counts = way.counts
    assert (counts.copies_out, counts.bytes_out, counts.copies_in, counts.bytes_in) == (1, NBYTES, 2, 2 * NBYTES)
    assert (way.pool.in_use, way.fake.device_bytes, way.fake.races) == (NBYTES, 0, [])
    del chunk
    assert way.pool.in_use == 0
    assert way.fake.races == []


def test_who_waits_for_whom(way):
    tensor = way.tensor()
    one, two = way.chunk(tensor, 0, 4096), way.chunk(tensor, 4096, 4096)
    del tensor
    assert way.fake.taken_waits() == []
    send([one, two])
    assert way.fake.taken_waits() == [(OUTWARD, LIVE, False)]  # once for both
    one.settle()
    assert way.fake.taken_waits() == [(LIVE, OUTWARD, True)]
    two.settle()
    one.settle()
    assert way.fake.taken_waits() == []
    memory, back = one.bring_back()
    assert way.fake.taken_waits() == [(INWARD, LIVE, False), (INWARD, OUTWARD, False)]
    back.wait(counted=True)
    back.wait(counted=True)
    # Host memory that is handed out from now on comes after the copy from it.
    assert way.fake.taken_waits() == [(LIVE, INWARD, True), (OUTWARD, INWARD, False)]
    del memory, back, two, one
    assert way.fake.taken_waits() == [(OUTWARD, OUTWARD, False)] * 2
    assert way.fake.races == []


def test_a_copy_waits_for_the_streams_that_its_sources_are_of(way):
    fake, tensor = way.fake, way.tensor(8192)
    other = fake.new()
    fake.wait(other, fake.record(fake.live()))
    one = way.chunk(tensor, 0, 4096)
    with fake.on_stream(other):
        two = way.chunk(tensor, 4096, 4096)
        three = way.chunk(tensor, 4096, 4096)
    fake.taken_waits()
    send([one, two, three])
    assert fake.taken_waits() == [(OUTWARD, LIVE, False), (OUTWARD, other.number, False)]
    for chunk in (one, two, three):
        chunk.settle()
    assert fake.taken_waits() == [(LIVE, OUTWARD, True), (other.number, OUTWARD, True)]


def test_sources_are_awaited_before_chunks_die(way):
    tensor = way.tensor()
    chunk = way.chunk(tensor)
    send([chunk])
    del tensor
    way.fake.taken_waits()
    del chunk
    assert way.fake.taken_waits() == [(LIVE, OUTWARD, True), (OUTWARD, OUTWARD, False)]
    assert (way.fake.races, way.pool.in_use) == ([], 0)
    # One that never left waits for nothing.
    way.chunk(way.tensor())
    assert way.fake.taken_waits() == []


def test_host_memory_is_used_anew_after_copies_of_all_channels(way):
    second = Waits("lazy")
    way.another(second)
    chunk = way.chunk(way.tensor())
    send([chunk])
    chunk.settle()
    _, back = chunk.bring_back()
    back.wait()
    # Events of another device are told apart by the fake no more than streams are; what counts is that it waits.
    assert second.taken_waits() == [(1, INWARD, False)]
    del chunk
    assert second.taken_waits() == [(1, OUTWARD, False)]


def test_no_settling_before_it_leaves(way):
    tensor = way.tensor()
    chunk = way.chunk(tensor)
    chunk.settle()
    assert chunk.source is not None
    assert way.fake.taken_waits() == []


def test_no_room(way):
    way = Way(cap=2 * 4096)
    tensors = [way.tensor(4096 * number) for number in (1, 2, 1, 1)]
    chunks = [way.chunk(tensor) for tensor in tensors]
    assert send(chunks) == [chunks[1], chunks[3]]
    for chunk in chunks:
        chunk.settle()
    assert [chunk.source is None for chunk in chunks] == [True, False, True, False]
    assert way.counts.copies_out == 2
    assert send([]) == []
    assert torch.equal(way.back(chunks[2]), tensors[2])


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_store_that_fails_loses_nothing(way, monkeypatch, failing):
    tensors = [way.tensor() for _ in range(3)]
    values = [tensor.clone() for tensor in tensors]
    chunks = [way.chunk(tensor) for tensor in tensors]
    put = way.store.put

    def fail(*args):
        if len([chunk for chunk in chunks if chunk.slot is not None]) == failing:
            raise RuntimeError("the disk is full")
        return put(*args)

    monkeypatch.setattr(way.store, "put", fail)
    with pytest.raises(RuntimeError, match="the disk is full"):
        send(chunks)
    monkeypatch.undo()
    del tensors
    for number, chunk in enumerate(chunks):
        chunk.settle()
        left = number < failing
        assert (chunk.source is None, chunk.slot is not None) == (left, left)
        found = way.back(chunk) if left else chunk.source.view(torch.float32)
        assert torch.equal(found, values[number])
    assert way.fake.races == []


def test_a_copy_that_fails_loses_nothing(way, monkeypatch):
    tensor = way.tensor()
    values, chunk = tensor.clone(), way.chunk(tensor)

    def fail(*args):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(way.fake, "copy", fail)
    with pytest.raises(RuntimeError, match="no such luck"):
        send([chunk])
    monkeypatch.undo()
    del tensor
    chunk.settle()
    assert torch.equal(chunk.source.view(torch.float32), values)
    del chunk
    assert way.pool.in_use == 0


def test_one_slot_is_asked_for_again_once_those_before_are_on_their_way(way, monkeypatch):
    chunks = [way.chunk(way.tensor()) for _ in range(3)]
    put, asked = way.store.put, []

    def hesitate(*args):
        asked.append((args, way.counts.copies_out))
        return None if len(asked) == 2 else put(*args)

    monkeypatch.setattr(way.store, "put", hesitate)
    chunks[1].to_disk = True
    assert send(chunks) == []
    assert asked == [((NBYTES, disk), copies) for disk, copies in ((False, 0), (True, 0), (True, 1), (False, 1))]
    assert way.counts.copies_out == 3


def test_host_memory_in_pieces():
    way = Way(cap=7 * 4096)  # slabs of 4, 2 and 1
    chunk = way.chunk(way.tensor(6 * 4096 + 100))
    values = chunk.source.view(torch.float32).clone()
    send([chunk])
    assert [piece.numel() for piece in chunk.slot.pieces.tensors] == [4 * 4096, 2 * 4096, 100]
    chunk.settle()
    assert torch.equal(way.back(chunk), values)
    assert (way.fake.num_copies("out"), way.fake.num_copies("in")) == (3, 3)
    assert (way.counts.copies_out, way.counts.copies_in) == (1, 1)
    assert way.fake.races == []


def test_what_is_back_serves_for_as_long_as_it_lives(way):
    fake, chunk = way.fake, way.chunk(way.tensor())
    other = fake.new()
    send([chunk])
    chunk.settle()
    memory, back = chunk.bring_back()
    again, same = chunk.bring_back()
    assert (again.data_ptr(), same, way.counts.copies_in) == (memory.data_ptr(), back, 1)
    with fake.on_stream(other):
        elsewhere, _ = chunk.bring_back()
        assert (elsewhere.data_ptr() != memory.data_ptr(), way.counts.copies_in) == (True, 2)
    # What came last is known.
    third, _ = chunk.bring_back()
    assert way.counts.copies_in == 3
    del again, third
    chunk.bring_back()
    assert way.counts.copies_in == 4
    back.wait()


@pytest.mark.parametrize(
    "write", [lambda x: x.add_(1), lambda x: x[3:5].zero_(), lambda x: x.view(torch.float32).mul_(2)]
)
def test_what_is_back_and_was_written_serves_nobody(way, write):
    chunk = way.chunk(way.tensor())
    values = chunk.source.view(torch.float32).clone()
    send([chunk])
    chunk.settle()
    memory, back = chunk.bring_back()
    back.wait()
    assert back.is_fit(way.fake.live())
    write(memory)
    assert not back.is_fit(way.fake.live())
    assert torch.equal(way.back(chunk), values)
    assert way.counts.copies_in == 2


def test_room_for_elements_of_any_size(way):
    tensor = torch.zeros(1001, dtype=torch.int8)
    chunk = way.chunk(tensor)
    send([chunk])
    memory, _ = chunk.bring_back()
    assert memory.numel() == 1008
    assert way.counts.bytes_in == 1001


# Known by storage, bytes and version


def test_known(way):
    tensor = way.tensor()
    chunk = way.chunk(tensor, 4096, 4096)
    assert way.known(tensor, 4096, 8192) is chunk
    assert way.known(tensor.view(2, -1), 5000, 8192) is chunk
    assert way.known(tensor, 4096, 5000) is chunk
    assert way.known(tensor, 4095, 8192) is None
    assert way.known(tensor, 4096, 8193) is None
    assert way.known(tensor.clone(), 4096, 8192) is None
    assert known_chunk(tensor, way.another(way.fake), 4096, 8192) is None


def test_known_beside_others_of_the_storage(way):
    tensor = way.tensor()
    one, two = way.chunk(tensor, 0, 4096), way.chunk(tensor, 4096, 4096)
    assert way.known(tensor, 0, 4096) is one
    assert way.known(tensor, 4096, 8192) is two


def test_known_by_version(way):
    tensor = way.tensor()
    chunk, alias, other = way.chunk(tensor), tensor.detach(), tensor.data
    # One that counts versions by itself shares what has not been written by either.
    assert way.known(other) is chunk
    other.add_(1)
    assert way.known(other) is None
    assert way.known(alias) is chunk
    alias.add_(1)
    assert way.known(tensor) is None
    # Its version is that of the chunk again, and the bytes are not.
    assert way.known(tensor.data) is None
    second = way.chunk(tensor)
    assert way.known(alias) is second


def test_a_counter_of_its_own(way):
    tensor, counter = way.tensor(), torch.zeros(3)
    counter.add_(1)
    chunk = Chunk(way.channel, tensor, 0, NBYTES, counter)
    remember_chunk(tensor, chunk)
    assert way.known(tensor) is chunk
    counter.add_(1)
    assert way.known(tensor) is None


def test_memory_that_is_used_again_is_others(way):
    addresses = set()
    chunks = []
    for _ in range(20):
        tensor = torch.full((1024,), float(len(chunks)))
        addresses.add(tensor.data_ptr())
        assert way.known(tensor) is None
        chunks.append(way.chunk(tensor))
        send(chunks[-1:])
        chunks[-1].settle()
        del tensor
    for number, chunk in enumerate(chunks):
        assert torch.equal(way.back(chunk), torch.full((1024,), float(number)))


def test_the_storage_keeps_no_chunk_alive(way):
    tensor = way.tensor()
    for _ in range(5):
        dead = weakref.ref(way.chunk(tensor))
        assert dead() is None
        assert way.known(tensor) is None
    chunk = way.chunk(tensor)
    assert len(tensor.untyped_storage()._ckpt_trainer_chunks) == 1
    assert way.known(tensor) is chunk


def test_a_tensor_that_is_known_can_be_copied_and_saved(way, tmp_path):
    tensor = way.tensor()
    chunk = way.chunk(tensor)
    torch.save(tensor, tmp_path / "tensor.pt")
    for copy in (deepcopy(tensor), pickle.loads(pickle.dumps(tensor)), torch.load(tmp_path / "tensor.pt")):
        assert torch.equal(copy, tensor)
        assert way.known(copy) is None
    assert way.known(tensor) is chunk


def test_retaken(way):
    fake, tensor = way.fake, way.tensor()
    chunk, memory = way.chunk(tensor, 4096, 4096), memory_of(tensor)
    send([chunk])
    chunk.settle()
    stream = fake.new()
    fake.wait(stream, fake.record(fake.live()))
    with fake.on_stream(stream):
        chunk.retake(tensor)
        chunk.retake(tensor)
    assert (chunk.source.data_ptr(), chunk.source.numel()) == (tensor.data_ptr() + 4096, 4096)
    del tensor
    assert memory() is not None
    fake.taken_waits()
    chunk.settle()
    # It belongs to another stream now; no copy goes out again.
    assert fake.taken_waits() == [(stream.number, OUTWARD, True)]
    assert memory() is None
    assert way.counts.copies_out == 1


def test_packed_on_other_streams_before_it_left(way):
    """The memory is that of the first, which waits for the others before it is given up."""
    fake, tensor = way.fake, way.tensor()
    chunk, streams = way.chunk(tensor), [fake.new(), fake.new()]
    source, stream = chunk.source, chunk.stream
    for other in (*streams, streams[0], stream):
        with fake.on_stream(other):
            chunk.retake(tensor)
    assert (chunk.source, chunk.stream) == (source, stream)
    chunk.settle()
    assert fake.taken_waits() == []
    send([chunk])
    assert fake.taken_waits() == [(OUTWARD, LIVE, False)]
    chunk.settle()
    second, first = (other.number for other in reversed(streams))
    assert fake.taken_waits() == [(LIVE, OUTWARD, True), (LIVE, second, False), (LIVE, first, False)]
    # And once only.
    chunk.retake(tensor)
    chunk.settle()
    assert fake.taken_waits() == []


def test_here(way):
    tensor = way.tensor()
    values, chunk = tensor.clone(), way.chunk(tensor, 4096, 4096)
    assert chunk.is_here()
    send([chunk])
    assert chunk.is_here()
    chunk.settle()
    assert chunk.source is None
    # Somebody else keeps it.
    assert chunk.is_here()
    assert torch.equal(chunk.source.view(torch.float32), values[1024:2048])
    chunk.settle()
    memory = memory_of(tensor)
    del tensor
    assert (memory(), chunk.is_here(), chunk.source) == (None, False, None)
    assert torch.equal(way.back(chunk), values[1024:2048])
    assert way.fake.races == []


@pytest.mark.parametrize(
    "end", [lambda x: x.add_(1), lambda x: x.untyped_storage().resize_(0)], ids=["written", "freed"]
)
def test_not_here_any_more(way, end):
    tensor = way.tensor()
    values, chunk = tensor.clone(), way.chunk(tensor)
    send([chunk])
    chunk.settle()
    way.fake.finish()
    end(tensor)
    assert not chunk.is_here()
    assert torch.equal(way.back(chunk), values)


# Marks


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(64),
        lambda: torch.randn(8, 8)[1:].t(),
        lambda: torch.randn(4, dtype=torch.complex64),
        lambda: torch.ones(3) > 0,
    ],
)
def test_a_mark_counts_versions_and_holds_no_memory(make):
    tensor = make().zero_()
    version, mark = tensor._version, mark_of(tensor)
    assert (mark._version, mark.numel(), mark.dtype) == (version, 0, tensor.dtype)
    tensor[:1].fill_(1)
    assert mark._version == tensor._version == version + 1
    memory = memory_of(tensor)
    del tensor
    assert memory() is None


def test_a_mark_of_a_result_has_no_graph():
    x = torch.randn(4, requires_grad=True)
    factor = torch.randn(4)
    result, saved = x * factor, memory_of(factor)
    mark = mark_of(result)
    assert (mark.grad_fn, mark.requires_grad) == (None, False)
    del result, factor
    assert saved() is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch._C._AutoDispatchBelowADInplaceOrView])
def test_marks_are_made_anywhere(mode):
    tensor = torch.randn(4)
    storage = torch.arange(12, dtype=torch.int32).untyped_storage()
    with mode():
        mark = mark_of(tensor)
        view = seen(mark, storage, torch.int32, (2, 2), (1, 3), 8)
    tensor.add_(1)
    assert mark._version == view._version == 1
    assert view.tolist() == [[2, 5], [3, 6]]
    view.add_(1)
    assert tensor._version == 2
