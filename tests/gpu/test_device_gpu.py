"""Recomputing on a real accelerator: random numbers of the device are replayed, gradients are those of plain training."""

import pytest
import torch
from on_device import DEVICE, allocated, assert_same, gradients, llama, needs_device, plain_step, repeatable, tokens

from ckpt_trainer import checkpointing
from ckpt_trainer.block_state import BlockState, as_before, devices_of, random_state, same_state, set_random_state
from ckpt_trainer.memory import current_bytes, peak_bytes, reset_peak
from ckpt_trainer.plan import TIERS

pytestmark = [pytest.mark.gpu, needs_device, pytest.mark.usefixtures("repeatable")]
__all__ = ["repeatable"]  # a fixture


def accumulation(loss):
    loss(0).backward()
    loss(1).backward()


class TestGenerators:
    def test_state_goes_back(self):
        device = torch.empty(0, device=DEVICE).device
        state = random_state(device)
        first = torch.rand(8, device=device)
        assert not same_state(state, random_state(device))
        set_random_state(device, state)
        assert same_state(state, random_state(device))
        assert torch.equal(torch.rand(8, device=device), first)

    @pytest.mark.parametrize("restore", [None, True])
    def test_a_block_draws_the_same_again(self, restore):
        block = torch.nn.Dropout(0.5).to(DEVICE)
        x = torch.ones(1000, device=DEVICE)
        state = BlockState(block, restore)
        with state.remember(devices_of([x])) as before:
            first = block(x)
        after = random_state(x.device)
        torch.rand(8, device=DEVICE)
        later = random_state(x.device)
        with as_before(before):
            assert torch.equal(block(x), first)
            assert same_state(random_state(x.device), after)
        assert same_state(random_state(x.device), later)
        assert x.device in [device for device, _ in before.random]

    def test_nothing_is_kept_where_nothing_is_drawn(self):
        block = torch.nn.Linear(4, 4).to(DEVICE)
        x = torch.ones(2, 4, device=DEVICE)
        state = BlockState(block)
        with state.remember(devices_of([x])) as before:
            block(x)
        assert before.random == []

    def test_running_statistics_are_updated_once(self):
        block = torch.nn.BatchNorm1d(4).to(DEVICE)
        x = torch.randn(16, 4, device=DEVICE)
        state = BlockState(block)
        with state.remember(devices_of([x])) as before:
            first = block(x)
        mean = block.running_mean.clone()
        with as_before(before):
            assert torch.equal(block(x), first)
        assert torch.equal(block.running_mean, mean)
        assert block.num_batches_tracked == 1


@pytest.mark.parametrize("schedule", [plain_step, accumulation])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
class TestGradients:
    def test_of_full(self, dropout, schedule):
        model = llama(dropout=dropout)
        expected, _ = gradients(model, schedule, mode="none")
        found, report = gradients(model, schedule, mode="full")
        assert_same(found, expected)
        assert report["recomputed_blocks"] > 0

    @pytest.mark.parametrize("tier", TIERS)
    def test_of_every_tier(self, dropout, schedule, tier):
        model = llama(dropout=dropout)
        expected, _ = gradients(model, schedule, mode="none", steps=2)
        found, _ = gradients(model, schedule, mode="selective", save=tier, steps=2)
        assert_same(found, expected)

    @pytest.mark.parametrize("flags", [{"every_n": 2}, {"segment": 2}, {"use_reentrant": True}], ids=str)
    def test_of_full_with_flags(self, dropout, schedule, flags):
        if "segment" in flags and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
            pytest.skip(f"torch {torch.__version__} frees what segments store before they are done; 2.13 does not")
        model = llama(dropout=dropout)
        expected, _ = gradients(model, schedule, mode="none")
        found, _ = gradients(model, schedule, mode="full", **flags)
        assert_same(found, expected)


def test_random_numbers_after_a_step_are_those_of_plain_training():
    model = llama(dropout=0.2)
    states = []
    for mode in ("none", "full", "offload"):
        gradients(model, plain_step, mode=mode)
        states.append(random_state(torch.empty(0, device=DEVICE).device))
    assert all(torch.equal(state, states[0]) for state in states)


def test_tiers_store_less_from_cheapest_to_leanest():
    model = llama(hidden=256)
    batch = tokens(2048)
    stored = []
    for flags in ({"mode": "none"}, *({"mode": "selective", "save": tier} for tier in TIERS), {"mode": "full"}):
        with checkpointing(model, **flags):
            for _ in range(2):
                model.zero_grad(set_to_none=True)
                before = allocated()
                loss = model(**batch).loss
                after = allocated()
                loss.backward()
        stored.append(after - before)
    assert stored == sorted(stored, reverse=True)
    assert stored[-1] < stored[0] / 4


def test_bytes_are_those_of_the_allocator():
    before = current_bytes(DEVICE)
    reset_peak(DEVICE)
    held = torch.empty(2**20, dtype=torch.uint8, device=DEVICE)
    assert current_bytes(DEVICE) - before == held.nbytes
    del held
    assert current_bytes(DEVICE) == before
    assert peak_bytes(DEVICE) - before >= 2**20
