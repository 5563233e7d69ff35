"""Two processes under FSDP2, started by accelerate: the same losses, gradients and collectives as without checkpointing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer_runs import (
    HERE,
    MODES,
    NUM_PROCESSES,
    QUANTISED,
    assert_as_one_process,
    assert_same,
    assert_worked,
    launch,
)

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    flags = {
        "num_processes": NUM_PROCESSES,
        "num_machines": 1,
        "mixed_precision": "no",
        "dynamo_backend": "no",
        "main_process_port": 0,
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_activation_checkpointing": "true",
        # Else transformers loads quantised weights in the first process only.
        "fsdp_cpu_ram_efficient_loading": "false",
    }
    given = [f"--{name}={value}" for name, value in flags.items()]
    folder = tmp_path_factory.mktemp("fsdp")
    return launch(folder, "accelerate.commands.launch", "--use_fsdp", *given, str(HERE / "train_fsdp.py"))


@pytest.fixture
def named(results):
    return lambda name: [found[name] for found in results]


@pytest.mark.parametrize("model", ["full", "lora"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_losses_and_gradients_of_the_plain_trainer(named, model, mode):
    found, plain = named(f"{model}, {mode}"), named(f"{model}, plain")
    assert_same(found, plain)
    assert_worked(found, "auto, sharded" if mode.startswith("auto") else mode)
    assert "FSDPLlamaDecoderLayer" in found[0]["modules"]
    # No parameter is gathered once more for a replay.
    assert [mine["collectives"] for mine in found] == [theirs["collectives"] for theirs in plain]
    assert min(found[0]["collectives"].values()) > 0
    assert found[0]["collectives"].keys() == {"all_gather", "reduce_scatter"}


@pytest.mark.parametrize("mode", QUANTISED)
@pytest.mark.parametrize("model", ["qlora", "qlora, sharded"])
def test_weights_of_4_bits(named, model, mode):
    found, plain = named(f"{model}, {mode}"), named(f"{model}, plain")
    assert_same(found, plain)
    assert_worked(found, mode)
    assert [mine["collectives"] for mine in found] == [theirs["collectives"] for theirs in plain]
    (line,) = [text for text in found[0]["lines"] if text.startswith("quantised")]
    assert "bitsandbytes, 4 bit" in line


@pytest.mark.parametrize("mode", ["full", "expensive"])
def test_mixed_precision(named, mode):
    assert_same(named(f"bf16, {mode}"), named("bf16, plain"))
    assert_worked(named(f"bf16, {mode}"), mode)
    for found in named(f"bf16, {mode}"):
        assert found["param_dtypes"] == {torch.bfloat16}
        assert {loss.dtype for loss in found["losses"]} == {torch.bfloat16}


def test_as_one_process_on_the_same_batch(named):
    assert_worked(named("no dropout"), "full")
    assert_as_one_process(named("no dropout"))


def test_configured_by_the_launcher(named):
    assert_same(named("environment"), named("full, plain"))
    assert named("environment")[0]["collectives"] == named("full, plain")[0]["collectives"]


@pytest.mark.parametrize("model", ["full", "lora"])
@pytest.mark.parametrize("mode", ["full", "attention", "offload"])
def test_two_forwards_before_a_backward_and_accumulation(named, model, mode):
    assert_same(named(f"twice, {model}, {mode}"), named(f"twice, {model}, plain"))


def test_reentrant_is_refused(named):
    for found in named("reentrant"):
        assert found["error"].startswith("ValueError: checkpointing_use_reentrant=True does not work under FSDP")
    assert_same(named("reentrant, none"), named("full, plain"))


@pytest.mark.parametrize(
    "name",
    ["launcher, full", "launcher, lora", "arguments", "arguments, default of the class", "arguments, plain class"],
)
def test_the_switch_of_fsdp_means_mode_full(named, name):
    assert_same(named(name), named("lora, plain" if name.endswith("lora") else "full, plain"))
    assert_worked(named(name), "full")
    for rank, found in enumerate(named(name)):
        assert "FSDPCheckpointWrapper" not in found["modules"]
        assert "FSDPLlamaDecoderLayer" in found["modules"]
        line = "FSDP's activation_checkpointing is taken as checkpointing_mode='full'"
        assert sum(text.startswith(line) for text in found["lines"]) == (rank == 0)


def test_other_flags_beside_the_switch_of_fsdp(named):
    assert_same(named("arguments, every_n"), named("full, plain"))
    assert_worked(named("arguments, every_n"), "every_n")
    assert_same(named("launcher, offload"), named("full, plain"))
    assert_worked(named("launcher, offload"), "offload")
    assert_same(named("launcher, said off"), named("full, plain"))
    assert_worked(named("launcher, said off"), "none")


def test_two_switches_are_refused(named):
    for found in named("launcher, mode"):
        assert found["error"].startswith("ValueError: FSDP_ACTIVATION_CHECKPOINTING=true of accelerate and")
    for found in named("arguments, flag"):
        assert found["error"].startswith("ValueError: fsdp_config['activation_checkpointing']=True and ")


@pytest.mark.parametrize("model", ["full", "lora"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(named, model):
    for found, resumed in zip(named(f"saved, {model}"), named(f"saved, {model}, resumed"), strict=True):
        assert len(resumed["losses"]) == 2, resumed
        assert all(map(torch.equal, found["losses"][1:], resumed["losses"]))
        for one, other in zip(found["gradients"][1:], resumed["gradients"], strict=True):
            assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_what_is_saved_is_what_the_plain_trainer_saves(results):
    folder = Path(results[0]["folder"])
    ours, plain = (
        load_file(next((folder / kind / "checkpoint-1").glob("*.safetensors"))) for kind in ("full", "plain")
    )
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
