"""Mode `auto` where there is a link to the host: what may leave the device is chosen, carried out, and measured.

The device is the one of `fake_device`: copies are delayed and races are seen. Live bytes of the host's process stand for
those of an allocator.
"""

from dataclasses import replace
from functools import cache

import pytest
import tiny_models
import torch
from fake_device import FakeStreams

from ckpt_trainer import checkpointing, engine, groups, handles, memory, streams
from ckpt_trainer.auto import Planner
from ckpt_trainer.costs import Link, Probed, Sample
from ckpt_trainer.measured import BlockBytes, StepBytes
from ckpt_trainer.memory import LiveBytes
from ckpt_trainer.plan import KEEP, RECOMPUTE, Plan
from ckpt_trainer.roofline import Device

SLOW, FAST = 1e6, 1e13
LAYERS = 10


def device_with(link):
    return Device("fake", 1e12, 1e12, 1e11, link, 0)


def install(monkeypatch, timing, link=FAST):
    """A fake device in place of the one that is not there; small tensors leave it, too."""
    fake = FakeStreams(timing, seed=5)
    monkeypatch.setattr(streams, "streams_of", fake.streams_of)
    monkeypatch.setattr(groups, "MIN_BYTES", 16)
    pack, get, stays = groups.Group.pack, handles.Moved.get, handles.Kept.get
    monkeypatch.setattr(groups.Group, "pack", lambda group, tensor: (fake.made(tensor), pack(group, tensor))[1])
    monkeypatch.setattr(handles.Moved, "get", fake.unpacking(get))
    monkeypatch.setattr(handles.Kept, "get", fake.unpacking(stays))
    monkeypatch.setattr(engine, "why_not", lambda device: None)
    monkeypatch.setattr(engine, "device_of", lambda device: device_with(link))
    return fake


@pytest.fixture
def device(monkeypatch):
    return install(monkeypatch, "lazy")


def batch(length=48):
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 64, (2, length), generator=generator)
    return {"input_ids": ids, "labels": ids}


def build():
    return tiny_models.llama(LAYERS)


def train(steps=7, lengths=(48,), **flags):
    """Losses, gradients and peaks of live bytes of all steps, and the report."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, found, peaks = [], [], []
    torch.manual_seed(3)
    with checkpointing(model, **flags) as state:
        for number in range(steps):
            data = batch(lengths[number % len(lengths)])
            with LiveBytes(model, *data.values(), *states(optimizer)) as live:
                loss = model(**data)["loss"]
                loss.backward()
            peaks.append(live.peak)
            losses.append(loss.detach())
            found += [parameter.grad.clone() for parameter in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
            del loss
        report = state.report()
    return losses, found, peaks, report


def states(optimizer):
    return [value for own in optimizer.state.values() for value in own.values() if isinstance(value, torch.Tensor)]


def assert_equal(found, expected):
    assert len(found) == len(expected) > 0
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@cache
def peaks_of_modes():
    return [max(train(steps=2, mode=mode)[2]) for mode in ("full", "none")]


def budget_at(share):
    """So much of the way from recomputing all to storing all."""
    least, most = peaks_of_modes()
    return int(least + share * (most - least))


@cache
def plain(lengths=(48,)):
    losses, found, _, _ = train(lengths=lengths, mode="none")
    return losses, found


def actions(report):
    return [action for size in report["auto"]["sizes"] for action in size["actions"]]


@pytest.mark.parametrize("timing", ["lazy", "eager", "random"])
def test_what_leaves_is_chosen_and_all_is_the_same(monkeypatch, timing):
    budget, (losses, expected) = budget_at(0.3), plain()
    fake = install(monkeypatch, timing)
    found_losses, found, peaks, report = train(mode="auto", budget=budget)
    assert_equal(found_losses, losses)
    assert_equal(found, expected)
    assert any("@host" in action for action in actions(report))
    assert report["offload"]["bytes_out"] > 0
    assert fake.races == []
    assert max(peaks) <= budget
    (size,) = report["auto"]["sizes"]
    assert size["measured_peak_bytes"] == pytest.approx(size["predicted_peak_bytes"], rel=0.01)


def test_nothing_leaves_where_all_fits(device):
    _, _, _, report = train(steps=3, mode="auto", budget=2**30)
    assert set(actions(report)) == {"keep"}
    assert report["offload"] is None


def test_copies_can_hide_behind_the_forward_too(device):
    model = build()
    with checkpointing(model, mode="auto", budget=2**30) as state:
        for _ in range(2):
            model(**batch())["loss"].backward()
        samples = state._batches.planner.samples()
    kept = [probes[KEEP] for sample in samples.values() for probes in sample.probes.values()]
    assert kept
    assert all(0.2 < probed.forward_seconds / probed.seconds < 0.5 for probed in kept)


def test_nothing_leaves_over_a_slow_link(monkeypatch):
    install(monkeypatch, "lazy", SLOW)
    _, _, _, report = train(steps=3, mode="auto", budget=budget_at(0.5))
    assert not any("@host" in action for action in actions(report))
    assert len(set(actions(report))) > 1


def test_no_more_leaves_than_the_host_may_have(device):
    least, most = peaks_of_modes()
    allowed = 7 * (most - least) // LAYERS
    _, _, _, report = train(steps=8, mode="auto", budget=budget_at(0.3), host_budget=allowed)
    assert any("@host" in action for action in actions(report))
    assert 0 < report["offload"]["host_peak_bytes"] <= allowed


def test_lengths_mix(device):
    lengths = (48, 16, 33, 48, 24)
    losses, expected = plain(lengths)
    found_losses, found, _, report = train(lengths=lengths, mode="auto", budget=budget_at(0.4))
    assert_equal(found_losses, losses)
    assert_equal(found, expected)
    assert any("@host" in action for action in actions(report))
    assert device.races == []


ROWS = (("input_ids", (1, 100)),)
START, STORED, INPUT = 50_000, 10_000, 1000


class TestWhatIsLearnt:
    """Of a plan that moves something: numbers in, plans out."""

    def planned(self, budget):
        names = [f"layers.{number}" for number in range(12)]
        leanest = Plan(dict.fromkeys(names, RECOMPUTE))
        levels = {KEEP: (STORED, STORED, 2 * STORED), RECOMPUTE: (INPUT, STORED, 2 * STORED)}
        lean = BlockBytes(*levels[RECOMPUTE], 0, 0.0, 0.0)
        step = StepBytes(dict.fromkeys(names, lean), 0, 0, 0, 0, 0, 0, start=START)
        probes = {KEEP: Probed(levels[KEEP], 3.0, 1.0), RECOMPUTE: Probed(levels[RECOMPUTE], 4.0, 1.0)}
        planner = Planner(names, leanest, lambda: self.budget, Link(1e6, 10**9))
        planner.learn(ROWS, Sample(leanest, step, dict.fromkeys(names, names[1]), {names[1]: probes}, START, False))
        planner.learn_optimizer(0, 0)
        self.budget = budget
        choice = planner.choose(ROWS, False)
        assert choice.moves
        assert choice.solution.extra_seconds < 1e-3
        return planner, choice

    def learn(self, planner, choice, more=0, start=0):
        step = planner.samples()[ROWS, False].step
        return planner.learn_peak(choice, replace(step, start=START + start, peak=choice.peak.bytes + more), True)

    def test_what_copies_hold(self):
        planner, choice = self.planned(START + 8 * STORED)
        assert self.learn(planner, choice, more=3 * STORED)
        again = planner.choose(ROWS, False)
        assert again.budget_bytes == self.budget
        assert again.peak.bytes <= self.budget
        assert again.plan != choice.plan
        # As much more is expected of the same plan.
        self.budget += 3 * STORED
        planner._forget_choices()
        same = planner.choose(ROWS, False)
        assert same.plan == choice.plan
        assert same.peak.bytes == choice.peak.bytes + 3 * STORED

    def test_no_less_is_taken_than_what_is_known_of_copies(self):
        planner, choice = self.planned(START + 8 * STORED)
        self.learn(planner, choice, more=-3 * STORED)
        assert planner.choose(ROWS, False).peak == choice.peak

    def test_what_came_to_stay(self):
        planner, choice = self.planned(START + 8 * STORED)
        assert self.learn(planner, choice, more=2 * STORED, start=2 * STORED)
        self.budget += 2 * STORED
        planner._forget_choices()
        same = planner.choose(ROWS, False)
        # It counts once, and not as held by copies, too.
        assert same.plan == choice.plan
        assert same.peak.bytes == choice.peak.bytes + 2 * STORED
        assert planner.samples()[ROWS, False].bare_bytes == START + 2 * STORED


class Allocator:
    """What an allocator of a device counts, of live bytes of the host: all of `torch.accelerator` that is asked for."""

    def __init__(self, monkeypatch, live, total):
        def info(device):
            return total - live.current - self.others, total

        self.others = 0
        monkeypatch.setattr(memory, "_is_counted", lambda device: True)
        monkeypatch.setattr(memory, "device_bytes", info)
        for name, answer in {
            "memory_allocated": lambda device: live.current,
            "memory_reserved": lambda device: live.current,
            "max_memory_allocated": lambda device: live.peak,
            "reset_peak_memory_stats": lambda device: live.reset_peak(),
            "memory_stats": lambda device: {"num_alloc_retries": 0},
        }.items():
            monkeypatch.setattr(torch.accelerator, name, answer)


def sizes_of(budget, steps=5):
    model, optimizer = build(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with checkpointing(model, mode="auto", budget=budget) as state:
        for _ in range(steps):
            model(**batch())["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        return state.report()["auto"]


class TestAllocator:
    """Bytes told by an allocator and not by a dispatch mode."""

    @pytest.mark.parametrize("share", [0.8, 0.2])
    def test_plans_are_those_of_live_bytes(self, monkeypatch, share):
        budget = budget_at(share)
        expected = sizes_of(budget)
        data = batch()  # live for as long as a step is
        with LiveBytes() as live:
            Allocator(monkeypatch, live, 2**40)
            found = sizes_of(budget)
        assert data is not None
        assert len(found["sizes"]) == len(expected["sizes"]) > 0
        for mine, theirs in zip(found["sizes"], expected["sizes"], strict=True):
            assert mine["actions"] == theirs["actions"]
            assert mine["measured_peak_bytes"] == pytest.approx(theirs["measured_peak_bytes"], rel=0.01)
            assert mine["predicted_peak_bytes"] == pytest.approx(theirs["predicted_peak_bytes"], rel=0.01)

    def test_what_others_use_is_not_in_the_budget(self, monkeypatch):
        with LiveBytes() as live:
            allocator = Allocator(monkeypatch, live, 2**30)
            alone = sizes_of(0.5, steps=1)["budget_bytes"]
            allocator.others = 2**28
            beside = sizes_of(0.5, steps=1)["budget_bytes"]
            asked = sizes_of(2**30, steps=1)["budget_bytes"]
        assert (alone, beside, asked) == (2**29, 2**29 - 2**28, 2**30 - 2**28)
