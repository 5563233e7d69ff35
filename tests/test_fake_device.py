"""The fake device delays copies, and its race detector sees each missing wait and no others."""

import pytest
import torch
from fake_device import TIMINGS, FakeStreams

N = 64
every_timing = pytest.mark.parametrize("timing", TIMINGS)


class Trip:
    """A tensor goes out and comes back, as it should; a test leaves steps out."""

    def __init__(self, fake, without=()):
        self.fake = fake
        self.without = without
        self.outward, self.inward = fake.new(), fake.new()
        self.host = fake.host(4096)

    def wait(self, rule, stream, event):
        if rule not in self.without:
            self.fake.wait(stream, event)

    def out(self, values, offset=0):
        fake = self.fake
        source = values.clone()
        fake.made(source)
        self.wait("outward after compute", self.outward, fake.record(fake.live()))
        fake.copy(self.host[offset : offset + N], source.view(torch.uint8), self.outward)
        self.left = fake.record(self.outward)
        self.wait("compute after outward", fake.live(), self.left)
        del source

    def back(self, offset=0):
        fake = self.fake
        memory = fake.empty(N)
        self.wait("inward after compute", self.inward, fake.record(fake.live()))
        self.wait("inward after outward", self.inward, self.left)
        fake.copy(memory, self.host[offset : offset + N], self.inward)
        self.arrived = fake.record(self.inward)
        self.wait("compute after inward", fake.live(), self.arrived)
        return memory

    def use(self, memory):
        self.fake.used(memory)
        return memory.view(torch.float32).clone()


def values(seed=0):
    return torch.randn(N // 4, generator=torch.Generator().manual_seed(seed))


def round_trip(fake, without=()):
    trip = Trip(fake, without)
    trip.out(values())
    got = trip.use(trip.back())
    fake.finish()
    return got


@every_timing
def test_a_correct_trip_has_no_race_and_brings_the_values_back(timing):
    for seed in range(5):
        fake = FakeStreams(timing, seed)
        assert torch.equal(round_trip(fake), values())
        assert fake.races == []
        assert (fake.num_copies("out"), fake.num_copies("in"), fake.pending) == (1, 1, 0)
        assert (fake.device_bytes, fake.peak, fake.host_buffers) == (0, N, 1)


RULES = {
    "outward after compute": "does not wait for: made memory 2 (64 bytes) is made",
    "compute after outward": "made memory 2 (64 bytes) dies",
    "inward after compute": "does not wait for: empty memory 3 (64 bytes) is empty",
    "compute after inward": "use of empty memory 3",
}


@every_timing
@pytest.mark.parametrize("rule", RULES)
def test_each_missing_wait_is_a_race_whatever_the_timing(rule, timing):
    fake = FakeStreams(timing)
    round_trip(fake, without=(rule,))
    assert any(RULES[rule] in race for race in fake.races), fake.races


@every_timing
def test_the_way_back_waits_for_the_way_out_by_one_stream_or_another(timing):
    fake = FakeStreams(timing)
    round_trip(fake, without=("inward after outward",))
    assert fake.races == []  # since compute waited for the outward copy, and the inward stream for compute
    round_trip(fake, without=("inward after outward", "compute after outward"))
    assert any("copy in of host memory" in race and "copy out of made memory" in race for race in fake.races)


def test_what_nobody_waited_for_has_wrong_values():
    for without in (
        ("compute after inward",),
        ("compute after outward", "inward after outward", "inward after compute"),
    ):
        got = round_trip(FakeStreams("lazy"), without)
        assert got.isnan().all()
    # With copies at once all of them come out right by luck.
    for rule in RULES:
        assert torch.equal(round_trip(FakeStreams("eager"), (rule,)), values())


def test_a_source_that_died_before_its_copy_is_read_as_nan():
    fake = FakeStreams("lazy")
    trip = Trip(fake, without=("compute after outward",))
    trip.host.zero_()
    trip.out(values())
    assert any("dies" in race for race in fake.races)
    assert trip.use(trip.back()).isnan().all()
    assert any("died before copy out" in race for race in fake.races)


@every_timing
def test_a_target_dropped_without_waiting(timing):
    fake = FakeStreams(timing)
    trip = Trip(fake)
    trip.out(values())
    trip.back()  # and dropped
    assert fake.races == []
    trip.without = ("compute after inward",)
    trip.back()
    assert any("empty memory" in race and "dies" in race for race in fake.races)


def test_a_target_taken_from_memory_that_is_still_written():
    fake = FakeStreams()
    trip = Trip(fake)
    trip.out(values())
    memory = trip.back()
    fake.copy(memory, trip.host[:N], trip.outward)
    assert any("copy in" in race and f"on stream {trip.inward.number}" in race for race in fake.races)


@every_timing
def test_host_memory_used_again_too_early(timing):
    fake = FakeStreams(timing)
    trip = Trip(fake)
    trip.out(values())
    memory = trip.back()
    trip.out(values(1))
    assert fake.races == []  # the outward stream waited for compute, which waited for the way back
    trip.use(memory)
    trip.without = ("compute after inward",)
    kept = trip.back()
    trip.out(values(2))
    assert len(fake.races) == 1
    assert "does not wait for: copy in of host memory" in fake.races[0]
    fake.wait(fake.live(), trip.arrived)
    del kept
    assert len(fake.races) == 1


def test_other_bytes_of_the_same_buffer_are_no_race():
    fake = FakeStreams()
    trip = Trip(fake, without=("compute after inward",))
    trip.out(values())
    kept = trip.back()
    trip.out(values(1), offset=N)
    assert fake.races == []
    trip.out(values(1), offset=N - 4)
    assert len(fake.races) == 1
    fake.wait(fake.live(), fake.record(trip.inward))
    del kept


def test_lazy_copies_run_when_they_are_waited_for_and_eager_ones_at_once():
    for timing, pending in (("lazy", 1), ("eager", 0)):
        fake = FakeStreams(timing)
        trip = Trip(fake, without=("compute after outward",))
        source = values()
        fake.made(source)
        fake.wait(trip.outward, fake.record(fake.live()))
        fake.copy(trip.host[:N], source.view(torch.uint8), trip.outward)
        event = fake.record(trip.outward)
        assert fake.pending == pending
        fake.wait(trip.inward, event)
        assert fake.pending == pending  # no stream computes there
        fake.wait(fake.live(), event, counted=True)
        assert (fake.pending, fake.waited_seconds) == (0, pending)
        assert torch.equal(trip.host[:N].view(torch.float32), source)
        assert fake.races == []


def test_random_copies_run_later_and_differ_by_seed():
    def delay(seed):
        fake = FakeStreams("random", seed)
        trip = Trip(fake)
        source = values()
        fake.copy(trip.host[:N], source.view(torch.uint8), trip.outward)
        for calls in range(100):
            if not fake.pending:
                return calls
            fake.record(fake.live())
        raise AssertionError("it never ran")

    delays = [delay(seed) for seed in range(20)]
    assert delays == [delay(seed) for seed in range(20)]
    assert len(set(delays)) > 3


def test_a_stream_runs_in_order_and_waits_for_what_it_was_told_to():
    for seed in range(20):
        fake = FakeStreams("random", seed)
        trip = Trip(fake)
        first, second = values(1), values(2)
        for source in (first, second):
            fake.copy(trip.host[:N], source.view(torch.uint8), trip.outward)
        memory = fake.empty(N)
        fake.wait(trip.inward, fake.record(trip.outward))
        fake.copy(memory, trip.host[:N], trip.inward)
        fake.finish()
        assert torch.equal(memory.view(torch.float32), second)


def test_the_host_may_wait():
    fake = FakeStreams("lazy")
    trip = Trip(fake, without=("compute after outward",))
    source = values()
    fake.made(source)
    fake.wait(trip.outward, fake.record(fake.live()))
    fake.copy(trip.host[:N], source.view(torch.uint8), trip.outward)
    fake.synchronize(fake.record(trip.outward))
    assert fake.pending == 0
    del source
    assert fake.races == []


def test_streams_that_compute_have_memory_of_their_own():
    fake = FakeStreams("lazy")
    trip = Trip(fake)
    other = fake.new()
    with fake.on_stream(other):
        assert fake.live() == other
        assert fake.live() is not fake.live()
        trip.out(values())
        memory = trip.back()
    assert fake.races == []
    fake.used(memory)
    assert len(fake.races) == 1  # the first stream knows nothing of it
    fake.wait(other, fake.record(fake.live()))
    del memory
    assert len(fake.races) == 1


def test_a_cached_stream_is_found():
    fake = FakeStreams("lazy")
    first = fake.live()
    trip = Trip(fake, without=("outward after compute",))
    with fake.on_stream(fake.new()):
        source = values()
        fake.made(source)
        fake.wait(trip.outward, fake.record(first))
        fake.copy(trip.host[:N], source.view(torch.uint8), trip.outward)
    assert len(fake.races) == 1


def test_a_tensor_packed_twice_is_not_made_twice():
    fake = FakeStreams("lazy")
    trip = Trip(fake, without=("compute after outward",))
    source = values()
    unpack = fake.unpacking(lambda tensor: tensor)
    memory = fake.made(source)
    fake.wait(trip.outward, fake.record(fake.live()))
    fake.copy(trip.host[:N], source.view(torch.uint8), trip.outward)
    assert fake.made(source) is memory
    assert unpack(source) is source
    assert fake.races == []  # all of them read it
    assert fake.packs == {memory: 2}
    fake.copy(trip.host[N : 2 * N], source.view(torch.uint8), trip.outward)
    assert fake.races == []  # to be packed again is to be read, not made
    fake.wait(fake.live(), fake.record(trip.outward))
    source.add_(1)
    fake.made(source)
    fake.copy(trip.host[:N], source.view(torch.uint8), trip.outward)
    assert len(fake.races) == 1
    fake.wait(fake.live(), fake.record(trip.outward))


def test_an_event_is_the_past_only():
    fake = FakeStreams()
    trip = Trip(fake, without=("compute after inward",))
    trip.out(values())
    early = fake.record(trip.inward)
    memory = trip.back()
    fake.wait(fake.live(), early)
    fake.used(memory)
    assert len(fake.races) == 1
    fake.wait(fake.live(), trip.arrived)
    fake.used(memory)
    assert len(fake.races) == 1


def test_what_covers_an_access_hides_it_only_if_it_comes_after():
    fake = FakeStreams()
    trip = Trip(fake)
    other = fake.new()
    memory = fake.empty(N)
    fake.wait(trip.inward, fake.record(fake.live()))
    fake.wait(other, fake.record(fake.live()))
    fake.copy(memory, trip.host[:N], trip.inward)
    fake.copy(trip.host[N : 2 * N], memory, trip.outward)  # not ordered, and covers it
    assert len(fake.races) == 1
    fake.wait(fake.live(), fake.record(trip.inward))
    fake.used(memory)  # in order, covers it, and reads
    fake.wait(other, fake.record(trip.outward))
    fake.copy(trip.host[2 * N : 3 * N], memory, other)
    assert len(fake.races) == 2
    assert "copy in" in fake.races[1].split("wait for")[1]


def test_a_part_that_is_written_leaves_the_rest_as_it_was():
    fake = FakeStreams()
    trip = Trip(fake)
    memory = fake.empty(N)
    fake.wait(trip.inward, fake.record(fake.live()))
    fake.copy(memory, trip.host[:N], trip.inward)
    fake.copy(memory[:8], trip.host[:8], trip.inward)
    fake.wait(fake.live(), fake.record(trip.inward))
    assert fake.races == []
    late = fake.new()
    fake.copy(trip.host[N : N + 8], memory[16:24], late)
    assert any("does not wait for: copy in" in race for race in fake.races)


def test_host_memory_stays_while_a_copy_is_on_its_way():
    fake = FakeStreams("lazy")
    trip = Trip(fake)
    memory = fake.empty(N)
    trip.host.zero_()
    fake.wait(trip.inward, fake.record(fake.live()))
    fake.copy(memory, trip.host[:N], trip.inward)
    del trip.host
    assert fake.host_bytes == 4096
    fake.wait(fake.live(), fake.record(trip.inward))
    assert memory.eq(0).all()
    assert (fake.host_bytes, fake.races) == (0, [])


def test_what_a_stream_was_told_to_wait_for_is_there_when_it_computes():
    fake = FakeStreams("lazy")
    trip = Trip(fake)
    stream = fake.new()
    memory = fake.empty(N)
    trip.host.zero_()
    fake.wait(trip.inward, fake.record(fake.live()))
    fake.copy(memory, trip.host[:N], trip.inward)
    fake.wait(stream, fake.record(trip.inward))
    assert fake.pending == 1
    with fake.on_stream(stream):
        assert memory.eq(0).all()


def test_memory_is_followed_until_it_dies():
    fake = FakeStreams()
    memory = fake.empty(N)
    part = memory[8:16].view(torch.float32)
    assert part.isnan().all()
    del memory
    assert fake.device_bytes == N
    del part
    assert fake.device_bytes == 0
    leaf = torch.ones(N, requires_grad=True)
    product = (leaf * 2).sin()  # autograd alone keeps what is made in between
    fake.made(product.grad_fn._saved_self)
    assert [one.nbytes for one in fake.alive("made")] == [4 * N]
    del product
    assert fake.alive("made") == []


def test_the_system_may_refuse_host_memory():
    fake = FakeStreams(host_limit=100)
    first = fake.host(60)
    with pytest.raises(RuntimeError, match="pinned"):
        fake.host(60)
    assert (fake.host_buffers, fake.host_bytes) == (1, 60)
    del first
    fake.host(60)


def test_copies_neither_bump_the_source_nor_show_in_dispatch_modes():
    fake = FakeStreams("lazy")
    trip = Trip(fake)
    source = values()
    fake.copy(trip.host[:N], source.view(torch.uint8), trip.outward)
    assert (source._version, trip.host._version) == (0, 1)
    assert fake.streams_of(torch.device("meta")) is None
    assert fake.streams_of(torch.device("cpu"), pinned=False) is fake
    assert fake.pinned is False
