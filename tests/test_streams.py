"""Which devices have streams that copies can run on beside computation, and how long computation waited for them."""

import threading
from types import SimpleNamespace

import pytest
import torch

from ckpt_trainer import streams
from ckpt_trainer.streams import Accelerator, streams_of, why_not

CPU, NPU = torch.device("cpu"), torch.device("xpu", 0)


@pytest.fixture
def machine(monkeypatch):
    """A machine with the accelerator that a test says."""

    def has(kind, **module):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args: kind and torch.device(kind))
        monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(**module))

    return has


def described(**properties):
    return {"get_device_properties": lambda device: SimpleNamespace(**properties)}


def test_a_machine_without_accelerator(machine):
    machine(None)
    assert why_not(CPU) == "cpu is the host"
    assert why_not(torch.device("meta")) == "meta has no streams"
    assert streams_of(CPU) is None


def test_a_device_that_is_not_the_accelerator(machine):
    machine("xpu")
    assert why_not(CPU) == "cpu is the host"
    assert why_not(torch.device("meta")) == "meta has no streams"
    assert streams_of(torch.device("meta")) is None


def test_a_device_that_shares_its_memory_with_the_host(machine):
    machine("mps")
    assert why_not(torch.device("mps")) == "mps shares its memory with the host"
    machine("xpu", **described(name="Grace", is_integrated=True))
    assert why_not(NPU) == "Grace shares its memory with the host"
    machine("xpu", **described(is_integrated=1))
    assert why_not(NPU) == "xpu shares its memory with the host"
    assert streams_of(NPU) is None


@pytest.mark.parametrize("module", [{}, described(), described(is_integrated=False), described(is_integrated=0)])
def test_an_accelerator(machine, module):
    machine("xpu", **module)
    assert why_not(NPU) is None
    assert why_not(torch.device("xpu", 3)) is None
    for pinned in (True, False):
        found = streams_of(NPU, pinned)
        assert type(found) is Accelerator
        assert (found.device, found._pinned) == (NPU, pinned)
    assert streams_of(NPU)._pinned


def test_the_properties_are_those_of_the_device_in_question(machine):
    asked = []
    machine("xpu", get_device_properties=lambda device: asked.append(device) or SimpleNamespace(is_integrated=False))
    why_not(torch.device("xpu", 1))
    assert asked == [torch.device("xpu", 1)]


def test_here():
    accelerator = torch.accelerator.current_accelerator()
    assert (streams_of(CPU), why_not(CPU)) == (None, "cpu is the host")
    if accelerator is None:
        assert why_not(NPU) == "xpu has no streams"


# What an `Accelerator` does, with stubs for streams and events


class StubEvent:
    """Is over when a test says so. `clock` counts all that is recorded."""

    made = 0
    clock = 0

    def __init__(self, device=None, enable_timing=False):
        type(self).made += 1
        self.timed = enable_timing
        self.done = False
        self.at = None

    def record(self, stream):
        assert self.timed
        StubEvent.clock += 1
        self.at = StubEvent.clock
        self.done = False
        stream.did.append(("record", self.at))

    def query(self):
        return self.done

    def elapsed_time(self, other):
        assert self.at < other.at
        assert other.done
        return 1000.0 * (other.at - self.at)

    def synchronize(self):
        self.done = True


class StubStream:
    def __init__(self):
        self.did = []

    def wait_event(self, event):
        self.did.append(("wait", event))
        StubEvent.clock += 4

    def record_event(self):
        return StubEvent()

    def __enter__(self):
        self.did.append("enter")

    def __exit__(self, *args):
        self.did.append("exit")


@pytest.fixture
def stub(monkeypatch):
    StubEvent.made = StubEvent.clock = 0
    monkeypatch.setattr(torch, "Event", StubEvent)
    return Accelerator(NPU)


def finish(accelerator, number):
    for _, after in list(accelerator._waits)[:number]:
        after.done = True


def test_a_wait_that_is_not_counted(stub):
    stream, event = StubStream(), object()
    stub.wait(stream, event)
    assert stream.did == [("wait", event)]
    assert (stub.waited_seconds, StubEvent.made) == (0, 0)


def test_a_counted_wait_is_timed_around(stub):
    stream, event = StubStream(), object()
    stub.wait(stream, event, counted=True)
    assert stream.did == [("record", 1), ("wait", event), ("record", 6)]
    assert stub.waited_seconds == 0
    finish(stub, 1)
    assert stub.waited_seconds == 5
    assert stub.waited_seconds == 5


def test_waits_are_added_up_in_order_and_events_used_again(stub):
    stream = StubStream()
    for _ in range(3):
        stub.wait(stream, object(), counted=True)
    assert StubEvent.made == 6
    finish(stub, 2)
    assert stub.waited_seconds == 10
    stub.wait(stream, object(), counted=True)
    stub.wait(stream, object(), counted=True)
    assert StubEvent.made == 6
    stub.wait(stream, object(), counted=True)
    assert StubEvent.made == 8
    assert stub.waited_seconds == 10
    finish(stub, 4)
    assert stub.waited_seconds == 30
    assert not stub._waits


def test_a_later_wait_that_is_over_is_counted_once_those_before_are(stub):
    stream = StubStream()
    stub.wait(stream, object(), counted=True)
    stub.wait(stream, object(), counted=True)
    stub._waits[1][1].done = True
    assert stub.waited_seconds == 0
    stub._waits[0][1].done = True
    assert stub.waited_seconds == 10


def test_waits_of_several_threads(stub):
    """What another thread, or a finaliser, takes while one looks is counted once, by either."""
    stream, query = StubStream(), StubEvent.query
    for _ in range(4):
        stub.wait(stream, object(), counted=True)
    finish(stub, 4)
    nested = [True]

    def look_and_be_interrupted(event):
        if nested:
            nested.clear()
            other = threading.Thread(target=stub._add_up)
            other.start()
            other.join()
        return query(event)

    StubEvent.query = look_and_be_interrupted
    try:
        assert stub.waited_seconds == 20
        # The last one is taken in the meantime.
        stub.wait(stream, object(), counted=True)
        finish(stub, 1)
        nested.append(True)
        assert stub.waited_seconds == 25
    finally:
        StubEvent.query = query


def test_copies_run_on_their_stream_and_the_host_does_not_wait(stub):
    stream, asked = StubStream(), []

    class Target:
        def copy_(self, source, non_blocking):
            asked.append((source, non_blocking, list(stream.did)))

    stub.copy(Target(), "source", stream)
    assert asked == [("source", True, ["enter"])]
    assert stream.did == ["enter", "exit"]


def test_events_and_streams(stub, monkeypatch):
    current, asked = StubStream(), []
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: asked.append(device) or current)
    monkeypatch.setattr(torch, "Stream", lambda device: ("stream", device))
    assert stub.live() is stub.live() is current
    assert asked == [NPU, NPU]  # anew each time
    assert stub.new() == ("stream", NPU)
    event = stub.record(current)
    stub.synchronize(event)
    assert event.done


def test_memory(monkeypatch):
    asked, empty = [], torch.empty

    def note(*args, pin_memory=False, **options):
        asked.append((args, pin_memory, options))
        return empty(*args, dtype=options["dtype"])

    monkeypatch.setattr(streams.torch, "empty", note)
    for pinned in (True, False):
        memory = Accelerator(NPU, pinned).host(10)
        assert (memory.dtype, memory.numel()) == (torch.uint8, 10)
        assert asked.pop() == ((10,), pinned, {"dtype": torch.uint8, "device": "cpu"})
    Accelerator(NPU).empty(5)
    assert asked.pop() == ((5,), False, {"dtype": torch.uint8, "device": NPU})


def test_host_memory_is_on_the_host_and_can_be_written_anywhere():
    with torch.inference_mode(), torch.device("meta"):
        memory = Accelerator(NPU, pinned=False).host(10)
    assert memory.device == CPU
    memory.fill_(1)
    assert (memory._version, memory.is_inference()) == (1, False)
