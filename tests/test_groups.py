"""What a group lets go and what it keeps, how often that is copied, when memory is free, and that no cycle holds it."""

import gc
import threading
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fake_device import FakeStreams
from test_handles import CHANGES, Road
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ckpt_trainer import checkpointing, streams
from ckpt_trainer.handles import Kept, Moved, unpack
from ckpt_trainer.offload import Offloading
from ckpt_trainer.packed import Held, Rebuilt, as_view
from ckpt_trainer.runs import Outputs, RunSaved
from ckpt_trainer.stored_results import StoredResults


@pytest.fixture
def road_of(monkeypatch):
    gc.disable()  # What is left over must not wait for it.
    yield partial(Road, monkeypatch)
    gc.enable()


@pytest.fixture
def road(road_of):
    return road_of()


def memory_of(tensor):
    return weakref.ref(tensor.untyped_storage())


# What is kept, and why

SIZE = 1024  # floats, which are a tensor that may leave; half of it may not


class Sub(torch.Tensor):
    pass


def inference():
    with torch.inference_mode():
        return torch.ones(SIZE)


def scales():
    return torch.quantize_per_tensor(torch.randn(8 * SIZE), 0.1, 0, torch.qint8)


PARAMETER = nn.Parameter(torch.randn(SIZE, 2))
BUFFER = torch.randn(2 * SIZE)
KINDS = {
    "plain": (lambda: torch.randn(SIZE), None),
    "result": (lambda: torch.randn(SIZE, requires_grad=True) * 2, None),
    "leaf that requires grad": (lambda: torch.randn(SIZE, requires_grad=True), None),
    "just large enough": (lambda: torch.randn(2 * SIZE)[:SIZE], None),
    "small": (lambda: torch.randn(SIZE - 1), "below 4.00 KiB"),
    "small part": (lambda: torch.randn(2 * SIZE)[: SIZE - 1], "below 4.00 KiB"),
    "small, expanded": (lambda: torch.randn(SIZE - 1).expand(100, -1), "below 4.00 KiB"),
    "few bytes spread over a large storage": (lambda: torch.randn(SIZE, 4)[:, 0], None),
    "very few bytes spread over a large storage": (lambda: torch.randn(SIZE, 10)[:, 0], "small part of a storage"),
    "empty": (lambda: torch.randn(SIZE)[:0], "small part of a storage"),
    "subclass": (lambda: torch.randn(SIZE).as_subclass(Sub), "a Sub, strided"),
    "sparse": (lambda: torch.eye(100).to_sparse(), "a Tensor, sparse_coo"),
    "compressed": (lambda: torch.eye(100).to_sparse_csr(), "a Tensor, sparse_csr"),
    "elsewhere": (lambda: torch.empty(SIZE, device="meta"), "on meta"),
    "inference": (inference, "of a special kind"),
    "conjugated": (lambda: torch.randn(SIZE, dtype=torch.complex64).conj(), "of a special kind"),
    "negated": (lambda: torch.randn(SIZE, dtype=torch.complex64).conj().imag, "of a special kind"),
    "quantized": (scales, "of a special kind"),
    "parameter": (lambda: PARAMETER, "parameter or buffer"),
    "parameter of others": (lambda: nn.Parameter(torch.randn(SIZE)), "parameter or buffer"),
    "view of a parameter": (lambda: PARAMETER.t()[1:], "parameter or buffer"),
    "alias of a parameter": (lambda: PARAMETER.detach(), "parameter or buffer"),
    "data of a parameter": (lambda: PARAMETER.data[1:], "parameter or buffer"),
    "view of a parameter of others": (lambda: nn.Parameter(torch.randn(SIZE, 2)).t(), "parameter or buffer"),
    "cast of a parameter": (lambda: PARAMETER.double(), "parameter or buffer"),
    "view of a cast of a parameter": (lambda: PARAMETER.double().t(), "parameter or buffer"),
    "cast of a result": (lambda: (PARAMETER * 2).double(), None),
    "computed from a parameter": (lambda: PARAMETER * 2, None),
    "buffer": (lambda: BUFFER, "parameter or buffer"),
    "view of a buffer": (lambda: BUFFER[:SIZE], "parameter or buffer"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_and_why(road_of, kind):
    make, why = KINDS[kind]
    road = road_of(min_bytes=4 * SIZE)
    tensor, group = make(), road.begin(own=[PARAMETER, BUFFER])
    handle = group.pack(tensor)
    assert type(handle) is (Moved if why is None else Kept)
    strided = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    assert road.counts().kept == ({} if why is None else {why: (1, tensor.nbytes if strided else 0)})
    group.pack(tensor)
    assert road.kept() == ({} if why is None else {why: 2})
    group.packed_inputs()
    road.drive()
    assert road.fake.num_copies("out") == 2 + (why is None)
    if tensor.device.type != "meta" and not tensor.is_quantized:
        found = handle.get()
        dense = [one.to_dense() if one.layout is not torch.strided else one for one in (found, tensor)]
        assert torch.equal(*dense)


def test_a_tied_parameter_stays(road):
    tied = nn.Embedding(10, 8)
    other = torch.empty(0).set_(tied.weight.detach().untyped_storage(), 8, (4, 8), (8, 1))
    group = road.begin(own=list(tied.parameters()))
    assert type(group.pack(other)) is Kept
    assert type(road.begin().pack(other)) is Moved


def test_within_a_function_transform(road):
    group, seen = road.begin(), []

    def f(x):
        handle = group.pack(x)
        seen.append(type(handle))
        return (handle.get() * x).sum()

    x = torch.randn(4, 8)
    assert torch.equal(torch.func.vmap(f)(x), (x * x).sum(1))
    torch.func.grad(f)(x)
    torch.func.jvp(f, (x,), (x,))
    assert seen[:2] == [Kept, Kept]
    assert road.kept() == {"within a function transform": len([one for one in seen if one is Kept])}


def test_where_there_is_nowhere_to_go(road):
    assert road.offloading.begin([], []) is None
    assert road.offloading.begin([torch.empty(3, device="meta")], []) is None
    assert road.offloading.begin([torch.empty(3, device="meta"), torch.empty(3)], []) is not None


# What is copied once


def test_the_same_tensor_twice(road):
    x = torch.randn(64)
    first, second = road.pack(x, x)
    third = road.pack(x)
    road.drive()
    assert road.copies() == (1, 0)
    values = x.clone()
    del x
    for handle in (third, first, second):
        assert torch.equal(handle.get(), values)
    assert road.fake.races == []


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "number"),
    [
        (lambda x: x, lambda x: x.view(64), 1),
        (lambda x: x, lambda x: x.t(), 1),
        (lambda x: x, lambda x: x[4:, 2:], 1),
        (lambda x: x, lambda x: x.detach(), 1),
        (lambda x: x, lambda x: x.data, 1),
        (lambda x: x, lambda x: x.view(torch.int16)[1], 1),
        (lambda x: x, lambda x: x.expand(3, 8, 8), 1),
        (lambda x: x, lambda x: x.clone(), 2),
        (lambda x: x[:, ::2], lambda x: x[:, 1::2], 1),  # with gaps: all of the storage
        (lambda x: x[:, :4], lambda x: x, 1),
        (lambda x: x[:4], lambda x: x[:2], 1),
        (lambda x: x[:4], lambda x: x, 2),
        (lambda x: x[:4], lambda x: x[2:6], 2),
    ],
)
def test_views_of_one_storage(road, first, second, number, together):
    x = torch.randn(8, 8)
    tensors = first(x), second(x)
    values = [tensor.clone() for tensor in tensors]
    handles = road.pack(*tensors) if together else [road.pack(tensor) for tensor in tensors]
    del x, tensors
    road.drive()
    assert road.copies() == (number, 0)
    for handle, value in zip(handles, values, strict=True):
        assert torch.equal(handle.get(), value)
    assert road.fake.races == []


def test_a_new_version_is_copied_anew(road):
    x = torch.randn(64)
    road.later.append(road.pack(x))
    x.add_(1)
    second = road.pack(x)
    x.view(8, 8)[0].add_(1)
    third = road.pack(x)
    road.drive()
    assert road.copies()[0] == 3
    assert second.changed
    assert torch.equal(third.get(), x)


def test_a_tensor_at_an_address_that_is_used_again(road):
    handles = []
    for number in range(20):
        handles.append(road.pack(torch.full((4096,), float(number))))
        road.drive(2)
    assert road.copies()[0] == 20
    for number, handle in enumerate(handles):
        assert torch.equal(handle.get(), torch.full((4096,), float(number)))


def test_one_chunk_in_several_groups(road):
    """As the states of an encoder, which all blocks of a decoder get."""
    x = torch.randn(64)
    values, memory = x.clone(), memory_of(x)
    handles = [road.pack(x) for _ in range(4)]
    del x
    # It goes with the last group that has it.
    assert road.copies() == (0, 0)
    road.drive()
    assert memory() is None
    assert road.copies() == (1, 0)
    found = [handle.get() for handle in reversed(handles)]
    assert all(torch.equal(tensor, values) for tensor in found)
    assert road.copies() == (1, 1)  # since what is back serves all who ask while it lives
    assert {tensor.data_ptr() for tensor in found} == {found[0].data_ptr()}
    del found, handles
    assert road.fake.races == []


def test_prefetched_for_two_groups_at_once(road_of):
    road = road_of("lazy", prefetch=3)
    x = torch.randn(64)
    handles = [road.pack(x, torch.randn(64)) for _ in range(3)]
    del x
    road.drive()
    assert road.copies() == (4, 0)
    for group in reversed(handles):
        for handle in group:
            handle.get()
            assert road.copies() == (4, 4)
    assert (road.counts().hits, road.counts().misses) == (4, 2)
    assert road.fake.races == []


def test_the_last_packed_is_brought_back_first(road):
    """As backward asks for them."""
    before, handles = road.pack(torch.randn(10), torch.randn(20)), road.pack(*map(torch.randn, (30, 40, 50)))
    road.drive()
    handles[-1].get()
    assert [copy.nbytes // 4 for copy in road.fake.copies if copy.way == "in"] == [50, 40, 30, 20, 10]
    assert [handle.get().numel() for handle in before] == [10, 20]


def test_what_left_and_is_packed_again(road):
    x = torch.randn(64)
    first, memory = road.pack(x), memory_of(x)
    road.drive()
    second = road.pack(x)
    values = x.clone()
    del x
    assert memory() is not None  # of the newest group
    assert first.get().untyped_storage()._cdata == memory()._cdata  # for the older one, too
    road.drive()
    assert memory() is None
    assert road.copies() == (1, 0)
    assert torch.equal(first.get(), values)
    assert torch.equal(second.get(), values)


def test_what_is_on_its_way_and_packed_again_stays_with_the_newest(road):
    x = torch.randn(64)
    first, memory = road.pack(x), memory_of(x)
    road.drive(1)
    second = road.pack(x)
    del x
    road.drive(1)
    assert (road.copies(), memory() is not None) == ((1, 0), True)
    road.drive()
    assert memory() is None
    assert torch.equal(first.get(), second.get())


def test_what_may_go_on_to_disk(road):
    x = torch.randn(64)
    groups = [road.offloading.begin([x], [], to_disk) for to_disk in (False, True, False)]
    chunks = []
    for group in groups:
        road.later.append(group.pack(x))
        chunks += [(use.chunk, use.chunk.to_disk) for use in group.uses()]
    assert [to_disk for _, to_disk in chunks] == [False, True, True]
    assert len({chunk for chunk, _ in chunks}) == 1


def test_all_devices_share_what_there_is_of_host_memory(monkeypatch, road):
    asked, second = [], FakeStreams()
    devices = {"cpu": road.fake, "meta": second}
    monkeypatch.setattr(
        streams, "streams_of", lambda device, pinned: asked.append((device.type, pinned)) or devices[device.type]
    )
    offloading = Offloading(lambda: asked.append("cap") or 2**20, pinned=False)
    groups = [offloading.begin([torch.empty(0, device=kind)], []) for kind in ("cpu", "meta", "cpu")]
    assert asked == [("cpu", False), "cap", ("meta", False)]
    assert [group.lane.channel.streams for group in groups] == [road.fake, second, road.fake]
    assert groups[0].lane.channel.store is groups[1].lane.channel.store
    assert groups[0].lane is groups[2].lane


def test_no_room_on_the_host(road_of, caplog):
    road = road_of(cap=0)
    handles = [road.pack(torch.randn(64)) for _ in range(3)]
    road.drive(1)
    assert road.counts().kept == {"host budget reached": (3, 3 * 256)}
    assert caplog.text.count("host budget reached") == 1
    assert all(handle.get().numel() == 64 for handle in handles)


# What backward brings back, and gives up


def test_what_has_not_left_when_backward_asks(road):
    x = torch.randn(64)
    memory, handles = memory_of(x), road.pack(x, x.view(8, 8))
    del x
    road.drive(1)  # on its way, and not awaited
    handles[0].get()
    assert memory() is not None
    handles[1].get()
    assert memory() is None
    assert road.copies() == (1, 0)
    handles[0].get()
    assert road.copies() == (1, 1)


def test_when_backward_begins_all_that_is_on_its_way_has_to_arrive(road_of):
    road = road_of("lazy", prefetch=0)
    tensors = [torch.randn(64) for _ in range(4)]
    memories, handles = [memory_of(x) for x in tensors], [road.pack(x) for x in tensors]
    tensors.clear()
    assert all(memory() is not None for memory in memories)
    handles[-1].get()
    # Of those asked for, the newest never left.
    assert [memory() is None for memory in memories] == [True, True, True, False]
    assert road.fake.races == []


def test_time_that_computation_waits_is_counted(road_of):
    road = road_of("lazy", prefetch=0)
    handles = [road.pack(torch.randn(64)) for _ in range(2)]
    road.drive()
    assert road.fake.stalls > 0
    road.fake.finish()
    stalls = road.fake.stalls
    for number, handle in enumerate(handles, 1):
        handle.get()
        assert road.fake.stalls == stalls + number
    assert road.offloading.report()["waited_seconds"] == stalls + 2


def test_what_was_brought_back_ahead_and_is_dropped(road_of):
    road = road_of("lazy")
    handles = [road.pack(torch.randn(64)) for _ in range(3)]
    road.drive()
    handles[2].get()
    assert road.fake.device_bytes == 256
    del handles[1]
    assert road.fake.device_bytes == 0
    assert road.fake.races == []


def test_what_was_brought_back_ahead_on_another_stream(road_of):
    road = road_of("lazy")
    x = torch.randn(64)
    values, handles = x.clone(), [road.pack(x + number) for number in range(3)]
    road.drive()
    other = road.fake.new()
    road.fake.wait(other, road.fake.record(road.fake.live()))
    handles[2].get()
    with road.fake.on_stream(other):
        found = handles[1].get()
        road.fake.used(found)
        assert torch.equal(found, values + 1)
    assert road.fake.device_bytes == 2 * 256  # this, and the one before
    assert road.fake.races == []


def test_what_backward_passed_by_is_given_up(road_of):
    road, sizes = road_of("lazy"), (100, 200, 300, 400, 500)
    handles = [road.pack(x, x.view(2, -1)) for x in map(torch.randn, sizes)]
    road.drive()

    def on_device():
        return sorted(memory.nbytes // 4 for memory in road.fake.alive("empty"))

    handles[4][0].get()
    assert on_device() == [400, 500]
    handles[2][0].get()  # but what was asked for last may still be needed
    assert on_device() == [200, 300, 500]
    handles[4][1].get()
    assert road.copies() == (5, 2 + 2 + 1)  # only the one before it again
    assert on_device() == [300, 400]
    handles[0][0].get()
    assert on_device() == [100]
    assert road.fake.races == []


def test_what_backward_had_already_is_not_brought_back_with_the_rest(road_of):
    """Where blocks take turns, as those that hold one another do."""
    road = road_of(prefetch=0)
    other, (three, four) = road.pack(torch.randn(30)), road.pack(torch.randn(40), torch.randn(50))
    road.drive()
    for handle, copies in ((four, 2), (other, 3), (three, 3)):
        handle.get()
        assert road.copies() == (3, copies)


def test_what_was_asked_for_last_is_given_up_in_the_end(road_of):
    road, sizes = road_of("lazy"), (100, 200, 300, 400)
    handles = [road.pack(x, x.view(2, -1)) for x in map(torch.randn, sizes)]
    road.drive()
    for group in reversed(handles):
        group[0].get()
    assert sorted(memory.nbytes // 4 for memory in road.fake.alive("empty")) == [100, 200]
    assert road.copies() == (4, 4)


def test_after_a_step_backward_begins_anew(road):
    handles = [road.pack(torch.randn(64)) for _ in range(2)]
    road.drive()
    for _ in range(2):
        handles[1].get()
        assert road.fake.device_bytes == 256
        road.offloading.end_of_step()
        assert road.fake.device_bytes == 0


def test_no_room_on_the_device_for_what_is_brought_back_ahead(road, monkeypatch):
    handles = [road.pack(torch.full((64,), float(number))) for number in range(2)]
    road.drive()
    empty, left = road.fake.empty, [1]

    def scarce(nbytes):
        if not left:
            raise torch.OutOfMemoryError("no more")
        left.pop()
        return empty(nbytes)

    monkeypatch.setattr(road.fake, "empty", scarce)
    assert handles[1].get().tolist() == [1.0] * 64
    with pytest.raises(torch.OutOfMemoryError):
        handles[0].get()
    monkeypatch.undo()
    assert handles[0].get().tolist() == [0.0] * 64
    assert road.fake.races == []


# When memory is free


def test_memory_is_free_once_two_more_groups_have_left(road_of):
    road = road_of("lazy")
    x = torch.randn(64)
    memory, handle = memory_of(x), road.pack(x)
    del x
    alive = []
    for _ in range(4):
        road.drive(1)
        alive.append(memory() is not None)
    # Gone out while the first ran, awaited at the end of the second.
    assert alive == [True, False, False, False]
    assert type(handle) is Moved


def test_of_two_views_memory_is_free_only_if_both_may_leave(road):
    x = torch.randn(100, 100)
    memory = memory_of(x)
    handles = road.pack(x, x[:, 0])
    assert [type(handle) for handle in handles] == [Moved, Kept]
    del x
    road.drive()
    assert memory() is not None
    del handles
    assert memory() is None


def test_a_fused_projection_is_free(road_of):
    """The smallest part is below the limit, and yet goes with the others."""
    road = road_of(min_bytes=4 * 64 * 16)
    fused = torch.randn(64, 48)
    memory, parts = memory_of(fused), fused.split((32, 8, 8), -1)
    values = [part.clone() for part in parts]
    handles = road.pack(*parts)
    assert [type(handle) for handle in handles] == [Moved] * 3
    del fused, parts
    road.drive()
    assert memory() is None
    assert [torch.equal(handle.get(), value) for handle, value in zip(handles, values, strict=True)] == [True] * 3
    # From the first of them to the last what came back serves.
    assert road.fake.num_copies("in") == 1


def test_what_came_back_is_free_once_all_have_asked(road):
    x = torch.randn(8, 8)
    one, two = road.pack(x, x.t())
    del x
    road.drive()
    for _ in range(2):  # as for a graph that is kept
        one.get()
        assert road.fake.device_bytes == 256
        two.get()
        assert road.fake.device_bytes == 0
    assert road.copies() == (1, 2)


@pytest.mark.parametrize("end", ["dropped", "used", "used twice"])
def test_all_is_free_once_handles_are(road_of, end):
    road = road_of("lazy")
    x = torch.randn(8, 8)
    handles = [*road.pack(x, x[4:], torch.randn(2000)), road.pack(x)]
    owners = [weakref.ref(handle) for handle in handles]
    uses = [weakref.ref(handle._source) for handle in handles]
    others = [weakref.ref(use().group) for use in uses] + [weakref.ref(use().chunk) for use in uses]
    memory = memory_of(x)
    del x
    road.drive()
    for _ in range({"dropped": 0, "used": 1, "used twice": 2}[end]):
        list(map(unpack, handles))
    handles.clear()
    road.later.clear()
    assert [reference() for reference in (*owners, *uses, *others, memory)] == [None] * 17
    assert (road.fake.device_bytes, road.offloading.report()["host_bytes"]) == (0, 0)
    assert road.fake.races == []


def test_the_step_ends(road):
    handles = [road.pack(torch.randn(64)) for _ in range(3)]
    road.drive()
    handles[2].get()
    assert road.fake.device_bytes == 256  # brought back ahead
    road.offloading.end_of_step()
    assert road.fake.device_bytes == 0
    handles[1].get()
    assert road.fake.races == []


# Graphs


class Chain:
    """Blocks that save their input, their result, views and a parameter."""

    def __init__(self, road, number=4, **kinds):
        torch.manual_seed(0)
        self.road = road
        self.weights = [nn.Parameter(torch.randn(8, 8) / 4) for _ in range(number)]
        self.x = torch.randn(16, 8, requires_grad=True)

    def block(self, x, weight):
        a, b = (x @ weight).split(4, -1)
        return torch.cat([a.exp() * b.tanh(), a.sigmoid() * b], -1) + x

    def loss(self, ours=True):
        x = self.x * 1
        for weight in self.weights:
            if not ours:
                x = self.block(x, weight)
                continue
            group = self.road.begin([weight])
            group.packed_inputs()
            with saved_tensors_hooks(lambda tensor, group=group: group.pack(self.road.made(tensor)), unpack):
                x = self.block(x, weight)
            group.ended()
        return x.square().mean()

    @property
    def leaves(self):
        return [self.x, *self.weights]


def all_equal(found, wanted):
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("timing", ["lazy", "eager", "random"])
@pytest.mark.parametrize("cap", [2**22, 2 * 4096, 0])
def test_graphs_that_are_kept_and_gradients_of_gradients(road_of, timing, cap):
    road = road_of(timing, cap=cap)
    chain = Chain(road)

    def penalty(ours):
        first = torch.autograd.grad(chain.loss(ours), chain.leaves, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), chain.leaves)

    once, twice = torch.autograd.grad(chain.loss(False), chain.leaves), penalty(False)
    loss = chain.loss()
    for _ in range(3):
        assert all_equal(torch.autograd.grad(loss, chain.leaves, retain_graph=True), once)
    assert all_equal(penalty(True), twice)
    assert all_equal(torch.autograd.grad(loss, chain.leaves), once)
    del loss
    assert (road.fake.races, road.fake.device_bytes, road.offloading.report()["host_bytes"]) == ([], 0, 0)
    assert (road.copies()[0] > 0) == (cap > 0)


def test_backward_in_parts(road):
    chain = Chain(road)
    parts = chain.weights[3:], chain.weights[2:3], chain.weights[:1]
    wanted = [torch.autograd.grad(chain.loss(False), part) for part in parts]
    loss = chain.loss()
    for part, expected in zip((*parts, *reversed(parts)), (*wanted, *reversed(wanted)), strict=True):
        assert all_equal(torch.autograd.grad(loss, part, retain_graph=True), expected)
    assert road.fake.races == []


class Scale(torch.autograd.Function):
    """Its backward writes to what it saved, as some fused kernels do."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x)
        return x * y

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return None, x.mul_(gradient)


def test_a_backward_that_writes_to_what_it_saved(road):
    """Others that saved the same get what they saved; with plain autograd they raise."""
    x, y, factor = (torch.randn(64, requires_grad=needed) for needed in (False, True, True))
    wanted = torch.autograd.grad((x * y + x * factor).sum(), (y, factor))

    def loss(hooks):
        with hooks:
            held = x.clone()
            other = held * factor
            return Scale.apply(held, y).sum() + other.sum()

    group = road.begin()
    ours = loss(saved_tensors_hooks(group.pack, unpack))
    group.packed_inputs()
    road.drive()
    for _ in range(2):
        assert all_equal(torch.autograd.grad(ours, (y, factor), retain_graph=True), wanted)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss(torch.enable_grad()), (y, factor))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("again", [False, True])
def test_a_change_in_place_raises_in_backward(road, change, again):
    x = torch.randn(16, 4)
    y = torch.randn(16, 4, requires_grad=True)
    group = road.begin()
    with saved_tensors_hooks(group.pack, unpack):
        loss = (x * y).sum()
    group.packed_inputs()
    road.drive()
    if again:
        torch.autograd.grad(loss, y, retain_graph=True)
    with torch.no_grad():
        CHANGES[change](x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, y)


# Threads


class Blocks(nn.Module):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            return x + self.down(torch.nn.functional.gelu(self.up(x)))

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(self.Block() for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def gradients_of(model, seed):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad(model(x), list(model.parameters()))


@pytest.mark.parametrize("flags", [{}, {"offload_save": "all"}, {"offload_save": "expensive", "host_budget": 3 * 4096}])
@pytest.mark.parametrize("number", [1, 2])
def test_threads(road_of, number, flags):
    """Two models, and one model, trained by several threads at once."""
    road = road_of("random")
    models = [Blocks(seed) for seed in range(number)]
    wanted = [[gradients_of(model, seed) for seed in range(4)] for model in models]
    wrong, begin = [], threading.Barrier(4)

    def train(thread):
        place = thread % number
        begin.wait()
        for _ in range(8):
            for seed in range(4):
                if not all_equal(gradients_of(models[place], seed), wanted[place][seed]):
                    wrong.append((thread, seed))

    with checkpointing(models[0], mode="offload", **flags), checkpointing(models[-1], mode="offload", **flags):
        for model in models:
            gradients_of(model, 0)  # the first forward is measured
        threads = [threading.Thread(target=train, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert road.fake.num_copies("out") > 32
    assert road.fake.device_bytes == 0


# What the engines of mode selective make of handles


def moved(held, road):
    group = road.begin()
    held.move(group.pack)
    group.packed_inputs()
    road.drive()
    return held


def test_a_result_that_is_held_moves(road):
    x = torch.randn(64)
    values, memory, held = x.clone(), memory_of(x), Held(x)
    held.use(), held.use()
    moved(held, road)
    del x
    assert memory() is None
    for _ in range(2):
        assert torch.equal(held.peek(), values)
        assert torch.equal(held.get(), values)
        assert road.fake.device_bytes == 256  # for the second who asks
        assert torch.equal(held.peek(), values)
        held.get()
        assert road.fake.device_bytes == 0
    held.use()  # by a later block
    for _ in range(3):
        held.get()
    assert road.fake.device_bytes == 0


def test_what_is_held_and_used_after_it_left_comes_back_once_for_all(road):
    x = torch.randn(64)
    held = Held(x)
    held.use()
    moved(held, road)
    held.use()
    del x
    copies = road.fake.num_copies("in")
    one, two = held.get(), held.get()
    assert one is two
    assert road.fake.num_copies("in") == copies + 1
    del one, two
    assert road.fake.device_bytes == 0


def test_a_change_between_two_who_ask(road):
    x = torch.randn(64)
    held = Held(x)
    held.use(), held.use()
    moved(held, road)
    held.get()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.get()


@pytest.mark.parametrize("left", [False, True])
def test_what_was_written_by_the_first_who_asks(road, left):
    x = torch.randn(64)
    values, held = x.clone(), Held(x)
    held.use(), held.use()
    if left:
        moved(held, road)
        del x
    else:
        held.move(road.begin().pack)
    held.get().mul_(2)
    if left:
        assert torch.equal(held.get(), values)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            held.get()


def test_what_does_not_move(road_of):
    road = road_of(min_bytes=2**20)
    parameter, written, unused, small = nn.Parameter(torch.randn(4)), torch.randn(4), torch.randn(4), torch.randn(4)
    held = [Held(tensor) for tensor in (parameter, written, unused, small)]
    for one in (*held[:2], held[3]):
        one.use()
    written.add_(1)
    for one in held:
        one.move(road.begin().pack)
        assert one._away is None
        assert one.tensor.data_ptr() != 0
    assert road.kept() == {"below 1.00 MiB": 1}
    assert held[0].get() is parameter
    assert held[3].get() is small
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held[1].get()


@pytest.mark.parametrize("make", [lambda: torch.eye(9).to_sparse(), lambda: torch.ones(3).as_subclass(Sub)])
def test_what_stays_is_held_as_it_was(road, make):
    tensor = make()
    held = Held(tensor)
    held.use()
    held.move(road.begin().pack)
    assert held.get() is tensor


def test_what_others_are_made_of_moves_once(road):
    x = torch.randn(8, 8)
    values, memory, held = x.clone(), memory_of(x), Held(x)
    view, instead = Rebuilt("view", as_view, (held,), ((8,), (1,), 8)), Held(torch.zeros(8))
    instead.use()
    instead.give_way(view)
    del x
    moved(instead, road)
    assert memory() is None
    moved(view, road)
    assert road.copies()[0] == 1
    assert torch.equal(instead.get(), values[1])


# What a replay is given back


class Tanh(nn.Module):
    def forward(self, x):
        return x.tanh()


class Project(nn.Module):
    def forward(self, x):
        # The result has a version of its own.
        return nn.functional.linear(x, torch.ones(4, 4))


class TanhInPlace(nn.Module):
    def forward(self, x):
        return x.tanh().add_(1)


def stored_call(road, x, left=True, block=None):
    block = block or Tanh()
    call = StoredResults(block, "block", ["aten.tanh"]).call()
    with call.storing():
        out = block(x)
    group = road.begin()
    call.move(group.pack)
    if left:
        group.packed_inputs()
        road.drive()
    return call, out


def test_a_stored_result_that_left(road):
    x = torch.randn(64, requires_grad=True)
    call, out = stored_call(road, x)
    values, memory = out.detach().clone(), memory_of(out)
    del out
    assert memory() is None
    for _ in range(2):
        with call.reusing():
            assert torch.equal(Tanh()(x), values)
    assert road.copies() == (1, 2)


@pytest.mark.parametrize("change", CHANGES)
def test_a_stored_result_that_left_and_was_changed(road, change):
    x = torch.randn(16, 4, requires_grad=True)
    call, out = stored_call(road, x)
    with torch.no_grad():
        CHANGES[change](out)
    with call.reusing(), pytest.raises(RuntimeError, match="modified by an inplace operation: the result of"):
        Tanh()(x)


@pytest.mark.parametrize("left", [False, True])
def test_a_replay_that_writes_to_what_it_was_lent(road, left):
    """As the forward did. A graph that is kept is replayed again, from what was stored."""
    x = torch.randn(64, requires_grad=True)
    call, out = stored_call(road, x, left, TanhInPlace())
    for _ in range(3):
        with call.reusing():
            assert torch.equal(TanhInPlace()(x), out)


def test_a_view_that_autograd_does_not_know_is_looked_at_after_it_left(road):
    x, block = torch.randn(2, 3, 4, requires_grad=True), Project()
    call = StoredResults(block, "block", ["aten.mm"]).call()
    with call.storing():
        out = block(x)
    call.move(road.begin().pack)
    with torch.no_grad():
        out.add_(1)
    with call.reusing(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        block(x)


# What runs of modules keep


@pytest.mark.parametrize("kind", ["parameter", "leaf that requires grad", "changed since", "plain"])
def test_what_a_run_kept_moves(road, kind):
    tensor = nn.Parameter(torch.randn(64)) if kind == "parameter" else torch.randn(64)
    tensor.requires_grad_(kind in ("parameter", "leaf that requires grad"))
    saved, group = RunSaved("a module"), road.begin()
    saved.hold(tensor)
    outputs = Outputs([tensor], SimpleNamespace(index_of=lambda tensor: None))
    if kind == "changed since":
        tensor.add_(1)
    for one in (saved, outputs):
        one.move(group.pack)
    # What is a parameter stays the same object, which others fill.
    assert (saved.tensor is tensor) == (saved.away is None) == (kind != "plain")
    assert (outputs.tensors() == []) == (kind == "plain")
    assert outputs.are_changed() == (kind == "changed since")
    values, memory = tensor.detach().clone(), memory_of(tensor)
    if kind == "plain":
        del tensor
        group.packed_inputs()
        road.drive()
        assert memory() is None
        assert torch.equal(saved.unpack(), values)
        (found,) = outputs.give([], torch.empty(0, requires_grad=True))
        assert torch.equal(found, values)
        assert road.copies() == (1, 1)


def test_what_a_run_kept_and_others_changed(road):
    tensor = torch.randn(64)
    saved, group = RunSaved("a module"), road.begin()
    saved.hold(tensor)
    outputs = Outputs([tensor], SimpleNamespace(index_of=lambda tensor: None))
    for one in (saved, outputs):
        one.move(group.pack)
    assert not outputs.are_changed()
    tensor.add_(1)
    assert outputs.are_changed()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.unpack()
