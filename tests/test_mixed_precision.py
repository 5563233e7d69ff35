"""Autocast, gradient scaling, noise, smoothing, determinism: in every mode the bits of plain Trainer."""

import copy

import pytest
import torch
from fake_device import FakeStreams
from test_trainer import arguments, losses, norms, plain_model
from tiny_models import CASES, text_dataset
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from ckpt_trainer import CheckpointedTrainer, checkpointing, groups, streams

MODES = {
    "none": {"mode": "none"},
    "full": {"mode": "full"},
    "every_n": {"mode": "full", "every_n": 2},
    "segments": {"mode": "full", "segment": 2},
    "expensive": {"mode": "selective"},
    "matmul": {"mode": "selective", "save": "matmul"},
    "attention": {"mode": "selective", "save": "attention"},
    "modules": {"mode": "selective", "save": ["*mlp*"]},
    "offload": {"mode": "offload"},
    "offload attention": {"mode": "offload", "offload_save": "attention"},
    "offload all": {"mode": "offload", "offload_save": "all"},
}
# What a mode has to leave behind in its report, so that none is compared with itself.
DID = dict.fromkeys(MODES, "recompute") | {"none": None, "expensive": "rebuild", "offload all": "offload"}


@pytest.fixture
def device(monkeypatch):
    fake = FakeStreams("lazy")
    monkeypatch.setattr(streams, "streams_of", fake.streams_of)
    monkeypatch.setattr(groups, "MIN_BYTES", 16)
    return fake


class Gradients(TrainerCallback):
    """What each optimizer step was given, and the scale of the loss if there is one."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found += [copy.deepcopy(parameter.grad) for parameter in model.parameters()]


def train(trainer_class, tmp_path, arguments_class=None, **flags):
    classes = () if arguments_class is None else (arguments_class,)
    seen = Gradients()
    args = arguments(tmp_path, *classes, **flags)
    # Of unequal length, so that micro-batches count unequally many tokens.
    rows = [{key: value[: 6 + i % 7] for key, value in row.items()} for i, row in enumerate(text_dataset(24))]
    trainer = trainer_class(
        model=plain_model(), args=args, train_dataset=rows, callbacks=[seen], data_collator=padded_batch
    )
    trainer.train()
    return trainer, losses(trainer), norms(trainer), seen.found


def padded_batch(rows):
    fill = {"input_ids": 0, "labels": -100}
    batch = {
        key: nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=value)
        for key, value in fill.items()
    }
    return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}


def assert_bits(found, expected):
    """Bit for bit, infinities and NaN of an overflow included."""
    assert len(found) == len(expected) > 0
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left.flatten().view(torch.uint8), right.flatten().view(torch.uint8))


SETTINGS = {
    "bf16": {"bf16": True},
    "noise and smoothing": {"neftune_noise_alpha": 5, "label_smoothing_factor": 0.1},
    "bf16, accumulated": {"bf16": True, "gradient_accumulation_steps": 2, "average_tokens_across_devices": True},
    "accumulated by mean": {"gradient_accumulation_steps": 3, "average_tokens_across_devices": False, "max_grad_norm": 0.1},
    "determinism": {"full_determinism": True, "bf16": True},
}  # fmt: skip


@pytest.fixture
def restored_determinism(monkeypatch):
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC",
                 "FLASH_ATTENTION_DETERMINISTIC"):  # fmt: skip
        monkeypatch.setenv(name, "0")  # so that monkeypatch takes back what transformers writes there
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


@pytest.fixture(scope="module")
def plain_runs():
    """Setting -> what plain Trainer gave, computed once."""
    return {}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("mode", MODES)
def test_trainer(tmp_path, device, restored_determinism, plain_runs, mode, setting):
    if setting not in plain_runs:
        plain_runs[setting] = train(Trainer, tmp_path, TrainingArguments, **SETTINGS[setting])[1:]
    expected = plain_runs[setting]
    flags = {f"checkpointing_{flag}": value for flag, value in MODES[mode].items()}
    trainer, *found = train(CheckpointedTrainer, tmp_path, **SETTINGS[setting], **flags)
    assert found[:2] == list(expected[:2])
    assert len(found[0]) == 3
    assert_bits(found[2], expected[2])
    report = trainer.memory_report()
    done = {what for what, number in report["calls"].items() if number}
    assert done == ({DID[mode]} if DID[mode] else set())
    assert (report["offload"] is not None and report["offload"]["copies_out"] > 0) == mode.startswith("offload")


def scaled_steps(model, batch, scale, **flags):
    """Losses, gradients and scales of four fp16 steps, as a loop of torch's documentation takes them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    found, states = [], []
    torch.manual_seed(5)
    with checkpointing(model, **flags) as state:
        for _ in range(4):
            with torch.autocast("cpu", torch.float16):
                loss = model(**batch)["loss"]
            scaler.scale(loss).backward()
            found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            states.append(scaler.state_dict())
    return found + list(model.parameters()), states, state.report()


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "none"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_fp16_with_a_scaler(device, name, mode):
    case = CASES[name]
    for scale in (2.0**40, 2.0**10):  # of which the first overflows
        flags = {"save": ["*mlp*"], "mode": "selective"} if mode == "modules" else MODES[mode]
        expected, states, _ = scaled_steps(case.build(), case.batch(), scale, mode="none")
        found, found_states, report = scaled_steps(case.build(), case.batch(), scale, **flags)
        assert found_states == states
        assert_bits(found, expected)
        assert report["calls"][DID[mode]] > 0
        finite = all(torch.isfinite(tensor).all() for tensor in found)
        assert finite == (scale < 2.0**40)
        assert (states[0]["scale"] < scale) == (scale == 2.0**40)


class Upcast(nn.Module):
    """A part in fp32 within autocast, one in bf16 without, and one that leaves the cache of casts alone."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.gate = nn.Linear(width, width)

    def forward(self, hidden):
        with torch.autocast("cpu", enabled=False):
            normed = self.norm(hidden.float()) + self.gate(hidden.float()).tanh()
        with torch.autocast("cpu", torch.bfloat16):
            inner = F.gelu(self.up(normed))
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            result = self.down(F.dropout(inner, 0.1, self.training))
        return hidden + result.to(hidden.dtype)


class Decorated(Upcast):
    forward = torch.autocast("cpu", torch.bfloat16)(Upcast.forward)


class Stack(nn.Module):
    def __init__(self, block, width=32):
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(block(width) for _ in range(4))
        self.head = nn.Linear(width, 64)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden).float().logsumexp(-1).mean()


@pytest.mark.parametrize("outer", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("none", "modules")])
@pytest.mark.parametrize("block", [Upcast, Decorated])
def test_blocks_with_an_autocast_of_their_own(device, block, mode, outer):
    rows = torch.stack([row["input_ids"] for row in text_dataset(4)])

    def steps(**flags):
        torch.manual_seed(0)
        model, found = Stack(block), []
        with checkpointing(model, **flags) as state:
            for _ in range(2):
                with torch.autocast("cpu", outer, enabled=outer is not None):
                    loss = model(rows) + model(rows.flip(0))
                loss.backward()
                found += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        return found, state.report()

    expected, _ = steps(mode="none")
    # There is no attention in it.
    flags = {**MODES[mode], "save": ["down"]} if mode == "attention" else MODES[mode]
    flags = {**flags, "offload_save": "matmul"} if mode == "offload attention" else flags
    found, report = steps(**flags)
    assert_bits(found, expected)
    assert report["calls"][DID[mode]] > 0


def test_data_parallel_of_the_trainer_is_refused_before_the_first_step(tmp_path):
    class Two(CheckpointedTrainer):
        steps = 0

        def training_step(self, *args, **kwargs):
            self.steps += 1
            return super().training_step(*args, **kwargs)

    model = plain_model()
    args = arguments(tmp_path, checkpointing_mode="full")
    trainer = Two(model=model, args=args, train_dataset=text_dataset(16))
    args._n_gpu = 2  # what transformers finds where a script is started without a launcher
    with pytest.raises(ValueError, match="torchrun --nproc_per_node"):
        trainer.train()
    assert trainer.steps == 0
    assert not any("forward" in vars(block) for block in model.model.layers)
