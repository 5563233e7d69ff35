"""Decisions for several processes that one process can see; `distributed/` has the runs."""

import logging
import os
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from tiny_models import CASES, llama
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainingArguments

from ckpt_trainer import CheckpointTrainingArguments, checkpointing
from ckpt_trainer.distributed import Turns, fsdp_mode, may_replay_reentrant, take_over, unused_parameters_decided
from ckpt_trainer.plan import Action, Part, Plan, Settings
from ckpt_trainer.training_args import settings_of

LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"}
FSDP = {"fsdp": True if hasattr(TrainingArguments, "_process_fsdp_args") else "full_shard auto_wrap"}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, as `accelerate launch` does; what transformers itself sets is taken away in the end, too."""
    before = dict(os.environ)
    for name in ("ACCELERATE_USE_FSDP", "FSDP_ACTIVATION_CHECKPOINTING", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch.setenv
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("fields", "variables", "mode"),
    [
        ({}, {}, None),
        ({"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}, {}, "full"),
        ({"fsdp": True, "fsdp_config": {"activation_checkpointing": "true"}}, {}, "full"),
        ({"fsdp": True, "fsdp_config": {"fsdp_activation_checkpointing": True}}, {}, "full"),
        ({"fsdp": True, "fsdp_config": {"activation_checkpointing": "false"}}, LAUNCHED, None),
        ({"fsdp": False, "fsdp_config": {"activation_checkpointing": True}}, {}, None),
        ({"fsdp": None, "fsdp_config": None}, LAUNCHED, "full"),
        ({"fsdp": True, "fsdp_config": "file.json"}, LAUNCHED, "full"),
        ({"fsdp": None}, {**LAUNCHED, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}, "offload"),
        ({"fsdp": None}, {**LAUNCHED, "ACCELERATE_USE_FSDP": "false"}, None),
        ({}, LAUNCHED, None),
    ],
)
def test_the_switch_of_fsdp_is_read_where_fsdp_is_on(environment, fields, variables, mode):
    for name, value in variables.items():
        environment(name, value)
    found = fsdp_mode(fields, None)
    assert (found and found[1:]) == (mode and (mode, True))


@pytest.mark.parametrize("on", [False, True])
def test_the_second_switch_of_fsdp_alone_is_told_once(environment, caplog, on):
    logger = logging.getLogger("ckpt_trainer.distributed")
    type(logger).warning_once.cache_clear()
    config = {"activation_checkpointing_offload": True, "activation_checkpointing": on}
    with caplog.at_level(logging.WARNING, logger=logger.name):
        for _ in range(2):
            assert (fsdp_mode({"fsdp": True, "fsdp_config": config}, None) is not None) == on
            fsdp_mode({"fsdp": False, "fsdp_config": {**config, "activation_checkpointing": False}}, None)
    said = [record.getMessage() for record in caplog.records if record.name == logger.name]
    assert len(said) == (not on)
    assert on or said[0].startswith("No effect without activation_checkpointing of FSDP: fsdp_config[")


@dataclass
class DefaultOn(CheckpointTrainingArguments):
    gradient_checkpointing: bool = True


def test_the_switch_of_fsdp_is_one_more_name_of_a_mode(environment):
    on = {**FSDP, "fsdp_config": {"activation_checkpointing": True}}
    for made in (CheckpointTrainingArguments, TrainingArguments, DefaultOn):
        settings = settings_of(made(**on))
        assert (settings.mode, settings.named) == ("full", True)
    assert settings_of(CheckpointTrainingArguments(**on, checkpointing_every_n=2)).every_n == 2
    on["fsdp_config"] = {"activation_checkpointing": True, "activation_checkpointing_offload": True}
    assert settings_of(CheckpointTrainingArguments(**on)).mode == "offload"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"checkpointing_mode": "none"}, "checkpointing_mode='none'"),
        ({"checkpointing_mode": "full"}, "checkpointing_mode='full'"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=True"),
        ({"gradient_checkpointing_kwargs": {"offload": True}}, "'offload'"),
        ({"checkpointing_plan": "plan.json"}, "checkpointing_plan='plan.json'"),
    ],
)
def test_two_switches_are_refused_by_name(environment, tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text('{"blocks": {}}')
    for config, variables in (({"activation_checkpointing": True}, {}), ({}, LAUNCHED)):
        for name, value in variables.items():
            environment(name, value)
        with pytest.raises(ValueError, match="both say what is done to each block") as error:
            CheckpointTrainingArguments(**FSDP, fsdp_config=config, **flags)
        assert named in str(error.value)
        assert ("FSDP_ACTIVATION_CHECKPOINTING=true" if variables else "fsdp_config[") in str(error.value)


def test_a_loop_of_ones_own_does_not_read_what_a_launcher_left(environment):
    for name, value in LAUNCHED.items():
        environment(name, value)
    with checkpointing(llama(), mode="none") as state:
        assert not state.plan.is_active


def test_accelerates_own_is_turned_off_and_said_where_it_was_on():
    for value, was_on in ((True, True), (False, False), ("true", True), ("false", False)):
        plugin = SimpleNamespace(activation_checkpointing=value, activation_checkpointing_offload=value)
        assert take_over(plugin) is was_on
        assert not plugin.activation_checkpointing
        assert not plugin.activation_checkpointing_offload
    assert take_over(None) is False


@pytest.mark.parametrize(("given", "reentrant", "seen"), [(None, False, True), (None, True, False), (True, True, True)])
def test_unused_parameters_are_decided_where_the_user_did_not(given, reentrant, seen):
    fields = {"ddp_find_unused_parameters": given}
    with unused_parameters_decided(fields, reentrant):
        assert fields == {"ddp_find_unused_parameters": seen}
    assert fields == {"ddp_find_unused_parameters": given}


PLANS = {kind: Plan({"a": Action("keep"), "b": Action(kind)}) for kind in ("keep", "recompute")}


@pytest.mark.parametrize(
    ("settings", "has_policy", "may"),
    [
        ({}, False, True),
        ({"mode": "none"}, False, False),
        ({"mode": "none"}, True, True),
        ({"mode": "none", "modules": (Part("text", "none"),)}, False, False),
        ({"mode": "none", "modules": (Part("text", "full"),)}, False, True),
        ({"plan": PLANS["keep"]}, False, False),
        ({"plan": PLANS["recompute"]}, False, True),
    ],
)
def test_whether_the_reentrant_variant_may_replay(settings, has_policy, may):
    assert may_replay_reentrant(Settings(use_reentrant=True, **settings), has_policy) == may
    assert not may_replay_reentrant(Settings(**settings), has_policy)


@pytest.mark.parametrize(
    ("events", "refused_at"),
    [
        # A number: a call of that forward is replayed.
        (["begin", 1, 1, "begin", 2, 2, 2], None),
        (["begin", "begin", 2, 2, "begin", 3], None),  # the first is dropped
        (["begin", 1, "begin", "begin", 3, "begin", 4], None),
        (["begin", "begin", 2, 1], 3),
        (["begin", "begin", 1, 2], 3),
        (["begin", "begin", 2, "begin", 3, 1], 5),
        ([0, 0], None),  # not looked at
    ],
)
def test_two_forwards_of_one_backward_are_told_from_dropped_ones(events, refused_at):
    turns, found = Turns(), None
    for place, event in enumerate(events):
        if event == "begin":
            turns.begun += 1
            continue
        try:
            turns.replay(event)
        except ValueError:
            found = place
            break
    assert found == refused_at


class Sharded(FullyShardedDataParallel):
    """FSDP1 as far as it goes without an accelerator, on which it insists."""

    def __init__(self, module):
        torch.nn.Module.__init__(self)
        self._fsdp_wrapped_module = module

    def named_parameters(self, *args, **kwargs):
        return torch.nn.Module.named_parameters(self, *args, **kwargs)


def test_fsdp_of_version_1_is_warned_of_and_refused_to_reentrant(caplog):
    with checkpointing(Sharded(llama())) as state:
        assert state.plan.count("recompute") == 4
    assert sum("under FSDP1" in text for text in caplog.messages) == 1
    caplog.clear()
    with checkpointing(llama()):
        pass
    assert not any("FSDP" in text for text in caplog.messages)
    with (
        pytest.raises(ValueError, match="does not work under FSDP"),
        checkpointing(Sharded(llama()), use_reentrant=True),
    ):
        pass


def test_reentrant_that_replays_nothing_is_not_refused():
    plan = Plan({f"model.layers.{number}": Action("keep") for number in range(2)})
    for refused in (Sharded(llama(2)), CASES["mixtral"].build()):
        for flags in ({"mode": "none"}, {"plan": plan}):
            with checkpointing(refused, use_reentrant=True, **flags) as state:
                assert not state.plan.is_active
        with pytest.raises(ValueError, match="use_reentrant"), checkpointing(refused, use_reentrant=True):
            pass


def test_blocks_that_others_recompute_are_refused():
    model = llama()
    model.model.layers = torch.nn.ModuleList(checkpoint_wrapper(layer) for layer in model.model.layers)
    with pytest.raises(ValueError, match="4 modules of LlamaForCausalLM are wrapped"), checkpointing(model):
        pass
    with checkpointing(model, mode="none") as state:
        assert not state.plan.is_active
