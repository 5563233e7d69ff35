"""Mode `auto` on a real accelerator: its allocator is what is asked, the peak is what was predicted, gradients are those
of plain training, others' memory is left to them, and a step that really runs out of memory is run again."""

import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from on_device import DEVICE, assert_same, empty_device, llama, needs_device, repeatable, tokens
from transformers import TrainerCallback

from ckpt_trainer import CheckpointedTrainer, CheckpointTrainingArguments, checkpointing, engine, groups
from ckpt_trainer.blocks import find_blocks
from ckpt_trainer.budgets import budget_bytes
from ckpt_trainer.memory import AllocatorBytes, device_bytes, meter_of, peak_bytes, reset_peak
from ckpt_trainer.roofline import device_of
from ckpt_trainer.spans import WatchedStep

pytestmark = [pytest.mark.gpu, needs_device, pytest.mark.usefixtures("repeatable", "empty_device")]
__all__ = ["empty_device", "repeatable"]  # fixtures

MIB = 2**20
# A block stores about 25 inputs of 4 MiB each, which outweighs what kernels take beside tensors.
LAYERS, HIDDEN, LENGTH = 8, 512, 4096
SHARES = (0.75, 0.5, 0.25)


def train(steps=7, lengths=(LENGTH,), dropout=0.0, held=0, **flags):
    """Losses and gradients of all steps, the peak of the last one, and the report; `held`: bytes that are taken besides."""
    model = llama(LAYERS, HIDDEN, dropout)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    outside = torch.empty(held, dtype=torch.uint8, device=DEVICE)
    losses, found = [], []
    torch.manual_seed(0)
    with checkpointing(model, **flags) as state:
        for number in range(steps):
            batch = tokens(lengths[number % len(lengths)], seed=number)
            reset_peak(DEVICE)
            loss = model(**batch).loss
            loss.backward()
            peak = peak_bytes(DEVICE)
            losses.append(loss.detach())
            found.append([parameter.grad.cpu() for parameter in model.parameters()])
            optimizer.step()
            optimizer.zero_grad()
            del loss
        report = state.report()
    assert outside.numel() == held
    return losses, [gradient for step in found for gradient in step], peak, report


@cache
def peaks_of_modes():
    return [train(steps=3, mode=mode)[2] for mode in ("full", "none")]


def budget_at(share):
    """So much of the way from recomputing all to storing all."""
    least, most = peaks_of_modes()
    assert most > 1.3 * least
    return int(least + share * (most - least))


def test_it_is_an_accelerator_that_is_planned_for():
    found = device_of(DEVICE)
    assert not found.is_host
    assert found.link_bytes_per_second > 0
    assert isinstance(meter_of(DEVICE), AllocatorBytes)
    free, total = device_bytes(DEVICE)
    assert 0 < free <= total


def test_spans_are_told_by_the_allocator():
    model, batch = llama(LAYERS, HIDDEN), tokens(LENGTH)
    for _ in range(2):  # kernels take their workspaces in the first
        model.zero_grad(set_to_none=True)
        before = torch.accelerator.memory_allocated(DEVICE)
        reset_peak(DEVICE)
        model(**batch).loss.backward()
        peak = peak_bytes(DEVICE)
    model.zero_grad(set_to_none=True)
    reset_peak(DEVICE)
    with WatchedStep(model, find_blocks(model), AllocatorBytes(DEVICE)) as watched:
        loss = model(**batch).loss
        watched.end_forward()
        loss.backward()
        del loss
    assert watched.spans[0].start == before
    # The cache may give a block that is larger than what was asked for by 1 MiB.
    assert abs(max(span.peak for span in watched.spans) - peak) <= LAYERS * MIB
    # Cutting it lets nobody lose the peak.
    assert peak_bytes(DEVICE) == max(span.peak for span in watched.spans)
    starts = [span.start for span in watched.spans if not span.backward]
    assert starts == sorted(starts)
    assert starts[-1] - starts[1] > (LAYERS - 1) * 10 * LENGTH * HIDDEN * 2


@pytest.mark.parametrize("share", SHARES)
def test_the_peak_is_as_predicted_and_within_the_budget(share):
    budget = budget_at(share)
    _, _, peak, report = train(steps=9, mode="auto", budget=budget)
    (size,) = report["auto"]["sizes"]
    assert peak <= budget
    assert size["predicted_peak_bytes"] <= budget
    assert size["predicted_peak_bytes"] == pytest.approx(peak, rel=0.05)
    assert len(size["actions"]) > 1 or "keep" not in size["actions"]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("share", SHARES)
def test_losses_and_gradients_are_those_of_plain_training(share, dropout):
    # With dropout the attention is not fused, and stores its square.
    lengths = (1024, 256, 700, 1024) if dropout else (LENGTH, 1000, LENGTH)
    losses, expected, _, _ = train(lengths=lengths, dropout=dropout, mode="none")
    found_losses, found, _, report = train(lengths=lengths, dropout=dropout, mode="auto", budget=budget_at(share))
    assert_same(found_losses, losses)
    assert_same(found, expected)
    assert report["auto"]["sizes"]


def test_what_leaves_the_device_leaves_the_gradients_alone(monkeypatch):
    losses, expected, _, _ = train(mode="none")
    monkeypatch.setattr(groups, "MIN_BYTES", 0)
    # By a link without end whatever leaves is free.
    monkeypatch.setattr(engine, "device_of", lambda device: replace(device_of(device), link_bytes_per_second=1e15))
    budget = budget_at(0.4)
    found_losses, found, peak, report = train(steps=7, mode="auto", budget=budget)
    assert_same(found_losses, losses)
    assert_same(found, expected)
    assert any("@host" in action for size in report["auto"]["sizes"] for action in size["actions"])
    assert report["offload"]["bytes_out"] > 0
    assert peak <= budget


class TestOthers:
    def test_a_tensor_outside_of_training_counts(self):
        held, budget = 256 * MIB, budget_at(0.8)
        _, _, alone, first = train(steps=9, mode="auto", budget=budget)
        _, _, beside, second = train(steps=9, mode="auto", budget=budget, held=held)
        assert max(alone, beside) <= budget
        ((mine,), (theirs,)) = first["auto"]["sizes"], second["auto"]["sizes"]
        assert theirs["actions"] != mine["actions"]
        # What is left to training is less by it.
        assert theirs["predicted_peak_bytes"] - held < mine["predicted_peak_bytes"]

    def test_memory_of_another_process_is_not_in_the_budget(self):
        held = 512 * MIB
        before, asked = budget_bytes(0.9, DEVICE), budget_bytes(2**60, DEVICE)
        taken = f"torch.empty({held}, dtype=torch.uint8, device='{DEVICE}')"
        script = f"import torch; held = {taken}; print('held', flush=True); input()"
        other = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert other.stdout.readline().strip() == "held"
            assert budget_bytes(0.9, DEVICE) <= before - held
            assert budget_bytes(2**60, DEVICE) <= asked - held
        finally:
            other.communicate("\n", timeout=60)


class Filler(TrainerCallback):
    """Before one step, takes all of the device but so many bytes."""

    def __init__(self, step, left):
        self.step, self.left, self.held = step, left, []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step != self.step:
            return
        torch.accelerator.synchronize()
        torch.accelerator.empty_cache()
        free, _ = device_bytes(DEVICE)
        # In pieces, for a device may not have that much in one.
        while free > self.left + 64 * MIB:
            self.held.append(torch.empty(min(2**30, free - self.left), dtype=torch.uint8, device=DEVICE))
            free, _ = device_bytes(DEVICE)


def trained(folder, left=None):
    """Weights after six steps of a trainer; before the fourth, if asked, all but `left` bytes of the device are taken."""
    model = llama(LAYERS, HIDDEN)
    rows = [{name: value[0].cpu() for name, value in tokens(LENGTH, seed=n).items()} for n in range(6)]
    arguments = CheckpointTrainingArguments(
        output_dir=folder, max_steps=6, per_device_train_batch_size=1, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_steps=1, bf16=False, optim="sgd", learning_rate=1e-3, checkpointing_mode="auto",
    )  # fmt: skip
    fillers = [Filler(3, left)] if left is not None else []
    trainer = CheckpointedTrainer(model, arguments, train_dataset=rows, callbacks=fillers)
    trainer.train()
    for filler in fillers:
        assert filler.held
        filler.held.clear()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, [parameter.detach().cpu() for parameter in model.parameters()], trainer.memory_report()


def test_a_step_that_really_runs_out_of_memory_is_run_again(tmp_path, caplog):
    losses, expected, report = trained(tmp_path)
    assert all(set(size["actions"]) == {"keep"} for size in report["auto"]["sizes"])
    least, most = peaks_of_modes()
    # What storing all takes beyond what recomputing all takes: half of it is left.
    start = torch.accelerator.memory_allocated(DEVICE)
    found_losses, found, report = trained(tmp_path, left=(least - start) + (most - least) // 2)
    assert "ran out of memory" in caplog.text
    assert found_losses == losses
    assert_same(found, expected)
    assert any(action != "keep" for size in report["auto"]["sizes"] for action in size["actions"])
