"""Runs of real trainers in several processes, and what is kept of each for the tests: losses, gradients, counts."""

import faulthandler
import gc
import logging
import os
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import peft
import torch
import torch.distributed as dist
import transformers
from fake_device import FakeStreams
from tiny_models import llama, text_dataset
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

from ckpt_trainer import CheckpointedTrainer, CheckpointTrainingArguments, groups, streams

HERE = Path(__file__).parent
NUM_PROCESSES = 2
NUM_STEPS = 2
SECONDS_AT_MOST = 300
BASE = "BASE_MODEL_OF_TESTS"  # the environment variable with the folder of a saved model

# The modes that every launcher is tried with; blocks 1 and 2 of 4 are those of `modules`.
MODES = {
    "none": {"checkpointing_mode": "none"},
    "full": {"checkpointing_mode": "full"},
    "every_n": {"checkpointing_mode": "full", "checkpointing_every_n": 2},
    "modules": {"checkpointing_mode": "none", "checkpointing_modules": {"*layers.[12]": "full"}},
    "expensive": {"checkpointing_mode": "selective"},
    "attention": {"checkpointing_mode": "selective", "checkpointing_save": "attention"},
    "offload": {"checkpointing_mode": "offload"},
    "auto": {},
    "auto, no room": {"checkpointing_mode": "auto", "checkpointing_budget": "0B"},
}

# Those that models with quantised weights are tried with.
QUANTISED = ("none", "full", "expensive", "offload")


def lora(model, dropout=0.1):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=dropout, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def qlora(**options):
    """With adapters on weights of 4 bits."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
    loaded = AutoModelForCausalLM.from_pretrained(os.environ[BASE], quantization_config=config, dtype=torch.bfloat16)
    # transformers 4 trains with it, on keys that are laid out in another way.
    loaded.config.use_cache = False
    torch.manual_seed(0)
    return lora(loaded)


def with_unused(model):
    model.extra = torch.nn.Linear(3, 3)
    return model


MODELS = {
    "full": llama,
    "lora": lambda: lora(llama()),
    "no dropout": lambda: llama(dropout=0.0),
    "unused": lambda: with_unused(llama()),
    "qlora": qlora,
    "qlora, sharded": lambda: qlora(bnb_4bit_quant_storage=torch.bfloat16),
    "bf16": lambda: llama(use_cache=False),
}


def fsdp(**config):
    """FSDP2 by training arguments; transformers 4 has no name for the version, and takes it from the environment."""
    by_bool = hasattr(TrainingArguments, "_process_fsdp_args")
    wrapped = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    return {"fsdp": True if by_bool else "full_shard auto_wrap", "fsdp_config": {**wrapped, **config}}


def twice(trainer_class):
    """A trainer whose loss needs two forwards before its backward."""

    class Twice(trainer_class):
        def compute_loss(self, model, inputs, *args, **kwargs):
            turned = {name: value.flip(0) for name, value in inputs.items()}
            return model(**inputs).loss + 0.5 * model(**turned).loss

    return Twice


def recorded(trainer_class):
    class Recorded(trainer_class):
        losses = ()

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.losses = [*self.losses, loss.detach().clone()]
            return loss

    return Recorded


class Gradients(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        self.seen.append({name.removeprefix("module."): gradient for name, gradient in found.items()})


def whole(gradient):
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


COLLECTIVES = Counter()


def count_collectives():
    """Count the collectives of FSDP2, by kind."""
    for name in ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor"):
        if hasattr(dist, name):
            setattr(dist, name, counted(getattr(dist, name), name.rpartition("_")[0]))


def counted(function, kind):
    def call(*args, **kwargs):
        COLLECTIVES[kind] += 1
        return function(*args, **kwargs)

    return call


def run(model, trainer=Trainer, num_steps=NUM_STEPS, *, made=None, resume=None, wrap=None, batch_size=2, **flags):
    """Train, and keep what happened; a plain `Trainer` gets plain arguments, if not told which class."""
    lines = Lines()
    logging.getLogger("ckpt_trainer").addHandler(lines)
    made = made or (TrainingArguments if trainer is Trainer else CheckpointTrainingArguments)
    arguments = made(
        **{"output_dir": tempfile.gettempdir(), "save_strategy": "no", **flags},
        max_steps=num_steps,
        per_device_train_batch_size=batch_size,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
    )
    gradients = Gradients()
    own = recorded(wrap(trainer) if wrap else trainer)
    train = own(model=model, args=arguments, train_dataset=text_dataset(32), callbacks=[gradients])
    COLLECTIVES.clear()
    train.train(resume_from_checkpoint=resume)
    logging.getLogger("ckpt_trainer").removeHandler(lines)
    return {
        "losses": list(train.losses),
        "gradients": gradients.seen,
        "collectives": dict(COLLECTIVES),
        "find_unused": getattr(train.model_wrapped, "find_unused_parameters", None),
        "param_dtypes": {
            module._get_fsdp_state()._mp_policy.param_dtype
            for module in train.model_wrapped.modules()
            if isinstance(module, FSDPModule)
        },
        "modules": sorted({type(module).__name__ for module in train.model_wrapped.modules()}),
        "report": train.memory_report() if trainer is not Trainer else None,
        "lines": lines.texts,
    }


class Results:
    """What the runs of one process left, by name; written to a file in the end."""

    def __init__(self):
        self.found = {}

    def keep(self, name, function, *args, **kwargs):
        """Keep what a call returns, or the error that it ends with."""
        environment = dict(os.environ)
        try:
            self.found[name] = function(*args, **kwargs)
        except Exception as error:
            traceback.print_exc()
            self.found[name] = {"error": f"{type(error).__name__}: {error}"}
        finally:
            # transformers leaves in it what the arguments say of precision and FSDP.
            os.environ.clear()
            os.environ.update(environment)

    def write(self, folder):
        torch.save(self.found, Path(folder) / f"{os.environ['RANK']}.pt")


def load_to_host():
    """transformers 4 loads an optimizer to the device "cpu:0", which torch does not know."""
    load = torch.load
    torch.load = lambda *args, **kwargs: load(*args, **{**kwargs, "map_location": "cpu"})


def prepare_process():
    """To be called first in each process."""
    faulthandler.dump_traceback_later(SECONDS_AT_MOST, exit=True)  # A hang ends, and shows where it is.
    gc.freeze()  # Each trainer collects garbage: a second, if it looks at all that was imported.
    transformers.logging.set_verbosity_error()
    load_to_host()
    count_collectives()
    # The host is the device here: a device is pretended, so that offload moves tensors.
    groups.MIN_BYTES = 16
    streams.streams_of = FakeStreams("lazy").streams_of


def run_modes(results, model, modes=tuple(MODES), **flags):
    """The plain trainer first, as `model, plain`; then ours in every mode."""
    results.keep(f"{model}, plain", run, MODELS[model](), **flags)
    for mode in modes:
        results.keep(f"{model}, {mode}", run, MODELS[model](), CheckpointedTrainer, **MODES[mode], **flags)


def run_resumed(results, name, model, folder, trainer=CheckpointedTrainer, **flags):
    """Train 3 steps, saved after the first; then go on from there."""
    results.keep(
        name, run, MODELS[model](), trainer, 3, output_dir=folder, save_strategy="steps", save_steps=1, **flags
    )
    dist.barrier()
    again = {"resume": f"{folder}/checkpoint-1", "output_dir": folder}
    results.keep(f"{name}, resumed", run, MODELS[model](), trainer, 3, **again, **flags)


def launch(folder, *command):
    """Start the processes; what each of them kept, by its rank."""
    path = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(folder / "base")
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", BASE: str(folder / "base")}
    done = subprocess.run(
        [sys.executable, "-m", *command, str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(NUM_PROCESSES)]


def assert_same(found, expected):
    """Bitwise, on every process."""
    for mine, theirs in zip(found, expected, strict=True):
        assert "error" not in mine, mine["error"]
        assert len(mine["losses"]) == len(theirs["losses"]) > 0
        assert all(map(torch.equal, mine["losses"], theirs["losses"]))
        assert len(mine["gradients"]) == len(theirs["gradients"]) > 0
        for one, other in zip(mine["gradients"], theirs["gradients"], strict=True):
            assert one.keys() == other.keys()
            assert [name for name in one if not torch.equal(one[name], other[name])] == []
        assert any(gradient.any() for gradient in mine["gradients"][0].values())


# Calls of blocks in 2 steps of 4 blocks, by what is done with them; replays of them.
EXPECTED_CALLS = {
    "none": ({}, 0),
    "full": ({"recompute": 8}, 8),
    "every_n": ({"recompute": 4}, 4),
    "modules": ({"recompute": 4}, 4),
    "expensive": ({"rebuild": 8}, 0),
    "attention": ({"recompute": 8}, 8),
    "offload": ({"recompute": 8}, 8),
    "auto": ({"recompute": 4}, 4),  # all is kept from the second step on
    "auto, no room": ({"recompute": 8}, 8),
    "auto, sharded": ({"recompute": 8}, 8),
}


def assert_worked(found, mode):
    """The mode did what it is for."""
    for mine in found:
        assert "error" not in mine, mine["error"]
        assert (mine["report"]["calls"], mine["report"]["recomputed_blocks"]) == EXPECTED_CALLS[mode]
        if mode == "offload":
            assert mine["report"]["offload"]["copies_out"] > 0


def assert_as_one_process(found):
    """Sums over the batch are in another order with several processes, so that the last bits differ."""
    alone = run(MODELS["no dropout"](), batch_size=2 * NUM_PROCESSES)
    mean = torch.stack([torch.stack(mine["losses"]) for mine in found]).mean(0)
    torch.testing.assert_close(mean, torch.stack(alone["losses"]), rtol=1e-5, atol=1e-6)
    for mine in found:
        for one, other in zip(mine["gradients"], alone["gradients"], strict=True):
            assert one.keys() == other.keys()
            for name in one:
                torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)
