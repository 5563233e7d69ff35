"""What is said about a selection: names that mean nothing, choices without effect, what could not be stored, what ran."""

import logging
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from ckpt_trainer import checkpointing
from ckpt_trainer.flops import FlopCounter
from ckpt_trainer.log import logger
from ckpt_trainer.memory import LiveBytes
from tests.tiny_models import CASES, llama, text_dataset


@pytest.fixture
def said(caplog, monkeypatch):
    """What was logged as a warning."""
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger.name)
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def batch():
    rows = text_dataset(2)
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}


def step(model, **flags):
    torch.manual_seed(0)
    with checkpointing(model, **flags) as state:
        model(**batch()).loss.backward()
    return state


class Block(nn.Module):
    """An MLP that changes the result of its first layer in place where autograd allows it."""

    def __init__(self, writes=False):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.writes = writes

    def forward(self, hidden):
        first = self.one(hidden)
        if self.writes:
            first += 1
        return hidden + self.two(F.silu(first))


class Tower(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.square().sum()


def run_tower(tower, **flags):
    hidden = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with checkpointing(tower, **flags) as state:
        tower(hidden).backward()
    return state


def test_names_that_mean_nothing_are_an_error():
    with pytest.raises(ValueError, match="which matched nothing in the first step") as caught:
        step(llama(), mode="selective", save=["mm", "silou", "mlp.gate"])
    text = str(caught.value)
    assert text.startswith("selective is to store 'silou', 'mlp.gate' (checkpointing_save, or")
    assert "Did you mean 'mlp.gate_proj' for 'mlp.gate'?" in text
    assert "Ops that ran: " in text
    assert ", mm (" in text
    assert "self_attn.q_proj" in text.rpartition("Modules of a block:")[2]


def test_modules_that_mean_nothing_are_an_error_without_ops():
    with pytest.raises(ValueError, match="selective is to store 'mpl"):
        step(llama(), mode="selective", save=["mlp.*", "mpl.*"])


def test_names_of_modules_in_blocks_that_run_without_a_graph():
    model = llama()
    for parameter in [*model.model.embed_tokens.parameters(), *model.model.layers[0].parameters()]:
        parameter.requires_grad_(False)
    model.model.layers[0].mlp.extra = nn.Identity()
    step(model, mode="selective", save=["mlp.down_proj", "mlp.extra"])


def test_names_may_mean_something_in_one_tower_only(said):
    model, inputs = CASES["whisper"].build(), CASES["whisper"].batch()
    with checkpointing(model, mode="selective", save=["encoder_attn", "fc1"]) as state:
        model(**inputs).loss.backward()
    assert state.report()["recomputed_blocks"] > 0
    assert said() == []


def test_tier_without_any_such_op_is_said(said):
    run_tower(Tower(Block(), Block()), mode="selective", save="attention")
    assert said() == ["selective:attention: nothing of the kind ran in 2 blocks, which are recomputed as a whole."]


def test_blocks_in_which_nothing_of_a_list_ran_are_said(said):
    linear = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    tower = Tower(Block(), Block())
    tower.others = Tower(linear, nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    plain = tower.forward
    tower.forward = lambda hidden: plain(hidden) + tower.others(hidden)
    run_tower(tower, mode="selective", save=["two"])
    assert said() == ["selective:two: nothing of the kind ran in 2 blocks, which are recomputed as a whole."]


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_parametrized_weights_are_not_computed_on_the_way(mode):
    """Spectral norm takes a step whenever its weight is read."""

    def build():
        return Tower(*(nn.Sequential(spectral_norm(nn.Linear(16, 16)), nn.Tanh()) for _ in range(2)))

    found = []
    for flags in ({}, {"mode": mode}):
        torch.manual_seed(0)
        tower, hidden = build(), torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        for _ in range(2):
            with checkpointing(tower, **flags) if flags else nullcontext():
                tower(hidden).backward()
        found.append([hidden.grad, *(p.grad for p in tower.parameters()), *tower.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_compiled_model_with_a_typo_is_refused():
    model = torch.compile(Tower(Block(), Block()), backend="aot_eager")
    with pytest.raises(ValueError, match="to store 'mistyped', and no op that torch knows"):
        run_tower(model, mode="selective", save=["mistyped"])


def test_nothing_to_rebuild_is_said(said):
    run_tower(Tower(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2))), mode="selective")
    (text,) = said()
    assert "found nothing to rebuild in 2 calls of blocks, and stored everything" in text


def test_all_well_says_nothing(said):
    for save in ("expensive", "matmul", "half_matmul", "attention", ["mlp.*", "aten.silu"]):
        step(llama(), mode="selective", save=save)
    step(llama(), mode="full", segment=2)
    assert said() == []


def test_segments_without_effect_are_said(said):
    step(llama(), mode="full", segment=2, every_n=2)
    assert any("checkpointing_segment=2 had no effect" in text for text in said())


@pytest.mark.parametrize("save", ["matmul", "one"])
def test_result_that_the_block_writes_to(save):
    """It is stored as it was returned or not at all; gradients are the same."""
    gradients = []
    for flags in ({"mode": "none"}, {"mode": "selective", "save": save}):
        tower = Tower(Block(writes=True), Block(writes=True))
        for _ in range(2):
            tower.zero_grad()
            run_tower(tower, **flags)
        gradients.append([parameter.grad for parameter in tower.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_flops_of_replays_are_those_that_ran():
    model = llama()
    step(model, mode="none")
    with FlopCounter() as plain:
        step(model, mode="none")
    with FlopCounter() as forward:
        model(**batch())
    for save in ("matmul", "half_matmul", "attention"):
        state = step(model, mode="selective", save=save)
        again = state.report()["recomputed_flops_share"]
        with FlopCounter() as counter, checkpointing(model, mode="selective", save=save):
            model(**batch()).loss.backward()
        assert again == pytest.approx((counter.total - plain.total) / forward.total, abs=1e-9)


def test_report_of_what_is_rebuilt():
    state = step(llama(), mode="selective")
    report = state.report()
    assert report["calls"] == {"rebuild": 4}
    assert report["recomputed_blocks"] == 0
    assert report["recomputed_flops_share"] == 0
    assert report["blocks"] == {"text": {"selective:expensive": 4}}


def test_frozen_blocks_run_without_a_graph():
    model = llama()
    for parameter in [*model.model.embed_tokens.parameters(), *model.model.layers[:2].parameters()]:
        parameter.requires_grad_(False)
    assert step(model, mode="selective").report()["calls"] == {"no graph": 2, "rebuild": 2}


def test_rebuilt_inputs_are_counted():
    report = step(llama(), mode="full", segment=2).report()
    assert (report["recomputed_blocks"], report["rebuilt_inputs"]) == (4, 2)
    assert report["recomputed_flops_share"] > step(llama(), mode="full").report()["recomputed_flops_share"]


def test_first_pass_ends_with_the_second_forward_in_a_loop():
    """Also where no block is ever replayed."""
    model = llama()
    with checkpointing(model, mode="selective") as state:
        concluded = []
        for _ in range(2):
            model(**batch()).loss.backward()
            concluded.append(state._concluded)
    assert concluded == [False, True]


def test_casts_of_weights_are_not_stored():
    """Under autocast each weight is cast, and autograd saves the cast; the block's own parameters are there anyway."""
    stored = {}
    for mode in ("none", "selective"):
        torch.manual_seed(0)
        tower = Tower(*(nn.Sequential(nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 256)) for _ in range(2)))
        hidden = torch.randn(4, 256, requires_grad=True)
        for _ in range(2):
            with checkpointing(tower, mode=mode), LiveBytes() as live:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = tower(hidden)
                stored[mode] = live.current
        loss.backward()
    assert stored["none"] - stored["selective"] >= 4 * 256 * 256 * 2


@pytest.mark.parametrize("save", ["expensive", "matmul", "attention"])
def test_inference_mode_within_a_block(save):
    class Looking(Block):
        def forward(self, hidden):
            with torch.inference_mode():
                looked = self.one(hidden).abs().mean()
            return super().forward(hidden) * float(looked)

    gradients = []
    for flags in ({"mode": "none"}, {"mode": "selective", "save": save}):
        tower = Tower(Looking(), Looking())
        run_tower(tower, **flags)
        gradients.append([parameter.grad for parameter in tower.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
