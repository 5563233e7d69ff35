"""Two processes under DDP, started by torchrun: the same losses and gradients as without checkpointing."""

import pytest
import torch
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
    torchrun = ("torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_PROCESSES}")
    return launch(tmp_path_factory.mktemp("ddp"), *torchrun, str(HERE / "train_ddp.py"))


@pytest.fixture
def named(results):
    return lambda name: [found[name] for found in results]


@pytest.mark.parametrize("model", ["full", "lora", "unused"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_losses_and_gradients_of_the_plain_trainer(named, model, mode):
    assert_same(named(f"{model}, {mode}"), named(f"{model}, plain"))
    assert_worked(named(f"{model}, {mode}"), mode)


@pytest.mark.parametrize("mode", QUANTISED)
def test_weights_of_4_bits(named, mode):
    assert_same(named(f"qlora, {mode}"), named("qlora, plain"))
    assert_worked(named(f"qlora, {mode}"), mode)
    (line,) = [text for text in named(f"qlora, {mode}")[0]["lines"] if text.startswith("quantised")]
    assert "bitsandbytes, 4 bit" in line


@pytest.mark.parametrize("name", ["full, none", "full, full", "lora, full", "flag", "switched on"])
def test_unused_parameters_are_looked_for_as_without_checkpointing(named, name):
    plain = "lora, plain" if name.startswith("lora") else "full, plain"
    assert_same(named(name), named(plain))
    assert {found["find_unused"] for found in named(name)} == {named(plain)[0]["find_unused"]} == {True}


def test_the_users_word_on_unused_parameters_counts(named):
    assert_same(named("said off"), named("full, plain"))
    assert {found["find_unused"] for found in named("said off")} == {False}


def test_as_one_process_on_the_same_batch(named):
    assert_worked(named("no dropout"), "full")
    assert_as_one_process(named("no dropout"))


@pytest.mark.parametrize("model", ["full", "lora"])
@pytest.mark.parametrize("key", ["full", "attention"])
@pytest.mark.parametrize("loss", ["accumulated", "twice"])
def test_accumulation_and_two_forwards_before_a_backward(named, loss, model, key):
    assert_same(named(f"{loss}, {model}, {key}"), named(f"{loss}, {model}, plain"))


@pytest.mark.parametrize("model", ["full", "lora"])
def test_reentrant_does_not_look_for_unused_parameters(named, model):
    assert_same(named(f"{model}, reentrant"), named(f"{model}, plain"))
    assert_same(named(f"accumulated, {model}, reentrant"), named(f"accumulated, {model}, plain"))
    assert {found["find_unused"] for found in named(f"{model}, reentrant")} == {False}
    assert {found["report"]["recomputed_blocks"] for found in named(f"{model}, reentrant")} == {8}


def test_reentrant_is_refused_where_unused_parameters_must_be_looked_for(named):
    for found in named("said on"):
        assert found["error"].startswith("ValueError: checkpointing_use_reentrant=True does not work under DDP")


def test_reentrant_that_replays_nothing_changes_nothing(named):
    assert_same(named("unused, none, reentrant"), named("unused, plain"))
    assert {found["find_unused"] for found in named("unused, none, reentrant")} == {True}


def test_reentrant_with_unused_parameters_says_what_helps(named):
    for found in named("unused, reentrant"):
        assert found["error"].startswith("RuntimeError: Parameters got no gradient, which checkpointing_use_reentrant")


@pytest.mark.parametrize(
    "name", ["twice, full, reentrant", "twice, lora, reentrant", "loop of 2, reentrant", "one by one, reentrant"]
)
def test_reentrant_is_refused_for_two_forwards_before_a_backward(named, name):
    for found in named(name):
        assert found["error"].startswith("ValueError: checkpointing_use_reentrant=True gives wrong gradients under DDP")


def test_reentrant_in_a_loop_of_ones_own(named):
    assert_same(named("loop of 1, reentrant"), named("loop of 1"))
    assert_same(named("loop of 1, static"), named("loop of 1"))
    assert_same(named("loop of 2, static"), named("loop of 2"))


def test_reentrant_is_not_refused_for_a_forward_without_a_backward(named):
    assert_same(named("last of 2, reentrant"), named("last of 2"))


def test_fsdps_own_switch_where_accelerate_runs_ddp_in_its_place(named):
    assert_same(named("fsdp"), named("full, plain"))
    assert_worked(named("fsdp"), "full")
    assert {found["find_unused"] for found in named("fsdp")} == {True}
    line = "FSDP's activation_checkpointing is taken as checkpointing_mode='full'"
    for rank, found in enumerate(named("fsdp")):
        assert sum(text.startswith(line) for text in found["lines"]) == (rank == 0)


@pytest.mark.parametrize("model", ["full", "lora"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(named, model):
    for found, resumed in zip(named(f"saved, {model}"), named(f"saved, {model}, resumed"), strict=True):
        assert len(resumed["losses"]) == 2, resumed
        assert all(map(torch.equal, found["losses"][1:], resumed["losses"]))
        for one, other in zip(found["gradients"][1:], resumed["gradients"], strict=True):
            assert [name for name in one if not torch.equal(one[name], other[name])] == []
