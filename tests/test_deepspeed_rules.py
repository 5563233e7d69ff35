"""DeepSpeed beside a plan, without DeepSpeed: its way with frozen parameters is put on a model by hooks that do the same.

With DeepSpeed itself: `tests/distributed/test_deepspeed.py`.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import CASES, llama
from torch.utils.checkpoint import CheckpointError

from ckpt_trainer import checkpointing
from ckpt_trainer.deepspeed_rules import deepspeed_notes, refuse_emptied
from ckpt_trainer.plan import KEEP, RECOMPUTE, Plan, Settings
from ckpt_trainer.prepare import UseCache


def shard(module):
    """Parameters of one module are there from its pre-forward to its forward hook, and again while its backward runs."""
    whole = {parameter: parameter.data for parameter in module.parameters(recurse=False)}
    if not whole:
        return

    def gather(*_):
        for parameter, data in whole.items():
            parameter.data = data

    def release(*_):
        for parameter in whole:
            parameter.data = parameter.data.new_empty(0)

    for number, parameter in enumerate(whole):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape
    module.register_forward_pre_hook(gather)
    module.register_forward_hook(release)
    module.register_full_backward_pre_hook(gather)
    release()


def zero3(frozen=True):
    model = llama(3)
    if frozen:
        torch.manual_seed(1)
        adapters = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"])
        model = get_peft_model(model, adapters).train()
    for module in model.modules():
        shard(module)
    return model


def gradients(model, **flags):
    torch.manual_seed(3)
    with checkpointing(model, **flags) as state:
        model(**CASES["llama"].batch())["loss"].backward()
    return [p.grad for p in model.parameters() if p.requires_grad], state.report()["recomputed_blocks"]


REPLAYING = {
    "full": {"mode": "full"},
    "segments": {"mode": "full", "segment": 3},
    "matmul": {"mode": "selective", "save": "matmul"},
    "attention": {"mode": "selective", "save": "attention"},
    "modules": {"mode": "selective", "save": ["*mlp*"]},
    "offload": {"mode": "offload"},
}


@pytest.mark.parametrize("mode", REPLAYING)
def test_replays_with_frozen_parameters_that_are_emptied_are_refused(mode):
    with pytest.raises(ValueError, match="Install DeepSpeed 0"):
        gradients(zero3(), **REPLAYING[mode])


@pytest.mark.parametrize("mode", REPLAYING)
def test_they_would_fail_in_the_first_backward(mode):
    with pytest.raises(CheckpointError, match="different metadata"):
        gradients(zero3(), determinism_check="default", **REPLAYING[mode])


def test_what_replays_nothing_is_exact():
    expected, _ = gradients(zero3(), mode="none")
    found, replays = gradients(zero3(), mode="selective")
    assert all(map(torch.equal, found, expected))
    assert replays == 0


def test_the_reentrant_variant_compares_nothing():
    expected, _ = gradients(zero3(), mode="none")
    found, replays = gradients(zero3(), mode="full", use_reentrant=True)
    assert all(map(torch.equal, found, expected))
    assert replays == 3


def test_nothing_is_refused_where_nothing_is_frozen_or_sharded():
    gradients(zero3(frozen=False), mode="full")
    gradients(get_peft_model(llama(2), LoraConfig(target_modules=["q_proj"])), mode="full")


def test_a_version_that_keeps_them_is_known_by_what_it_puts_on_modules():
    model, plan = zero3(), Plan({"layers.0": RECOMPUTE})
    with pytest.raises(ValueError, match="Install DeepSpeed"):
        refuse_emptied(model, plan, Settings(mode="full"))
    for module in model.modules():
        module.ds_recompute_parameters = set()
    refuse_emptied(model, plan, Settings(mode="full"))


ACTIVE, IDLE = Plan({"layers.0": RECOMPUTE}), Plan({"layers.0": KEEP})


def test_a_section_of_the_config_that_nothing_follows():
    engine = torch.nn.Module()
    engine.config = {"activation_checkpointing": {"partition_activations": True}}
    (said,) = deepspeed_notes(engine, ACTIVE)
    assert "'activation_checkpointing' of the DeepSpeed config does nothing" in said
    assert deepspeed_notes(engine, IDLE) == []
    engine.config = {"zero_optimization": {"stage": 2}}
    assert deepspeed_notes(engine, ACTIVE) == []


@pytest.mark.parametrize("configured", [True, False])
def test_checkpointing_of_deepspeed_beside_ours(monkeypatch, configured):
    own = SimpleNamespace(checkpointing=SimpleNamespace(is_configured=lambda: configured))
    monkeypatch.setitem(sys.modules, "deepspeed", own)
    said = deepspeed_notes(torch.nn.Module(), ACTIVE)
    assert ["use one of them" in text for text in said] == [True] * configured
    assert deepspeed_notes(torch.nn.Module(), IDLE) == []


def test_a_config_of_the_engine_is_not_taken_for_that_of_the_model():
    model = llama(2, use_cache=False)
    engine = torch.nn.Module()
    engine.config, engine.module = {"zero_optimization": {"stage": 2}}, model
    with UseCache(engine).set_to(True):
        assert model.config.use_cache is True
    assert model.config.use_cache is False
