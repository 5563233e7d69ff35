"""Mode offload through the engine and the trainer: what is said, what is counted, and where it comes to nothing.

Schedules and races are in `test_offload_schedules`, architectures and kinds of blocks in `test_offload_selective`.
"""

import logging
import re

import pytest
import tiny_models
import torch
from fake_device import FakeStreams
from transformers import Trainer, TrainingArguments

from ckpt_trainer import CheckpointedTrainer, CheckpointTrainingArguments, checkpointing, streams
from ckpt_trainer.memory import LiveBytes


@pytest.fixture
def device(monkeypatch):
    """A fake device in place of the one that is not there; small tensors leave it, too."""
    fake = FakeStreams("lazy")
    monkeypatch.setattr(streams, "streams_of", fake.streams_of)
    monkeypatch.setattr("ckpt_trainer.groups.MIN_BYTES", 16)
    return fake


def gradients(steps=2, model=None, **flags):
    """Gradients of some steps of a small Llama, and the report."""
    model = model or tiny_models.llama(6)
    batch = tiny_models.CASES["llama"].batch()
    torch.manual_seed(3)
    with checkpointing(model, **flags) as state:
        for _ in range(steps):
            model(**batch)["loss"].backward()
    return [parameter.grad for parameter in model.parameters()], state.report()


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def train(trainer_class, arguments_class, folder, **flags):
    model = tiny_models.llama(6)
    arguments = arguments_class(
        output_dir=folder, max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to=[], save_strategy="no",
        disable_tqdm=True, **flags,
    )  # fmt: skip
    trainer = trainer_class(model, arguments, train_dataset=tiny_models.text_dataset(12))
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_flag_of_transformers_trains_without_an_accelerator(tmp_path, caplog):
    _, expected = train(Trainer, TrainingArguments, tmp_path)
    with caplog.at_level(logging.INFO, "ckpt_trainer"):
        trainer, losses = train(
            CheckpointedTrainer, CheckpointTrainingArguments, tmp_path, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"offload": True},
        )  # fmt: skip
    assert losses == expected
    report = trainer.memory_report()
    assert report["blocks"] == {"text": {"recompute@host": 6}}
    assert report["recomputed_blocks"] == 18
    assert (report["offload"]["devices"], report["offload"]["bytes_out"]) == ([], 0)
    said = [record.message for record in caplog.records]
    assert (
        sum("offload moves nothing, since cpu is the host: blocks are recomputed as without it" in m for m in said) == 1
    )
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not any("offload" in key for entry in trainer.state.log_history for key in entry)


@pytest.mark.parametrize(
    ("save", "does"),
    [("inputs", "recomputed"), ("attention", "selective"), ("all", "kept")],
)
def test_without_an_accelerator_blocks_do_what_they_do_without_offload(save, does, caplog):
    mode = {
        "inputs": {"mode": "full"},
        "attention": {"mode": "selective", "save": "attention"},
        "all": {"mode": "none"},
    }
    expected, _ = gradients(**mode[save])
    with caplog.at_level(logging.INFO, "ckpt_trainer"):
        found, report = gradients(mode="offload", offload_save=save)
    assert_equal(found, expected)
    assert f"offload moves nothing, since cpu is the host: blocks are {does} as without it" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert report["recomputed_blocks"] == (0 if save == "all" else 12)


def test_trainer_counts_what_it_moves(device, tmp_path):
    _, expected = train(Trainer, TrainingArguments, tmp_path)
    trainer, losses = train(CheckpointedTrainer, CheckpointTrainingArguments, tmp_path, checkpointing_mode="offload")
    assert losses == expected
    report = trainer.memory_report()["offload"]
    # Of 6 inputs of 2 x 12 x 32 numbers the last never leaves, and the one before has not left when backward begins.
    one = 2 * 12 * 32 * 4
    assert (report["copies_out"], report["bytes_out"]) == (3 * 5, 3 * 5 * one)
    assert (report["copies_in"], report["bytes_in"]) == (3 * 4, 3 * 4 * one)
    assert (report["prefetch_hits"], report["prefetch_misses"]) == (3 * 4, 0)
    assert report["devices"] == ["cpu"]
    assert report["host_peak_bytes"] > 0
    # Host memory went back when training was over.
    assert report["host_bytes"] == report["host_held_bytes"] == device.host_bytes == 0
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["checkpointing/offload_bytes_out"] for entry in logs] == [5 * one] * 3
    assert [entry["checkpointing/offload_bytes_in"] for entry in logs] == [4 * one] * 3
    assert [entry["checkpointing/offload_prefetch_hits"] for entry in logs] == [4] * 3
    assert [entry["checkpointing/offload_prefetch_misses"] for entry in logs] == [0] * 3
    assert all(entry["checkpointing/offload_waited_seconds"] >= 0 for entry in logs)
    assert logs[-1]["checkpointing/offload_host_peak_bytes"] == report["host_peak_bytes"]


@pytest.mark.parametrize(
    ("save", "text"),
    [
        ("inputs", "6/6 text blocks recomputed with inputs on the host"),
        ("attention", "6/6 text blocks selective:attention on the host"),
        ("all", "6/6 text blocks stored on the host"),
    ],
)
def test_first_line_says_what_goes_where(device, save, text, caplog):
    with caplog.at_level(logging.INFO, "ckpt_trainer"):
        gradients(mode="offload", offload_save=save)
    assert text in caplog.text


def test_without_prefetch_all_are_missed(device):
    _, report = gradients(steps=1, mode="offload", prefetch=0)
    assert (report["offload"]["prefetch_hits"], report["offload"]["prefetch_misses"]) == (0, 5)


def test_nothing_moved_is_a_warning(monkeypatch, device, caplog):
    monkeypatch.setattr("ckpt_trainer.groups.MIN_BYTES", 2**20)
    _, report = gradients(mode="offload")
    assert report["offload"]["bytes_out"] == 0
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    # How many a block is given depends on the version of transformers.
    assert re.match(
        r"0 bytes offloaded in the first step. Tensors that stayed on the device: \d+ below 1.00 MiB;", said[0]
    )


def test_what_has_no_room_stays_and_is_said_once(device, caplog):
    expected, _ = gradients(mode="full")
    found, report = gradients(mode="offload", host_budget=2 * 4096)
    assert_equal(found, expected)
    # Of five that would leave in each step.
    assert report["offload"]["copies_out"] == 2 * 2
    kept = report["offload"]["kept"]["host budget reached"]
    assert (kept["tensors"], kept["bytes"]) == (2 * 3, 2 * 3 * 2 * 12 * 32 * 4)
    assert 0 < report["offload"]["host_peak_bytes"] <= 2 * 4096
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    assert "host budget reached" in said[0]
    assert "checkpointing_host_budget" in said[0]


def test_refused_host_memory_is_a_tensor_that_stays(monkeypatch, device, caplog):
    expected, _ = gradients(mode="full")

    def refuse(nbytes):
        raise RuntimeError("no pinned memory for you")

    monkeypatch.setattr(device, "host", refuse)
    found, report = gradients(mode="offload")
    assert_equal(found, expected)
    assert report["offload"]["bytes_out"] == 0
    assert any("no pinned memory for you" in why for why in report["offload"]["kept"])
    assert "no pinned memory for you" in caplog.text


def test_pageable_memory_only_if_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(streams, "streams_of", lambda device, pinned=True: asked.append(pinned))
    gradients(steps=1, mode="offload")
    gradients(steps=1, mode="offload", offload_to="pageable")
    assert asked == [True, False]


@pytest.mark.parametrize("flags", [{"use_reentrant": True}, {"segment": 2}, {"every_n": 2}, {"prefetch": 5}])
def test_goes_with_other_flags(device, flags):
    rest = {name: value for name, value in flags.items() if name != "prefetch"}
    expected, plain = gradients(mode="full", **rest)
    found, report = gradients(mode="offload", **flags)
    assert_equal(found, expected)
    assert report["recomputed_by_block"] == plain["recomputed_by_block"]
    assert report["offload"]["bytes_out"] > 0


def test_segments_move_fewer_inputs(device):
    _, all_inputs = gradients(steps=1, mode="offload")
    _, some = gradients(steps=1, mode="offload", segment=3)
    assert (all_inputs["offload"]["copies_out"], some["offload"]["copies_out"]) == (5, 2)


def test_parts_and_plans_mix_places(device):
    expected, _ = gradients(mode="none")
    plan = {
        "model.layers.0": "keep@host",
        "model.layers.1": "selective:expensive@host",
        "model.layers.2": "selective:attention@host",
        "model.layers.3": "recompute@host",
        "model.layers.4": "selective:mlp.*@host",
    }

    def policy(block):
        return plan.get(block.name, "keep")

    found, report = gradients(mode="full", policy=policy)
    assert_equal(found, expected)
    assert report["offload"]["bytes_out"] > 0
    assert report["plan"]["blocks"] == {**plan, "model.layers.5": "keep"}


def test_frozen_blocks_store_nothing(device):
    def frozen():
        model = tiny_models.llama(6)
        model.get_input_embeddings().requires_grad_(False)
        for block in model.model.layers[:4]:
            block.requires_grad_(False)
        return model

    expected, _ = gradients(mode="full", model=frozen())
    found, report = gradients(steps=2, mode="offload", model=frozen())
    assert_equal(found, expected)
    # Of the two blocks with a graph, the first one's input leaves.
    assert report["offload"]["copies_out"] == 2


def test_host_memory_outlives_a_change_of_what_is_trainable(device):
    model, batch = tiny_models.llama(4), tiny_models.CASES["llama"].batch()
    with checkpointing(model, mode="offload") as state:
        model(**batch)["loss"].backward()
        held = device.host_bytes
        model.model.layers[0].requires_grad_(False)
        with state.step():
            model(**batch)["loss"].backward()
        assert device.host_bytes == held > 0
    assert device.host_bytes == 0


def test_a_graph_outlives_what_took_its_host_memory(device):
    model, batch = tiny_models.llama(4), tiny_models.CASES["llama"].batch()
    torch.manual_seed(3)
    with checkpointing(model, mode="offload"):
        loss = model(**batch)["loss"]
    assert device.host_bytes > 0
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    del loss
    assert device.host_bytes == 0
    expected, _ = gradients(steps=1, mode="full", model=tiny_models.llama(4))
    assert_equal(found, expected)


@pytest.mark.parametrize("save", ["inputs", "expensive", "attention", "all"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gemma3n", "wav2vec2_conformer"])
def test_what_left_comes_back_once(device, name, save):
    # Also where blocks share tensors, or what one stores could be made of what another did.
    model, batch = tiny_models.CASES[name].build(), tiny_models.CASES[name].batch()
    with checkpointing(model, mode="offload", offload_save=save) as state:
        model(**batch)["loss"].backward()
        report = state.report()["offload"]
    assert 0 < report["copies_in"] <= report["copies_out"]
    assert report["bytes_in"] <= report["bytes_out"]
    assert report["prefetch_misses"] <= report["prefetch_hits"] / 4


def test_weights_cast_by_autocast_stay(device):
    model, batch, kept = tiny_models.llama(4), tiny_models.CASES["llama"].batch(), []
    for enabled in (False, True):
        with checkpointing(model, mode="offload", offload_save="all") as state:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = model(**batch)["loss"]
            loss.backward()
            kept.append(state.report()["offload"]["kept"]["parameter or buffer"]["tensors"])
    assert kept[1] == kept[0] > 0


def test_what_is_on_the_device_anyway_is_not_copied_back(device):
    model, batch = tiny_models.llama(6), tiny_models.CASES["llama"].batch()
    with checkpointing(model, mode="offload") as state:
        output = model(**batch, output_hidden_states=True)
        output["loss"].backward()
        report = state.report()["offload"]
    assert (report["copies_out"], report["copies_in"]) == (5, 0)


def test_a_prefetch_that_finds_no_memory_costs_time_only(monkeypatch, device, caplog):
    expected, _ = gradients(mode="full")
    empty, calls = device.empty, []

    def sometimes(nbytes):
        calls.append(nbytes)
        if len(calls) % 2:
            raise torch.OutOfMemoryError("none left")
        return empty(nbytes)

    monkeypatch.setattr(device, "empty", sometimes)
    found, report = gradients(mode="offload")
    assert_equal(found, expected)
    assert report["offload"]["prefetch_failures"] > 0
    assert report["offload"]["prefetch_misses"] > 0
    assert caplog.text.count("a prefetch failed") == 1


@pytest.mark.parametrize("save", ["inputs", "expensive", "attention", "all"])
def test_an_outer_saved_tensor_hook_of_the_user_is_left_in_peace(device, save):
    model, batch = tiny_models.llama(4), tiny_models.CASES["llama"].batch()
    torch.manual_seed(3)
    model(**batch)["loss"].backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    seen = []
    torch.manual_seed(3)
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: seen.append(tensor.shape) or tensor, lambda tensor: tensor
        ),
        checkpointing(model, mode="offload", offload_save=save),
    ):
        loss = model(**batch)["loss"]
    loss.backward()
    assert seen
    assert_equal([parameter.grad for parameter in model.parameters()], expected)


def test_live_bytes_fall_by_what_leaves(monkeypatch, device):
    # Fewer bytes of the fake device are alive at the end of the forward: all but two inputs are on the host.
    one = 2 * 12 * 32 * 4

    def alive_after_forward(**flags):
        model, batch = tiny_models.llama(8), tiny_models.CASES["llama"].batch()
        with checkpointing(model, **flags):
            model(**batch)["loss"].backward()  # host memory is taken before it is counted
            with LiveBytes(model) as live:
                loss = model(**batch)["loss"]
                current = live.current
            loss.backward()
        return current

    assert alive_after_forward(mode="full") - alive_after_forward(mode="offload") == 6 * one


def test_a_compiled_model_is_not_reached_and_says_so(device, caplog):
    batch, found = tiny_models.CASES["llama"].batch(), {}
    for mode in ("full", "offload"):
        model = tiny_models.llama(2)
        compiled = torch.compile(model, backend="aot_eager")
        torch.manual_seed(3)
        with checkpointing(compiled, mode=mode) as state:
            compiled(**batch)["loss"].backward()
        found[mode] = [parameter.grad for parameter in model.parameters()]
    assert_equal(found["offload"], found["full"])
    assert state.report()["offload"]["bytes_out"] == 0
    assert "the model is compiled, which offload does not reach" in caplog.text


def test_a_budget_above_what_is_available_is_said(device, caplog):
    gradients(steps=1, mode="offload", host_budget="100TiB")
    assert "checkpointing_host_budget of 100 TiB is more than the" in caplog.text


def test_a_place_is_no_part_of_a_mode():
    meant = {"selective:attention@host": "offload:attention", "recompute@host": "offload", "keep@disk": "offload:all"}
    for mode, near in meant.items():
        with pytest.raises(ValueError, match=rf"'{mode}' is not a mode; .* Did you mean '{near}'"):
            CheckpointTrainingArguments(checkpointing_modules={"text": mode})
