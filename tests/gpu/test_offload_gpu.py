"""Mode offload on a real accelerator: the gradients of mode `full`, inputs gone from the device, copies beside computation,
nothing left over."""

import gc
from contextlib import contextmanager

import pytest
import torch
from on_device import (
    DEVICE,
    allocated,
    assert_same,
    empty_device,
    gradients,
    llama,
    needs_device,
    plain_step,
    repeatable,
    tokens,
)
from torch import nn

from ckpt_trainer import checkpointing, groups, streams
from ckpt_trainer.blocks import find_blocks
from ckpt_trainer.plan import TIERS

pytestmark = [pytest.mark.gpu, needs_device]
__all__ = ["empty_device", "repeatable"]  # fixtures

MIB = 2**20

# For what is about bytes: inputs of 4 MiB, which outweigh logits and gradients.
LAYERS, HIDDEN, LENGTH, INPUT = 12, 256, 8192, 8192 * 256 * 2
# On the device at most: the newest, two on their way, one reloaded ahead, one in use.
AROUND = 5


class Boom(Exception):
    pass


@pytest.fixture
def small(monkeypatch):
    """Tensors of any size are moved."""
    monkeypatch.setattr(groups, "MIN_BYTES", 0)


def accumulation(loss):
    loss(0).backward()
    loss(1).backward()


def two_forwards(loss):
    (loss(0) + loss(1)).backward()


def interleaved(loss):
    first, second = loss(0), loss(1)
    first.backward()
    third = loss(2)
    second.backward()
    third.backward()


def in_reverse(loss):
    first, second, third = loss(0), loss(1), loss(2)
    third.backward()
    second.backward()
    first.backward()


def retain_graph(loss):
    first = loss(0)
    first.backward(retain_graph=True)
    loss(1).backward()
    first.backward(retain_graph=True)
    first.backward()


def no_grad_between(loss):
    first = loss(0)
    with torch.no_grad():
        loss(1)
    first.backward()


def dropped_graph(loss):
    loss(1)
    first, second = loss(0), loss(1)
    del second
    first.backward()


def lengths_in_turns(loss):
    for number, length in enumerate((64, 24, 96, 64)):
        loss(number, length).backward()


@contextmanager
def on(stream, after=None):
    """Computation is enqueued on a stream, after what another one did (the live one, if none is named)."""
    stream.wait_stream(after or torch.accelerator.current_stream(DEVICE))
    with stream:
        yield
    torch.accelerator.current_stream(DEVICE).wait_stream(stream)


def other_stream(loss):
    with on(torch.Stream(DEVICE)):
        loss(0).backward()


def one_stream_each(loss):
    for number in range(3):
        with on(torch.Stream(DEVICE)):
            loss(number).backward()
    loss(3).backward()


def backward_on_another_stream(loss):
    forward, backward = torch.Stream(DEVICE), torch.Stream(DEVICE)
    with on(forward):
        first = loss(0)
    with on(backward, after=forward):
        first.backward()


SCHEDULES = (
    plain_step, accumulation, two_forwards, interleaved, in_reverse, retain_graph, no_grad_between, dropped_graph,
    lengths_in_turns, other_stream, one_stream_each, backward_on_another_stream,
)  # fmt: skip
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.__name__)


@pytest.mark.usefixtures("repeatable", "small")
class TestGradients:
    @every_schedule
    @pytest.mark.parametrize("save", ["inputs", *TIERS, "all"])
    def test_are_those_of_full(self, save, schedule):
        model = llama()
        expected, _ = gradients(model, schedule, steps=2, mode="full")
        found, report = gradients(model, schedule, steps=2, mode="offload", offload_save=save, host_budget="256MiB")
        assert_same(found, expected)
        assert report["offload"]["bytes_out"] > 0
        assert report["offload"]["host_bytes"] == 0

    @pytest.mark.parametrize("save", ["inputs", "attention", "all"])
    def test_with_dropout(self, save):
        model = llama(dropout=0.2)
        expected, _ = gradients(model, interleaved, mode="full")
        found, _ = gradients(model, interleaved, mode="offload", offload_save=save)
        assert_same(found, expected)

    @pytest.mark.parametrize("prefetch", [0, 1, 2, 100])
    def test_any_prefetch(self, prefetch):
        model = llama(layers=6)
        expected, _ = gradients(model, interleaved, mode="full")
        found, report = gradients(model, interleaved, mode="offload", prefetch=prefetch)
        assert_same(found, expected)
        assert (report["offload"]["prefetch_hits"] > 0) == (prefetch > 0)

    def test_under_autocast(self):
        model = llama(dtype=torch.float32)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            expected, _ = gradients(model, two_forwards, mode="full")
            found, report = gradients(model, two_forwards, mode="offload")
        assert_same(found, expected)
        assert report["offload"]["bytes_out"] > 0

    def test_pageable(self):
        model = llama()
        expected, _ = gradients(model, interleaved, mode="full")
        found, report = gradients(model, interleaved, mode="offload", offload_to="pageable")
        assert_same(found, expected)
        assert report["offload"]["bytes_out"] > 0

    @pytest.mark.parametrize(("save", "budget"), [("inputs", "24KiB"), ("all", "96KiB")])
    def test_to_disk(self, save, budget, tmp_path):
        model = llama()
        expected, _ = gradients(model, interleaved, mode="full")
        # An input takes 8 KiB: most of what leaves has to go on.
        to = {"offload_to": "disk", "offload_dir": str(tmp_path), "host_budget": budget}
        found, report = gradients(model, interleaved, mode="offload", offload_save=save, **to)
        assert_same(found, expected)
        assert report["offload"]["disk"]["bytes_written"] > 0
        assert report["offload"]["disk"]["bytes_read"] > 0
        assert list(tmp_path.iterdir()) == []

    def test_large_tensors_many_times(self):
        """What races would show here, if anywhere: copies that take as long as a block."""
        model = llama(layers=6, hidden=256)

        def long_ones(loss):
            first, second = loss(0, 16384), loss(1, 16384)
            second.backward()
            first.backward()

        expected, _ = gradients(model, long_ones, mode="full")
        for save in ("inputs", "attention"):
            found, _ = gradients(model, long_ones, steps=5, mode="offload", offload_save=save)
            for step in range(5):
                assert_same(found[step * len(expected) : (step + 1) * len(expected)], expected)


@pytest.mark.usefixtures("small")
def test_a_change_in_place_raises():
    model = llama()
    seen = []
    second = find_blocks(model)[1].module
    hook = second.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    with checkpointing(model, mode="offload"):
        loss = model(**tokens()).loss
        with torch.no_grad():
            seen.pop().mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    hook.remove()


def one_step(model, length=LENGTH, after_forward=lambda: None):
    loss = model(**tokens(length)).loss
    after_forward()
    loss.backward()
    model.zero_grad(set_to_none=False)


@pytest.fixture
def model(empty_device):
    """With gradients that are there before the step, so that a step adds activations alone."""
    made = llama(LAYERS, HIDDEN)
    one_step(made, length=64)
    return made


class TestBytes:
    def step(self, model, **flags):
        """(at the end of forward, most of the step) beyond what was there; of the second step."""
        with checkpointing(model, **flags):
            one_step(model)
            gc.collect()
            before, ends = allocated(), []
            torch.accelerator.reset_peak_memory_stats(DEVICE)
            one_step(model, after_forward=lambda: ends.append(allocated()))
            peak = allocated("peak")
            assert allocated() == before
        return ends[0] - before, peak - before

    def test_stored_and_peak_fall_by_the_inputs(self, model):
        stored, peak = self.step(model, mode="full")
        offloaded, lower = self.step(model, mode="offload")
        assert stored > LAYERS * INPUT
        assert stored - offloaded >= (LAYERS - 3) * INPUT
        assert peak - lower >= (LAYERS - AROUND) * INPUT

    @pytest.mark.parametrize(
        ("stays", "leaves"),
        [
            ({"mode": "selective", "save": "attention"}, "attention"),
            ({"mode": "selective", "save": "matmul"}, "matmul"),
            ({"mode": "none"}, "all"),
        ],
        ids=str,
    )
    def test_so_does_more_than_the_inputs(self, model, stays, leaves):
        inputs, _ = self.step(model, mode="full")
        stored, peak = self.step(model, **stays)
        offloaded, lower = self.step(model, mode="offload", offload_save=leaves)
        of_a_block = INPUT + (stored - inputs) / LAYERS
        assert of_a_block > 1.9 * INPUT
        # What is below a MiB stays.
        assert stored - offloaded >= 0.9 * (LAYERS - 3) * of_a_block
        assert peak - lower >= 0.9 * (LAYERS - AROUND) * of_a_block

    def samples(self, model, **flags):
        """Bytes on the device whenever a block begins, in forward and in backward."""
        forward, backward = [], []
        now = [forward]
        inner = [next(block.module.children()) for block in find_blocks(model)]
        hooks = [module.register_forward_pre_hook(lambda *_: now[-1].append(allocated())) for module in inner]
        with checkpointing(model, **flags):
            one_step(model)
            forward.clear()
            before = allocated()
            one_step(model, after_forward=lambda: now.append(backward))
        for hook in hooks:
            hook.remove()
        assert len(forward) == len(backward) == LAYERS
        return [[sample - before for sample in samples] for samples in (forward, backward)]

    def test_inputs_are_gone_at_any_time(self, model):
        full, full_backward = self.samples(model, mode="full")
        mine, backward = self.samples(model, mode="offload")
        assert full[-1] - full[4] >= (LAYERS - 5) * INPUT
        assert abs(mine[-1] - mine[4]) < INPUT
        # Also towards the end of backward: what came back left again.
        assert max(backward) <= full_backward[0] - (LAYERS - AROUND) * INPUT

    @pytest.mark.parametrize("save", ["inputs", "attention", "all"])
    def test_nothing_is_left(self, model, save):
        with checkpointing(model, mode="offload", offload_save=save) as state:
            one_step(model)
            gc.collect()
            before = allocated()
            for leave in (self._drop, self._raise_in_forward, self._raise_in_backward):
                leave(model)
                model.zero_grad(set_to_none=False)
                assert allocated() == before, leave.__name__
            assert state.report()["offload"]["host_bytes"] == 0

    def _drop(self, model):
        model(**tokens(LENGTH))

    def _raise_in_forward(self, model):
        hook = find_blocks(model)[-1].module.register_forward_hook(fail)
        with pytest.raises(Boom):
            model(**tokens(LENGTH))
        hook.remove()

    def _raise_in_backward(self, model):
        middle = find_blocks(model)[LAYERS // 2].module
        hook = middle.register_forward_hook(lambda module, args, output: first_of(output).register_hook(fail) and None)
        with pytest.raises(Boom):
            model(**tokens(LENGTH)).loss.backward()
        hook.remove()

    def test_reserved_stays_flat(self, model):
        held = []
        with checkpointing(model, mode="offload") as state:
            for _ in range(50):
                one_step(model)
                host = state.report()["offload"]["host_held_bytes"]
                held.append((torch.accelerator.memory_reserved(DEVICE), host))
        assert set(held[5:]) == {held[5]}


def fail(*args):
    raise Boom


def first_of(output):
    return output if isinstance(output, torch.Tensor) else output[0]


class TestHost:
    @pytest.mark.parametrize("save", ["inputs", "all"])
    @pytest.mark.parametrize("budget", [0, 64 * MIB])
    def test_budget_is_kept(self, repeatable, model, save, budget):
        def long_ones(loss):
            (loss(0, LENGTH) + loss(1, LENGTH)).backward()

        expected, _ = gradients(model, long_ones, mode="full")
        flags = {"mode": "offload", "offload_save": save, "host_budget": f"{budget}B"}
        found, report = gradients(model, long_ones, steps=2, **flags)
        assert_same(found[len(expected) :], expected)
        told = report["offload"]
        assert told["host_peak_bytes"] <= told["host_held_bytes"] <= budget
        assert (told["bytes_out"] > 0) == (budget > 0)
        assert any("budget" in why for why in told["kept"])

    @pytest.mark.parametrize("pinned", [True, False])
    def test_memory_is_pinned_unless_asked(self, pinned):
        found = streams.streams_of(DEVICE, pinned)
        assert found is not None
        assert found.host(4096).is_pinned() == pinned

    def test_memory_of_inference_mode_can_be_written(self):
        with torch.inference_mode():
            made = streams.streams_of(DEVICE, True).host(4096)
        assert not made.is_inference()

    def test_refused_memory_stays_on_the_device(self, repeatable, small, monkeypatch):
        def refuse(self, nbytes):
            raise RuntimeError("the system pins no more")

        monkeypatch.setattr(streams.Accelerator, "host", refuse)
        model = llama()
        expected, _ = gradients(model, interleaved, mode="full")
        found, report = gradients(model, interleaved, mode="offload")
        assert_same(found, expected)
        assert report["offload"]["bytes_out"] == 0
        assert any("pins no more" in why for why in report["offload"]["kept"])


class TestStreams:
    def test_copies_run_beside_computation(self, empty_device):
        from device_steps import read_step

        # A block takes several times as long as the copy of its input.
        model = llama(layers=6, hidden=2048, inner=8192)
        with checkpointing(model, mode="offload") as state:
            for _ in range(2):
                one_step(model)
            found = read_step(lambda: one_step(model))
        if not found["kernels"]:
            pytest.skip("the profiler sees no kernels here")
        assert state.report()["offload"]["bytes_out"] > 0
        assert found["out"]["number"] > 0
        assert found["out"]["share"] > 0.5
        assert found["in"]["share"] > 0.5

    @pytest.mark.distributed
    def test_sanitizer(self):
        from sanitized import sanitize

        found = sanitize()
        if "is_clean" not in found:
            pytest.skip(found["status"])
        assert found["is_clean"], found["output"]
        assert found["finds_dropped_waits"]

    def test_waits_are_timed(self, model):
        with checkpointing(model, mode="offload", prefetch=0) as state:
            one_step(model)
            torch.accelerator.synchronize()
            assert state.report()["offload"]["waited_seconds"] > 0

    def test_the_host_does_not_wait(self, empty_device):
        """A step can be enqueued while the device is busy with something else."""
        with DEVICE:
            model = nn.Sequential(*(Block() for _ in range(6)))
            x = torch.randn(LENGTH, HIDDEN)
            busy = torch.randn(8192, 8192)
        with checkpointing(model, mode="offload") as state:
            for _ in range(2):
                model(x).sum().backward()
            assert state.report()["offload"]["bytes_out"] > 0
            torch.accelerator.synchronize()
            for _ in range(100):  # seconds of work in fp32
                busy = busy @ busy
            before = torch.accelerator.current_stream(DEVICE).record_event()
            model(x).sum().backward()
            assert not before.query()
        torch.accelerator.synchronize()


class Block(nn.Module):
    """Unlike what transformers has, it looks at no value on the way."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))
