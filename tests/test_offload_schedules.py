"""Offload on a device that delays copies: whatever the order of forwards and backwards, gradients are those of mode `full`,
no access races with a copy, and nothing is left over."""

import gc
import weakref
from collections import Counter
from contextlib import contextmanager
from functools import cache, partial
from itertools import product

import pytest
import torch
from fake_device import TIMINGS, FakeStreams
from tiny_models import CASES
from torch import nn

from ckpt_trainer import groups, handles, offload, streams
from ckpt_trainer.blocks import find_blocks
from ckpt_trainer.loop import checkpointing

MODELS = ("llama", "bert", "t5", "llava")
ROOMY, TINY = 2**22, 3 * 4096  # of host memory; a tensor takes 4096
INPUTS = {"mode": "offload", "host_budget": ROOMY}
RUNS = [("lazy", 0), *product(TIMINGS, (ROOMY, TINY))]


class Device:
    """The fake device in place of what the engine asks for, and what the engine made for it."""

    def __init__(self, patch):
        self.fake = FakeStreams()
        self.pools = []
        pack, get, stays = groups.Group.pack, handles.Moved.get, handles.Kept.get
        patch.setattr(groups, "MIN_BYTES", 16)  # more than a number, which is a tensor too
        self.packed_by = {}  # memory -> number of the group that was last to pack it
        self.altered = lambda fake: fake
        patch.setattr(streams, "streams_of", self._streams_of)
        patch.setattr(offload, "HostPool", self._pool_made_by(offload.HostPool))
        patch.setattr(groups.Group, "pack", lambda *args: self._pack(pack, *args))
        patch.setattr(handles.Moved, "get", lambda handle: self.fake.unpacking(get)(handle))
        patch.setattr(handles.Kept, "get", lambda handle: self.fake.unpacking(stays)(handle))

    def _streams_of(self, device, pinned=True):
        found = self.fake.streams_of(device, pinned)
        return found and self.altered(found)

    def _pack(self, pack, group, tensor):
        self.packed_by[self.fake.made(tensor)] = group.number
        return pack(group, tensor)

    def _pool_made_by(self, make):
        def pool(*args, **options):
            self.pools.append(make(*args, **options))
            return self.pools[-1]

        return pool

    def start(self, timing="lazy", seed=0, **options):
        """A fresh device."""
        self.fake = FakeStreams(timing, seed, **options)
        self.pools.clear()
        self.packed_by = {}
        return self.fake

    def assert_clean(self, training):
        """No graph is alive: nothing raced, and nothing is left over."""
        assert self.fake.races == []
        assert self.fake.device_bytes == 0
        assert [memory for memory in self.fake.alive("made") if memory.storage()._cdata not in training.own] == []
        assert [pool.in_use for pool in self.pools] == [0] * len(self.pools)
        self.fake.finish()
        assert (self.fake.races, self.fake.pending) == ([], 0)


@pytest.fixture
def device(monkeypatch):
    gc.disable()  # What is left over must not wait for it.
    yield Device(monkeypatch)
    gc.enable()


class Boom(Exception):
    pass


@cache
def model_of(name):
    return CASES[name].build()


class Training:
    """A model, and what the schedules do with it.

    Args:
        name: In `CASES`.
        fake: The device, for schedules on several streams.
    """

    def __init__(self, name, fake=None):
        self.fake = fake or FakeStreams()
        self.model = model_of(name)
        self.model.zero_grad()
        self.results = []
        batch = CASES[name].batch()
        self._batches = [batch, {name: value.flip(0) for name, value in batch.items()}]
        self.blocks = [block.module for block in find_blocks(self.model)]

    @property
    def own(self):
        """Addresses of what the model and its batches hold, what modules cached included."""
        batches = (tensor for batch in self._batches for tensor in batch.values())
        held = (value for module in self.model.modules() for value in vars(module).values())
        tensors = (*batches, *self.model.parameters(), *self.model.buffers(), *held)
        return {tensor.untyped_storage()._cdata for tensor in tensors if isinstance(tensor, torch.Tensor)}

    def loss(self, number):
        """Of one micro-batch, with a dropout of its own."""
        torch.manual_seed(number)
        return self.model(**self._batches[number % 2])["loss"]

    def collect(self):
        self.results += [parameter.grad for parameter in self.model.parameters()]
        self.model.zero_grad()


def plain_step(training):
    training.loss(0).backward()


def accumulation(training):
    training.loss(0).backward()
    training.loss(1).backward()


def two_forwards(training):
    (training.loss(0) + training.loss(1)).backward()


def interleaved(training):
    first, second = training.loss(0), training.loss(1)
    first.backward()
    third = training.loss(2)
    second.backward()
    third.backward()


def in_reverse(training):
    first, second, third = training.loss(0), training.loss(1), training.loss(2)
    third.backward()
    second.backward()
    first.backward()


def retain_graph(training):
    loss = training.loss(0)
    loss.backward(retain_graph=True)
    training.loss(1).backward()
    loss.backward(retain_graph=True)
    loss.backward()


def dropped_graph(training):
    training.loss(0)
    kept, dropped = training.loss(0), training.loss(1)
    torch.autograd.grad(dropped, last_parameter(training), retain_graph=True)
    del dropped
    kept.backward()


def no_grad_between(training):
    loss = training.loss(0)
    with torch.no_grad():
        training.loss(1)
    loss.backward()


def exception_in_forward(training):
    inner = next(module for module in training.blocks[-1].modules() if isinstance(module, nn.Linear))
    loss = training.loss(0)
    with hooked(inner.register_forward_hook(fail)), pytest.raises(Boom):
        training.loss(1)
    loss.backward()


def exception_in_backward(training):
    middle = training.blocks[len(training.blocks) // 2]
    with hooked(middle.register_forward_hook(fail_in_backward)):
        loss = training.loss(0)
    with pytest.raises(Boom):
        loss.backward()
    del loss
    training.loss(1).backward()


def early_stop(training):
    training.results += torch.autograd.grad(training.loss(0), last_parameter(training))
    loss = training.loss(1)
    training.results += torch.autograd.grad(loss, last_parameter(training), retain_graph=True)
    loss.backward()


def last_parameter(training):
    return list(training.blocks[-1].parameters())[-1]


@contextmanager
def hooked(hook):
    try:
        yield
    finally:
        hook.remove()


def fail(*args):
    raise Boom


def fail_in_backward(module, args, output):
    (output if isinstance(output, torch.Tensor) else output[0]).register_hook(fail)


SCHEDULES = (
    plain_step, accumulation, two_forwards, interleaved, in_reverse, retain_graph, dropped_graph, no_grad_between,
    exception_in_forward, exception_in_backward, early_stop,
)  # fmt: skip
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.__name__)


def gradients(name, schedule, steps=1, between=lambda training: None, fake=None, **flags):
    training = Training(name, fake)
    with checkpointing(training.model, **flags):
        for _ in range(steps):
            schedule(training)
            training.collect()
            between(training)
    return training.results


@cache
def expected(name, schedule, steps=1):
    if steps == 1:
        return (both := expected(name, schedule, 2))[: len(both) // 2]
    return gradients(name, schedule, steps, mode="full")


def assert_same(got, wanted):
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@every_schedule
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_each_schedule(device, name, schedule):
    for timing, cap in RUNS:
        device.start(timing, seed=cap)
        steps, slabs = 1 + (timing == "lazy" and cap > 0), []

        def between(training, slabs=slabs):
            device.assert_clean(training)
            slabs.append([pool.slabs for pool in device.pools])

        got = gradients(name, schedule, steps, between, mode="offload", host_budget=cap)
        assert_same(got, expected(name, schedule, steps))
        assert slabs == slabs[:1] * steps  # none is new after the first step
        assert (device.fake.num_copies("out") > 0) == (cap > 0)
        assert device.fake.host_bytes <= cap


SAVES = ("attention", "expensive", "all")


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("schedule", [interleaved, retain_graph, exception_in_backward], ids=lambda one: one.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_with_more_than_the_inputs(device, name, schedule, save):
    for timing, cap in (("lazy", ROOMY), ("random", TINY))[schedule is retain_graph :]:
        device.start(timing)
        flags = {"mode": "offload", "offload_save": save, "host_budget": cap}
        assert_same(gradients(name, schedule, between=device.assert_clean, **flags), expected(name, schedule))
        assert device.fake.num_copies("out") > 0


@pytest.mark.parametrize("prefetch", [0, 2, 100])
def test_any_prefetch_is_exact(device, prefetch):
    for schedule in (interleaved, in_reverse, retain_graph, early_stop):
        device.start("lazy")
        flags = {**INPUTS, "prefetch": prefetch}
        assert_same(gradients("llama", schedule, between=device.assert_clean, **flags), expected("llama", schedule))


@pytest.mark.parametrize("name", [name for name in CASES if name not in MODELS])
def test_every_other_architecture(device, name):
    device.start("lazy")
    got = gradients(name, interleaved, between=device.assert_clean, **INPUTS)
    assert_same(got, expected(name, interleaved))


def streams_of(training):
    """Two streams that know the parameters."""
    fake = training.fake
    for tensor in (*training.model.parameters(), *training.model.buffers()):
        fake.made(tensor)
    streams = fake.new(), fake.new()
    for stream in streams:
        fake.wait(stream, fake.record(fake.live()))
    return streams


def two_streams(training):
    """Graphs that take turns, each on a stream of its own."""
    (first, second), on_stream = streams_of(training), training.fake.on_stream
    with on_stream(first):
        one = training.loss(0)
    with on_stream(second):
        training.loss(1).backward()  # brings back what the other graph has, and does not use it
    with on_stream(first):
        third = training.loss(2)
        one.backward(retain_graph=True)
    with on_stream(second):
        training.loss(3).backward()
    with on_stream(first):
        one.backward()
        third.backward()


def block_on_another_stream(training):
    """One block alone, on a stream that waited for no copy, while a graph is on the way."""
    (first, second), on_stream = streams_of(training), training.fake.on_stream
    with on_stream(first):
        loss = training.loss(0)
    with on_stream(second):
        (hidden,) = training.blocks[0](torch.ones(2, 12, 32, requires_grad=True))
        hidden.sum().backward()
    with on_stream(first):
        loss.backward()


def tensor_on_two_streams(training):
    """A tensor that blocks on two streams are given."""
    torch.manual_seed(0)
    (first, second), on_stream = streams_of(training), training.fake.on_stream
    with on_stream(first):
        given = torch.ones(2, 12, 32, requires_grad=True) * 2
        (one,) = training.blocks[0](given)
    training.fake.wait(second, training.fake.record(first))
    with on_stream(second):
        for block in training.blocks:
            (given,) = block(given)
    with on_stream(first):
        one.sum().backward(retain_graph=True)
        del one
    with on_stream(second):
        given.sum().backward()


@pytest.mark.parametrize("save", ["inputs", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_several_streams_that_compute(device, name, save):
    for timing, cap in (("lazy", ROOMY), ("random", TINY)):
        fake = device.start(timing)
        flags = {"mode": "offload", "offload_save": save, "host_budget": cap}
        got = gradients(name, two_streams, between=device.assert_clean, fake=fake, **flags)
        assert_same(got, expected(name, two_streams))


def test_a_tensor_that_two_streams_use(device):
    fake = device.start("lazy")
    got = gradients("plain_transformer", tensor_on_two_streams, fake=fake, **INPUTS)
    assert_same(got, expected("plain_transformer", tensor_on_two_streams))
    assert fake.races == []


def test_host_memory_that_the_system_refuses(device):
    for limit in (0, 2 * 4096):
        fake = device.start("lazy", host_limit=limit)
        got = gradients("llama", interleaved, between=device.assert_clean, mode="offload", host_budget=3 * 4096)
        assert_same(got, expected("llama", interleaved))
        assert fake.host_bytes <= limit


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_what_goes_on_to_disk(device, tmp_path, name):
    for schedule, timing in product((interleaved, retain_graph, dropped_graph), ("lazy", "random")):
        device.start(timing)
        flags = {"mode": "offload", "host_budget": TINY, "offload_to": "disk", "offload_dir": str(tmp_path)}
        assert_same(gradients(name, schedule, between=device.assert_clean, **flags), expected(name, schedule))
        assert device.fake.num_copies("out") > TINY // 4096
    assert list(tmp_path.iterdir()) == []


class Residency:
    """How many block inputs are on the device, looked at whenever there is one more."""

    def __init__(self, fake, nbytes):
        self.fake = fake
        self.nbytes = nbytes
        self.samples = []
        fake.on_growth = self.look

    def begin_anew(self, *args):
        self.earlier, self.samples = self.samples, []

    def look(self, *args):
        alive = [memory for memory in self.fake.alive("made", "empty") if memory.nbytes == self.nbytes]
        self.samples.append(len(alive))


@pytest.mark.parametrize("prefetch", [0, 1, 2, 3])
def test_block_inputs_on_the_device_at_any_time(device, prefetch):
    model = CASES["plain_transformer"].build(num_layers=10)
    batch = CASES["plain_transformer"].batch()
    residency = Residency(device.start("lazy"), nbytes=4 * 32 * batch["input_ids"].numel())
    for module in model.modules():
        module.register_forward_pre_hook(residency.look)
        module.register_full_backward_hook(residency.look)
    with checkpointing(model, **INPUTS, prefetch=prefetch):
        loss = model(**batch)["loss"]
        # The newest, one on its way, and what the next block has just packed.
        assert max(residency.samples) == 1 + 1 + 1
        for again in (True, False):
            residency.samples = []
            with hooked(model.blocks[-1].norm1.register_forward_pre_hook(residency.begin_anew)):
                loss.backward(retain_graph=again)
            # What is on its way is awaited when the last block asks for its input.
            assert max(residency.earlier) <= 1 + max(1, prefetch)
            # Then there is one in use, those ahead, and the newest as long as its graph is kept.
            assert max(residency.samples) == 1 + prefetch + again
            assert len(residency.samples) > 10 * 10
    residency.look()
    assert residency.samples[-1] == 0


def test_what_was_reloaded_ahead_in_vain_is_given_up(device):
    fake = device.start("lazy")
    training = Training("plain_transformer")
    with checkpointing(training.model, **INPUTS):
        waiting = training.loss(0)
        training.loss(1).backward()
        in_vain = fake.alive("empty")
        assert len(in_vain) == 1  # of the graph before
        training.loss(2).backward()
        assert not set(in_vain) & set(fake.alive("empty"))
        training.loss(3).backward()
    assert fake.device_bytes == 0
    waiting.backward()
    del waiting
    device.assert_clean(training)


def t5_of(layers):
    config = CASES["t5"].build().config
    config.num_layers = config.num_decoder_layers = layers
    return type(CASES["t5"].build())(config).train()


@pytest.mark.parametrize("build", [lambda: t5_of(4), CASES["bert"].build], ids=("t5", "bert"))
def test_each_storage_is_copied_once(device, build):
    fake = device.start("lazy")
    model = build()
    with checkpointing(model, **INPUTS):
        loss = model(**CASES[model.config.model_type].batch())["loss"]
        copied = Counter(copy.source for copy in fake.copies)
        newest = max(device.packed_by.values())
        stay = {memory for memory, group in device.packed_by.items() if group == newest}
        assert set(copied.values()) == {1}
        assert set(copied) == set(fake.packs) - stay
        assert sum(fake.packs.values()) > len(fake.packs)
        assert sum(copy.nbytes for copy in fake.copies) == sum(memory.nbytes for memory in copied)
        loss.backward()
    assert fake.num_copies("out") == len(copied)


@pytest.mark.parametrize("timing", ["lazy", "eager"])
@pytest.mark.parametrize("block", range(4))
def test_a_change_in_place_raises_whenever_the_copy_runs(device, timing, block):
    fake = device.start(timing)
    training, inputs = Training("plain_transformer"), []
    watch = training.blocks[block].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with hooked(watch), checkpointing(training.model, **INPUTS):
        for again in (False, True):
            loss = training.loss(0)
            assert fake.num_copies("out") == 3 * (1 + again)
            if again:
                loss.backward(retain_graph=True)
            with torch.no_grad():
                inputs.pop().add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
            del loss
            device.assert_clean(training)


class Altered:
    """The fake device as an engine sees it that leaves something out.

    Args:
        fake: The device.
        dropped: (who, for whom) of waits that are left out, each of them `outward`, `inward` or `compute`.
        cached: The live stream is asked for once.
    """

    def __init__(self, fake, dropped=(), cached=False):
        self._fake = fake
        self._dropped = dropped
        self._first = fake.live() if cached else None
        self._roles = {}

    def __getattr__(self, name):
        return getattr(self._fake, name)

    def new(self):
        stream = self._fake.new()
        self._roles[stream.number] = ("outward", "inward")[len(self._roles)]
        return stream

    def live(self):
        return self._first or self._fake.live()

    def wait(self, stream, event, counted=False):
        who = tuple(self._roles.get(number, "compute") for number in (stream.number, event.stream))
        if who not in self._dropped:
            self._fake.wait(stream, event, counted)


def leaving_out(*dropped, **options):
    def mutate(device, patch):
        device.altered = partial(Altered, dropped=dropped, **options)

    return mutate


def drops_what_it_reloaded_at_once(device, patch):
    patch.setattr(groups.Use, "drop", lambda use: setattr(use, "loaded", None))


def knows_memory_by_its_address(device, patch):
    addresses, free, chunks = {}, list(range(1000)), {}

    def address(tensor):
        """As of an allocator that gives out again at once what was freed last."""
        storage = tensor.untyped_storage()
        if storage._cdata not in addresses:
            addresses[storage._cdata] = free.pop()
            weakref.finalize(storage, lambda key: free.append(addresses.pop(key)), storage._cdata).atexit = False
        return addresses[storage._cdata]

    def known(tensor, channel, start, end):
        return chunks.get((address(tensor), start, end), lambda: None)()

    def remember(tensor, chunk):
        chunks[address(tensor), chunk.start, chunk.start + chunk.nbytes] = weakref.ref(chunk)

    patch.setattr(groups, "known_chunk", known)
    patch.setattr(groups, "remember_chunk", remember)


MUTATIONS = {
    "outward copy before its source is computed": leaving_out(("outward", "compute")),
    "source given up while it is copied": leaving_out(("compute", "outward")),
    "inward copy before the outward one": leaving_out(("inward", "outward")),
    "inward copy to memory still in use": leaving_out(("inward", "compute")),
    "use before the inward copy is over": leaving_out(("compute", "inward")),
    "host memory used again at once": leaving_out(("outward", "inward"), ("outward", "outward")),
    "live stream asked for once": leaving_out(cached=True),
    "reloaded ahead and dropped at once": drops_what_it_reloaded_at_once,
    "memory known by its address": knows_memory_by_its_address,
}


CATCHERS = (
    ("llama", plain_step, {}),
    ("llama", early_stop, {}),
    ("llama", two_streams, {}),
    ("plain_transformer", block_on_another_stream, {"prefetch": 3}),
)


def caught_by(device):
    for name, schedule, flags in CATCHERS:
        fake = device.start("lazy")
        got = gradients(name, schedule, fake=fake, **INPUTS, **flags)
        fake.finish()
        if fake.races or not all(map(torch.equal, got, expected(name, schedule))):
            return schedule
    return None


def test_nothing_is_caught_where_no_rule_is_left_out(device):
    assert caught_by(device) is None


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_rule_left_out_is_caught(device, monkeypatch, mutation):
    MUTATIONS[mutation](device, monkeypatch)
    assert caught_by(device) is not None


def test_versions_not_looked_at_are_caught(device, monkeypatch):
    monkeypatch.setattr(handles.Moved, "changed", False)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_a_change_in_place_raises_whenever_the_copy_runs(device, "eager", 1)


def test_any_number_of_copies_at_once_is_caught(device, monkeypatch):
    monkeypatch.setattr(offload, "_IN_FLIGHT", 100)
    with pytest.raises(AssertionError):
        test_block_inputs_on_the_device_at_any_time(device, 1)
