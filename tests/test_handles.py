"""A handle gives the tensor back as it looked, wherever its bytes were meanwhile, or raises as autograd does."""

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from fake_device import TIMINGS, FakeStreams
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_gather_tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from ckpt_trainer import streams
from ckpt_trainer.handles import Kept, Moved, Sharded, bytes_range, handles_in, mapped, returned, unpack
from ckpt_trainer.offload import Offloading


class Road:
    """One device and groups of it, as blocks make them.

    Args:
        patch: Puts the fake device in place.
        timing: When its copies run.
        cap: Bytes of host memory.
    """

    def __init__(self, patch, timing="eager", cap=2**22, min_bytes=0, **options):
        self.fake = FakeStreams(timing)
        patch.setattr(streams, "streams_of", self.fake.streams_of)
        patch.setattr("ckpt_trainer.groups.MIN_BYTES", min_bytes)
        self.offloading = Offloading(lambda: cap, **options)
        self.later = []

    def begin(self, own=()):
        return self.offloading.begin([torch.empty(0)], own)

    def pack(self, *tensors):
        """Pack in a group of their own; older groups leave."""
        group = self.begin()
        packed = [group.pack(self.made(tensor)) for tensor in tensors]
        group.packed_inputs()
        return packed if len(tensors) > 1 else packed[0]

    def made(self, tensor):
        """The device has computed the tensor, if it is one of its."""
        part = tensor.to_local() if type(tensor) is DTensor else tensor
        if type(part) in (torch.Tensor, nn.Parameter) and part.layout is torch.strided and not part.is_inference():
            self.fake.made(part)
        return tensor

    def drive(self, number=3):
        """Further blocks run, so that all that was packed before is given up."""
        for _ in range(number):
            group = self.begin()
            self.later.append(group.pack(self.made(torch.zeros(2048))))
            group.packed_inputs()
            group.ended()

    def counts(self):
        return self.offloading.counts

    def copies(self):
        """Copies out and in, but for those of `drive`."""
        out = [copy.way for copy in self.fake.copies if copy.nbytes != 8192]
        return out.count("out"), out.count("in")

    def kept(self):
        """Why -> number of tensors."""
        return {why: number for why, (number, _) in self.counts().kept.items()}


@pytest.fixture
def road(monkeypatch):
    return Road(monkeypatch)


@pytest.fixture
def road_of(monkeypatch):
    return partial(Road, monkeypatch)


def bits(tensor):
    """The bytes of the elements, whatever their type."""
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor)
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_looks(found, wanted, values):
    assert (found.dtype, found.device, found.size(), found.stride()) == (
        wanted.dtype,
        wanted.device,
        wanted.size(),
        wanted.stride(),
    )
    assert torch.equal(bits(found), values)
    assert not found.requires_grad
    assert type(found) is torch.Tensor
    assert found.layout is torch.strided


BASE = (6, 8, 10)
GEOMETRIES = {
    **{f"permuted {order}": partial(torch.permute, dims=order) for order in itertools.permutations(range(3))},
    "offset": lambda x: x[1:],
    "row": lambda x: x[3],
    "narrow": lambda x: x[..., 3:7],
    "every second": lambda x: x[:, ::2],
    "first third of a fused projection": lambda x: x.view(48, 10).chunk(2, -1)[0],
    "last of a fused projection": lambda x: x.view(16, 3, 10).unbind(1)[2].transpose(0, 1),
    "expanded": lambda x: x[:1].expand(4, 8, 10),
    "expanded, with gaps": lambda x: x[:, :1].expand(6, 8, 10),
    "expanded before": lambda x: x.unsqueeze(0).expand(3, *BASE),
    "overlapping": lambda x: x.flatten().as_strided((20, 8), (3, 1), 5),
    "overlapping, with gaps": lambda x: x.flatten().as_strided((40, 3), (7, 2), 3),
    "overlapping twice": lambda x: x.flatten().as_strided((5, 5, 5), (1, 1, 1), 9),
    "diagonal": lambda x: x[0].diagonal(),
    "scalar": lambda x: x[2, 3, 4],
    "size of one": lambda x: x[:, 2:3, 4:5],
    "odd stride of a single element": lambda x: x.as_strided((1, 7), (1000, 1), 11),
    "flat": lambda x: x.flatten(),
    "unfolded": lambda x: x.flatten().unfold(0, 5, 2),
}


@pytest.mark.parametrize("cap", [2**22, 0])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometry(road_of, geometry, cap):
    road = road_of(cap=cap)
    base = torch.randn(BASE)
    tensor = GEOMETRIES[geometry](base)
    values, pattern = bits(tensor).clone(), torch.empty_strided(tensor.size(), tensor.stride())
    aligned = tensor.storage_offset() * 4 % 512
    handle = road.pack(tensor)
    assert_looks(handle.get(), pattern, values)
    moves = isinstance(handle, Moved)
    assert moves == (bytes_range(tensor) is not None)
    del base, tensor
    road.drive()
    for _ in range(2):
        found = handle.get()
        assert_looks(found, pattern, values)
        assert found.storage_offset() * 4 % 512 == aligned
        assert found.untyped_storage().nbytes() <= 6 * 8 * 10 * 4 + 16
        del found  # else it would serve again
    assert road.fake.races == []
    assert road.copies() == ((1, 2) if moves and cap else (0, 0))


# Not those without kernels: bits, parts of bytes, quantized ones.
_NAMES = (
    "bool complex128 complex32 complex64 float16 float32 float64 bfloat16 int8 int16 int32 int64 uint8 uint16 uint32"
)
_NAMES += " uint64 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
DTYPES = [getattr(torch, name) for name in _NAMES.split()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype(road, dtype):
    noise = torch.randint(0, 2 if dtype is torch.bool else 256, (64 * dtype.itemsize,), dtype=torch.uint8)
    tensor = noise.view(dtype).view(8, 8).t()[1:]
    values, pattern = bits(tensor).clone(), torch.empty_strided((7, 8), (1, 8), dtype=dtype)
    handle = road.pack(tensor)
    del noise, tensor
    road.drive()
    for _ in range(2):
        assert_looks(handle.get(), pattern, values)
    assert road.copies() == (1, 2)
    assert road.fake.races == []


def test_views_as_other_dtypes_share_a_chunk(road):
    x = torch.randn(16, 8, dtype=torch.complex64)
    views = [x, torch.view_as_real(x), x.view(torch.float64), torch.view_as_real(x).view(torch.uint8)[3, 2, 1:7]]
    values = [bits(view).clone() for view in views]
    handles = road.pack(*views)
    del x, views
    road.drive()
    for handle, value in zip(handles, values, strict=True):
        assert torch.equal(bits(handle.get()), value)
    assert road.copies() == (1, 1)


def test_storage_offset_of_a_tensor_that_is_no_view(road):
    storage = torch.arange(1000, dtype=torch.int16).untyped_storage()
    tensor = torch.empty(0, dtype=torch.int32).set_(storage, 301, (5, 3), (3, 1))
    values = bits(tensor).clone()
    handle = road.pack(tensor)
    pattern = tensor.clone()
    del storage, tensor
    road.drive()
    assert_looks(handle.get(), pattern, values)
    # From the last multiple of 512 bytes on.
    assert [copy.nbytes for copy in road.fake.copies if copy.nbytes != 8192] == [301 * 4 + 60 - 1024] * 2


RANGES = {
    "whole": (lambda x: x, (0, 1920)),
    "offset": (lambda x: x[4:], (1280 - 256, 1920)),
    "offset below the alignment": (lambda x: x[1:3], (0, 960)),
    "one element": (lambda x: x[5, 7, 9], (1536, 1920)),
    "empty": (lambda x: x[:0], None),
    "half with gaps": (lambda x: x[:, ::2], (0, 1920)),
    "an eighth with gaps": (lambda x: x.flatten()[::8], (0, 1920)),
    "a tenth with gaps": (lambda x: x[..., 0], None),
    "expanded": (lambda x: x[0, 0].expand(1000, 10), (0, 40)),
    "expanded, with gaps": (lambda x: x[:, 0, 0, None].expand(6, 1000), None),
    "overlapping": (lambda x: x.as_strided((9, 9), (1, 1), 0), (0, 17 * 4)),
}


@pytest.mark.parametrize("case", RANGES)
def test_bytes_that_have_to_leave(case):
    make, wanted = RANGES[case]
    assert bytes_range(make(torch.empty(BASE))) == wanted


# Versions

CHANGES = {
    "itself": lambda x: x.add_(1),
    "a view": lambda x: x[0].zero_(),
    "an alias": lambda x: x.detach().mul_(2),
    "out=": lambda x: torch.exp(torch.zeros_like(x), out=x),
    "an index": lambda x: x.__setitem__((0, 0), 5.0),
    "foreach": lambda x: torch._foreach_add_([x], 1.0),
    "copy": lambda x: x.copy_(torch.zeros_like(x)),
}
TEXT = (
    r"one of the variables needed for gradient computation has been modified by an inplace operation: "
    r"\[float32 \[16, 4\]\] is at version 1; expected version 0 instead\."
)


def text_of_autograd():
    x = torch.ones(16, 4)
    y = (torch.ones(16, 4, requires_grad=True) * x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError) as caught:
        y.backward()
    return str(caught.value)


def test_the_text_is_that_of_autograd():
    theirs, (before, after) = text_of_autograd(), TEXT.replace("\\", "").split("[float32 [16, 4]]")
    assert before in theirs
    assert after.rstrip(".") in theirs


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("moment", ["before the copy", "once it left", "once it came back", "once it was lent"])
@pytest.mark.parametrize("change", CHANGES)
def test_change_in_place(road_of, change, moment, timing):
    road = road_of(timing)
    x = torch.randn(16, 4)
    handle, packed_view = road.pack(x, x.t())
    if moment != "before the copy":
        road.drive()
    if moment == "once it came back":
        handle.get(), packed_view.get()
    lent = handle.get() if moment == "once it was lent" else None
    assert not handle.changed
    with torch.no_grad():
        CHANGES[change](x)
    for packed, text in ((handle, TEXT), (packed_view, TEXT.replace("16, 4", "4, 16"))):
        assert packed.changed
        for _ in range(2):
            with pytest.raises(RuntimeError, match=text):
                packed.get()
    del lent


@pytest.mark.parametrize("change", CHANGES)
def test_change_in_place_of_what_is_kept(road_of, change):
    road = road_of(min_bytes=2**20)
    x = torch.randn(16, 4)
    result = x.clone().requires_grad_() * 2
    for tensor in (x, result):
        handle = road.pack(tensor)
        assert type(handle) is Kept
        assert handle.get().data_ptr() == tensor.data_ptr()
        with torch.no_grad():
            CHANGES[change](tensor)
        assert handle.changed
        with pytest.raises(RuntimeError, match=TEXT):
            handle.get()


def test_versions_are_those_when_it_was_packed(road):
    x = torch.randn(64)
    x.add_(1), x.add_(1)
    first = road.pack(x)
    assert not first.changed
    x.add_(1)
    second = road.pack(x)
    assert first.changed
    assert torch.equal(second.get(), x)
    with pytest.raises(RuntimeError, match="is at version 3; expected version 2"):
        first.get()
    road.drive()
    assert torch.equal(second.get(), x)


def test_change_once_the_source_died(road):
    x = torch.randn(64)
    handle = road.pack(x)
    road.drive()
    x.data = torch.zeros(3)  # the memory is gone, who counts versions is not
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        handle.get()


def test_what_is_lent_from_its_own_memory_counts_with_it(road):
    x = torch.randn(64)
    handle = road.pack(x)
    handle.get().add_(1)
    assert x._version == 1
    assert handle.changed


@pytest.mark.parametrize("together", [False, True])
def test_what_was_written_after_it_was_lent_is_brought_back_anew(road, together):
    x = torch.randn(64)
    values = x.clone()
    handles = [*road.pack(x, x.view(8, 8))] if together else [road.pack(x), road.pack(x)]
    del x
    road.drive()
    lent = handles[0].get()
    lent.add_(1)
    assert lent._version == 1 + values._version + 1  # the copy, and this
    found = [handle.get() for handle in reversed(handles)]
    assert all(torch.equal(tensor.flatten(), values) for tensor in found)
    assert [handle.changed for handle in handles] == [False, False]
    # What came back the second time serves both.
    assert road.copies() == (1, 2)
    assert found[0].data_ptr() == found[1].data_ptr() != lent.data_ptr()


def test_a_write_that_nobody_counts_is_not_seen(road):
    """As by autograd itself."""
    x = torch.randn(64)
    handle = road.pack(x)
    for _ in range(2):
        x.data.add_(1)
        assert torch.equal(handle.get(), x)
        road.drive()


def test_kept(road_of):
    road = road_of(min_bytes=2**20)
    leaf = nn.Parameter(torch.randn(4))
    assert road.pack(leaf).get() is leaf
    result = leaf * 2
    found = road.pack(result).get()
    assert (found.grad_fn, found.data_ptr()) == (None, result.data_ptr())
    with torch.inference_mode():
        inference = torch.ones(4)
    handle = road.pack(inference)
    with torch.inference_mode():
        inference.add_(1)
    assert handle.get() is inference
    assert not handle.changed


# What ops return

NESTED = (torch.ones(4), [torch.zeros(3), None, 7], ("text", (torch.ones(2),)))


def test_nested_results(road):
    values = mapped(torch.clone, NESTED)
    held = mapped(road.begin().pack, values)
    assert [type(handle) for handle in handles_in(held)] == [Moved] * 3
    again = returned(held)
    assert (type(again), type(again[1]), again[1][1:], again[2][0]) == (tuple, list, [None, 7], "text")
    for one, other in zip(
        (again[0], again[1][0], again[2][1][0]), (values[0], values[1][0], values[2][1][0]), strict=True
    ):
        assert torch.equal(one, other)
    assert returned(values)[0] is values[0]
    assert handles_in(values) == []
    assert unpack(held[0]).data_ptr() == values[0].data_ptr()


# Sharded tensors


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(mesh, *size):
    return distribute_tensor(torch.randn(size), mesh, [Shard(0)])


def test_the_local_part_of_a_sharded_tensor_moves(road, mesh):
    tensor = sharded(mesh, 8, 6).t()
    values, local = tensor.full_tensor().clone(), tensor.to_local().untyped_storage().nbytes()
    handle = road.pack(tensor)
    assert type(handle) is Sharded
    looks = (tensor.size(), tensor.stride(), tensor.placements, tensor.device_mesh, tensor.dtype)
    del tensor
    road.drive()
    assert road.fake.alive("made") == [] or all(memory.nbytes != local for memory in road.fake.alive("made"))
    for _ in range(2):
        found = handle.get()
        assert type(found) is DTensor
        assert (found.size(), found.stride(), found.placements, found.device_mesh, found.dtype) == looks
        assert torch.equal(found.full_tensor(), values)
        assert not found.requires_grad
        del found
    assert road.copies() == (1, 2)


def test_a_sharded_tensor_comes_back_without_graph(road, mesh):
    tensor = sharded(mesh, 8, 6).requires_grad_()
    for one in (tensor, tensor * 2):
        handle = road.pack(one)
        road.drive()
        assert (handle.get().requires_grad, handle.get().grad_fn) == (False, None)


def test_a_local_part_that_is_still_on_its_way_has_arrived(road, mesh):
    part = torch.randn(8, 6)
    tensor = DTensor.from_local(all_gather_tensor(part, 0, mesh), mesh, [Replicate()], run_check=False)
    assert type(tensor._local_tensor) is AsyncCollectiveTensor
    handle = road.pack(tensor)
    del tensor
    road.drive()
    assert torch.equal(handle.get().full_tensor(), part)
    assert road.copies()[0] == 1


def test_nested_results_that_are_sharded_or_stay(road_of, mesh):
    road = road_of(min_bytes=4096)
    values = [sharded(mesh, 32, 32), torch.randn(4), torch.randn(32, 32)]
    held = mapped(road.begin().pack, values)
    assert list(map(type, handles_in(held))) == [Sharded, Kept, Moved]
    again = returned(held)
    assert torch.equal(again[0].full_tensor(), values[0].full_tensor())
    assert torch.equal(again[1], values[1])
    assert torch.equal(again[2], values[2])


def test_change_in_place_of_a_sharded_tensor(road, mesh):
    tensor = sharded(mesh, 8, 6)
    first = road.pack(tensor)
    road.drive()
    tensor.add_(1)
    assert tensor.to_local()._version == 0  # which is why the whole is asked
    second = road.pack(tensor)
    again = road.pack(tensor)
    road.drive()
    for handle in (second, again):
        assert torch.equal(handle.get().full_tensor(), tensor.full_tensor())
    tensor[0].zero_()
    for handle in (first, second, again):
        assert handle.changed
        with pytest.raises(
            RuntimeError, match=r"modified by an inplace operation: \[float32 \[8, 6\]\] is at version 2"
        ):
            handle.get()
    plain = tensor.to_local()
    handle = road.pack(plain)
    road.drive()
    assert torch.equal(handle.get(), plain)


def test_a_sharded_tensor_that_was_written_is_not_what_its_part_was(road, mesh):
    tensor = sharded(mesh, 8, 6)
    road.later.append(road.pack(tensor.to_local()))
    road.drive()
    tensor.add_(1)
    values, handle = tensor.full_tensor().clone(), road.pack(tensor)
    del tensor
    road.drive()
    assert torch.equal(handle.get().full_tensor(), values)


def test_a_sharded_tensor_packed_twice_leaves_once(road, mesh):
    tensor = sharded(mesh, 8, 6)
    handles = road.pack(tensor, tensor), road.pack(tensor)
    road.drive()
    assert road.copies()[0] == 1
    for handle in (*handles[0], handles[1]):
        assert torch.equal(handle.get().full_tensor(), tensor.full_tensor())


def test_a_sharded_parameter_stays(road, mesh):
    weight = nn.Parameter(sharded(mesh, 8, 6))
    for tensor in (weight, weight.t(), weight[2:], weight.view(6, 8)):
        handle = road.pack(tensor)
        assert type(handle) is Kept
        assert torch.equal(handle.get().full_tensor(), tensor.full_tensor())
    assert road.pack(weight).get() is weight
    assert type(road.pack(weight * 2)) is Sharded


def test_gradients_of_sharded_tensors(road, mesh):
    x, weight = sharded(mesh, 8, 8).requires_grad_(), nn.Parameter(sharded(mesh, 8, 8))

    def loss():
        y = (x @ weight.t()).relu()
        return (y.exp() * y.sin()).sum()

    wanted = torch.autograd.grad(loss(), (x, weight))
    group = road.begin()
    with torch.autograd.graph.saved_tensors_hooks(group.pack, unpack):
        ours = loss()
    for memory in [chunk.chunk.source for chunk in group.uses()]:
        road.fake.made(memory)
    group.packed_inputs()
    road.drive()
    for found, other in zip(torch.autograd.grad(ours, (x, weight)), wanted, strict=True):
        assert torch.equal(found.full_tensor(), other.full_tensor())
    assert min(road.copies()) >= 3
    assert road.fake.races == []
