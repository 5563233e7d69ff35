"""Generators of accelerators, which a replay puts back: on devices that are not there, with and without a flaw.

Random numbers of the host and buffers: `test_recompute`.
"""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ckpt_trainer import block_state, checkpointing, recompute


class Device:
    """A kind of device whose generator is one of the host, used by nothing else."""

    def __init__(self, monkeypatch, name, works):
        self.device = torch.device(name, 0)
        self.generator = torch.Generator().manual_seed(0)
        self.asked = 0
        module = SimpleNamespace(
            get_rng_state=lambda device: self.generator.get_state(),
            set_rng_state=lambda state, device: self.generator.set_state(state) if works else None,
        )
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)
        monkeypatch.setattr(recompute, "devices_of", lambda tensors: [torch.device("cpu"), self.device])
        monkeypatch.setattr(block_state, "_drop", self.drop)
        block_state._restores.cache_clear()

    def drop(self, device):
        assert device == self.device
        self.asked += 1
        return self.mask(8)

    def mask(self, *shape):
        return (torch.rand(shape, generator=self.generator) > 0.5).float()


class Block(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.mask = device.mask
        self.draws = True

    def forward(self, x):
        inner = torch.relu(self.up(x))
        return x + self.down(inner * self.mask(*inner.shape) if self.draws else inner)


@pytest.fixture(autouse=True)
def fresh():
    yield
    block_state._restores.cache_clear()


def gradients(device, draws=True, **flags):
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(device) for _ in range(3)])
    for block in model:
        block.draws = draws
    device.generator.manual_seed(5)
    with checkpointing(model, **flags) as state:
        for _ in range(2):
            model(torch.ones(2, 8)).square().sum().backward()
    return [p.grad for p in model.parameters()], device.generator.get_state(), state.report()["recomputed_blocks"]


MODES = {
    "full": {"mode": "full"},
    "segments": {"mode": "full", "segment": 3},
    "matmul": {"mode": "selective", "save": "matmul"},
    "offload": {"mode": "offload"},
    "reentrant": {"mode": "full", "use_reentrant": True},
}
KINDS = ["mps", "xpu", "privateuseone"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_generator_that_can_be_put_back_is_exact_and_nothing_is_said(monkeypatch, caplog, kind, mode):
    device = Device(monkeypatch, kind, works=True)
    wanted, after, _ = gradients(device, mode="none")
    found, found_after, replays = gradients(device, **MODES[mode])
    assert all(map(torch.equal, found, wanted))
    assert torch.equal(found_after, after)
    assert replays == 6
    assert device.asked == 2  # once for a device, however many blocks and steps
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_one_that_cannot_is_a_warning(monkeypatch, caplog, kind, mode):
    device = Device(monkeypatch, kind, works=False)
    wanted, _, _ = gradients(device, mode="none")
    found, _, _ = gradients(device, **MODES[mode])
    assert not all(map(torch.equal, found, wanted))
    (said,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert said.startswith(f"the generator of {kind}:0 does not give the same numbers again: 3 blocks draw")
    assert "set their dropout to 0, or keep" in said


@pytest.mark.parametrize("flags", [{"mode": "none"}, {"mode": "selective"}, {"mode": "full", "draws": False}], ids=str)
def test_nothing_is_said_where_nothing_is_drawn_again(monkeypatch, caplog, flags):
    device = Device(monkeypatch, "mps", works=False)
    gradients(device, **flags)
    assert device.asked == 0
    assert "the generator of" not in caplog.text


def test_what_the_user_turned_off_is_said_first(monkeypatch, caplog):
    device = Device(monkeypatch, "mps", works=False)
    gradients(device, mode="full", preserve_rng_state=False)
    assert "preserve_rng_state=False: 3 blocks draw random numbers (0, ...)" in caplog.text
    assert "remove it" in caplog.text
    assert "the generator of" not in caplog.text
