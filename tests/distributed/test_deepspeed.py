"""DeepSpeed ZeRO-2 and ZeRO-3 with two processes: every mode gives the bits of mode `none`, and of plain Trainer.

All in one launch, since starting DeepSpeed takes longer than what is compared.
"""

import logging
import os
import socket
from contextlib import nullcontext

import pytest
import torch
import torch.multiprocessing
from fake_device import FakeStreams
from peft import LoraConfig, get_peft_model
from tiny_models import llama, text_dataset
from transformers import Trainer, TrainingArguments

from ckpt_trainer import CheckpointedTrainer, CheckpointTrainingArguments, groups, streams

NUM_PROCESSES = 2
NUM_LAYERS = 3


pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        not hasattr(TrainingArguments, "activation_checkpointing"),
        reason="the Trainer of transformers 4.57 fails under DeepSpeed by itself: its scheduler finds no groups",
    ),
]

MODES = [
    {"checkpointing_mode": "none"},
    {"checkpointing_mode": "full"},
    {"checkpointing_mode": "full", "checkpointing_every_n": 2},
    {"checkpointing_mode": "full", "checkpointing_segment": 3},
    {"checkpointing_mode": "selective"},
    {"checkpointing_mode": "selective", "checkpointing_save": "attention"},
    {"checkpointing_mode": "selective", "checkpointing_save": ["matmul", "mlp.*"]},
    {"checkpointing_mode": "offload"},
    {"checkpointing_mode": "full", "checkpointing_use_reentrant": True},
]
SOME_MODES = [MODES[number] for number in (0, 1, 2, 4, 7)]


def replays_of(flags):
    """Blocks of three that are replayed in each forward."""
    if flags["checkpointing_mode"] == "none" or flags == {"checkpointing_mode": "selective"}:
        return 0
    return 2 if "checkpointing_every_n" in flags else NUM_LAYERS


def train(folder, stage, adapters, trainer_class, arguments_class, **flags):
    import deepspeed

    torch.manual_seed(0)
    model = llama(NUM_LAYERS, use_cache=False)
    if adapters:
        chosen = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"])
        model = get_peft_model(model, chosen)
    config = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        # Parameters are really sharded, small as they are.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
                              "stage3_prefetch_bucket_size": 0},
        "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": True},
    }  # fmt: skip
    args = arguments_class(
        output_dir=folder, per_device_train_batch_size=2, max_steps=2, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", gradient_accumulation_steps=2, deepspeed=config,
        optim="sgd", learning_rate=0.1, **flags,  # what is added to a weight is its gradient
    )  # fmt: skip
    trainer = trainer_class(model=model, args=args, train_dataset=text_dataset(16))
    trainer.train()
    parameters = list(trainer.model.parameters())
    with deepspeed.zero.GatheredParameters(parameters) if stage == 3 else nullcontext():
        weights = [parameter.detach().clone() for parameter in parameters]
    logged = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    return trainer, logged, weights


class Said(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def compare(folder, stage, adapters, modes):
    _, expected, weights = train(folder, stage, adapters, Trainer, TrainingArguments)
    assert len(expected) == 2
    for flags in modes:
        where = (stage, adapters, flags)
        said, fake = Said(), FakeStreams("lazy")
        streams.streams_of = fake.streams_of
        logging.getLogger("ckpt_trainer").addHandler(said)
        trainer, found, found_weights = train(
            folder, stage, adapters, CheckpointedTrainer, CheckpointTrainingArguments, **flags
        )
        logging.getLogger("ckpt_trainer").removeHandler(said)
        assert found == expected, where
        assert len(found_weights) == len(weights), where
        assert all(map(torch.equal, found_weights, weights)), where
        report = trainer.memory_report()
        assert report["recomputed_blocks"] == 2 * 2 * replays_of(flags), where
        moved = report["offload"]["copies_out"] if report["offload"] else 0
        assert (moved > 0) == (flags["checkpointing_mode"] == "offload"), where
        if int(os.environ["RANK"]) == 0:
            told = [text for text in said.messages if "section 'activation_checkpointing'" in text]
            assert len(told) == (flags["checkpointing_mode"] != "none"), where


def run(rank, folder, port):
    os.environ.update(
        DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(NUM_PROCESSES),
        LOCAL_WORLD_SIZE=str(NUM_PROCESSES), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    import deepspeed

    # An all-reduce of its own that it would compile now, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    groups.MIN_BYTES = 16
    for stage, adapters in ((2, False), (2, True), (3, False), (3, True)):
        # All where most can go wrong: parameters are sharded, and some of them frozen.
        compare(folder, stage, adapters, MODES if stage == 3 and adapters else SOME_MODES)
    torch.distributed.destroy_process_group()
    # Not by way of Python's own end, which aborts if one of DeepSpeed's or gloo's threads asks for the interpreter then.
    os._exit(0)


def test_every_mode_under_zero(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run, args=(str(tmp_path), port), nprocs=NUM_PROCESSES)
