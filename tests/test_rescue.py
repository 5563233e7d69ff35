"""Memory that runs out anywhere in a step: the training is bitwise that of one in which it did not."""

import dataclasses
import gc
import math
import random
from collections import defaultdict, deque
from types import SimpleNamespace

import numpy
import peft
import pytest
import torch
import torch.distributed as dist
import trl
from accelerate.utils.memory import should_reduce_batch_size
from failing import ERROR, NEVER, Auto, Failing, Statistics
from tiny_models import llama, text_dataset, tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from transformers import TrainerCallback

from ckpt_trainer import (
    CheckpointedTrainer,
    CheckpointingArguments,
    CheckpointTrainingArguments,
    out_of_memory,
)
from ckpt_trainer.collectives import Collectives, why_not_alone
from ckpt_trainer.memory import LiveBytes
from ckpt_trainer.out_of_memory import OutOfMemory, is_out_of_memory
from ckpt_trainer.retrying import Retrying, may_be_half_done
from ckpt_trainer.window import Attributes


@pytest.fixture(autouse=True, scope="module")
def _little_garbage():
    """Each rescue collects garbage: half a second, if it looks at all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def model_with_statistics():
    model = llama(1, use_cache=False)
    model.model.layers[0].mlp = Statistics(model.model.layers[0].mlp)
    return model


class Rescued(Auto, CheckpointedTrainer):
    """Counts, and multiplies its loss with random numbers."""

    failing = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_calls, self.total, self.sums = 0, torch.zeros(()), torch.zeros(())
        self.metrics = {"train": defaultdict(list)}

    def compute_loss(self, model, inputs, *args, **kwargs):
        labels = inputs.pop("labels")
        loss = super().compute_loss(model, {**inputs, "labels": labels}, *args, **kwargs)
        self.num_calls += 1
        self.total = self.total + loss.detach()
        self.sums += loss.detach()
        self.metrics["train"]["loss"].append(loss.item())
        return loss * (1 + 0.1 * random.random() + 0.1 * numpy.random.rand())

    def training_step(self, *args, **kwargs):
        self.failing.begin()
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self.failing.end()


class Around(TrainerCallback):
    """Turns failing on for the optimizer."""

    def __init__(self, failing):
        self.failing = failing

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.failing.begin()

    def on_optimizer_step(self, *args, **kwargs):
        self.failing.end()


def arguments(tmp_path, cls=CheckpointTrainingArguments, **flags):
    fixed = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 2, "max_steps": 3, "logging_steps": 1,
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "learning_rate": 1e-3,
        "checkpointing_mode": "none", "include_num_input_tokens_seen": True,
    }  # fmt: skip
    return cls(**{**fixed, **flags})


def trainer_of(tmp_path, failing, cls=Rescued, model=None, optimizer=None, **flags):
    model = model_with_statistics() if model is None else model
    made = (optimizer(model.parameters()), None) if optimizer else (None, None)
    trainer = cls(model, arguments(tmp_path, **flags), train_dataset=text_dataset(64), optimizers=made)
    trainer.failing = failing
    return trainer


def seed():
    torch.manual_seed(3)
    random.seed(3)
    numpy.random.seed(3)


def train(trainer):
    seed()
    with trainer.failing:
        trainer.train()
    assert _get_current_dispatch_mode_stack() == []
    return trainer


_TIMES = ("runtime", "second", "checkpointing/")


def history(trainer):
    """All that was logged, times excepted."""
    return [{k: v for k, v in entry.items() if not any(t in k for t in _TIMES)} for entry in trainer.state.log_history]


def assert_same(found, expected):
    assert history(found) == history(expected)
    assert all(math.isfinite(entry["grad_norm"]) for entry in history(expected) if "grad_norm" in entry)
    left, right = found.model.state_dict(), expected.model.state_dict()
    assert [name for name in right if not torch.equal(left[name], right[name])] == []
    assert found.state.global_step == expected.state.global_step
    assert found.state.num_input_tokens_seen == expected.state.num_input_tokens_seen > 0
    assert found.current_flos == expected.current_flos
    for name in ("num_calls", "total", "sums", "metrics"):
        assert getattr(found, name, None) == getattr(expected, name, None), name


def generators():
    return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_op_of_a_micro_batch(tmp_path, accumulation, caplog, monkeypatch):
    monkeypatch.setattr(out_of_memory, "gc", SimpleNamespace(collect=lambda: 0))  # half of the time, hundreds of times
    # One training in which each micro-batch fails, at the op after the one that failed in the micro-batch before.
    skip = {1: 1, 3: 4}[accumulation]  # of three, each fails in turn at ops of its own
    probe = train(trainer_of(tmp_path, Failing(first=NEVER), max_steps=1))
    ops = probe.failing.ops
    assert ops > 300
    steps = {"max_steps": ops // skip // accumulation + 1, "gradient_accumulation_steps": accumulation}
    plain = train(trainer_of(tmp_path, Failing(first=NEVER), **steps))
    expected = generators()
    found = train(trainer_of(tmp_path, Failing(skip=skip), **steps))
    assert generators() == expected
    assert_same(found, plain)
    assert len(found.failing.failed) >= 0.95 * ops / skip  # leaner plans have fewer ops
    assert len(set(found.failing.failed)) >= 25  # of as many kinds
    lines = [record.getMessage() for record in caplog.records if "ran out of memory" in record.getMessage()]
    assert len(lines) == len(found.failing.failed)
    places = {"forward", "backward"}
    assert {place for place in places if any(f"ran out of memory in {place};" in line for line in lines)} == places
    again = {1: "it was run again", 3: "all 3 since the last step were run again"}[accumulation]
    assert any(again in line for line in lines)
    ends = (
        "under a leaner plan (1 of 3): 1 selective:expensive.",
        "before forward; garbage collected; they are made again.",
    )
    assert all(line.endswith(ends) for line in lines)


OPTIMIZERS = {
    "loop": lambda weights: torch.optim.AdamW(weights, lr=0.01, foreach=False, fused=False),
    "foreach": lambda weights: torch.optim.AdamW(weights, lr=0.01, foreach=True),
    "fused": lambda weights: torch.optim.AdamW(weights, lr=0.01, fused=True),
    "momentum": lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9),
}


class InOptimizer(Rescued):
    """Fails in the optimizer, and in clipping."""

    def training_step(self, *args, **kwargs):
        return CheckpointedTrainer.training_step(self, *args, **kwargs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_op_of_an_optimizer(tmp_path, name, caplog):
    def trainer(first, skip, steps):
        made = trainer_of(
            tmp_path, Failing(skip, first), InOptimizer, llama(1, use_cache=False), OPTIMIZERS[name], max_steps=steps
        )
        made.add_callback(Around(made.failing))
        return made

    # The first step has more ops than later ones, those that make its state.
    ops = train(trainer(NEVER, 1, 2)).failing.ops
    skip = 1 if ops < 50 else 5
    found = [train(trainer(first, skip, 4)) for first in range(0, ops, max(ops // 10, 1))]
    plain = train(trainer(NEVER, 1, 4))
    for one in found:
        assert_same(one, plain)
    assert sum(len(one.failing.failed) for one in found) >= 10
    assert caplog.text.count("optimizer ran out of memory in aten") == sum(len(one.failing.failed) for one in found)


def test_every_op_of_clipping(tmp_path, caplog):
    def trainer(first, steps):
        made = trainer_of(tmp_path, Failing(1, first), InOptimizer, llama(1, use_cache=False), max_steps=steps)
        clip = made.accelerator.clip_grad_norm_

        def clipped(*args, **kwargs):
            made.failing.begin()
            try:
                return clip(*args, **kwargs)
            finally:
                made.failing.end()

        made.clipped = made.accelerator.clip_grad_norm_ = clipped
        return made

    ops = train(trainer(NEVER, 1)).failing.ops
    found, plain = train(trainer(0, ops)), train(trainer(NEVER, ops))
    assert_same(found, plain)
    assert len(found.failing.failed) == ops
    assert caplog.text.count("clipping ran out of memory in aten") == ops
    assert found.accelerator.clip_grad_norm_ is found.clipped


def test_more_than_once_in_one_micro_batch(tmp_path, caplog):
    plain = train(trainer_of(tmp_path, Failing(first=NEVER), gradient_accumulation_steps=2))
    failing = Failing(first=100, skip=30)
    failing.times = 3  # each run of the window fails again, in its earlier micro-batches too
    trainer = trainer_of(tmp_path, failing, gradient_accumulation_steps=2)
    assert_same(train(trainer), plain)
    assert trainer._checkpointing.asked[:3] == [(1, 3), (2, 3), (3, 3)]
    assert len(trainer._checkpointing.asked) > 3 * 5
    assert "(3 of 3): 1 recompute." in caplog.text


class AtBegin(TrainerCallback):
    """Notes what stands in for the step of an optimizer, as schedulers of a learning rate do."""

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.step = vars(optimizer).get("step")


def test_retries_used_up(tmp_path):
    failing = Failing(first=100)
    failing.times = 4
    trainer = trainer_of(tmp_path, failing)
    found = AtBegin()
    trainer.add_callback(found)
    with pytest.raises(OutOfMemory) as caught:
        train(trainer)
    text = str(caught.value)
    assert text.startswith(
        "step 1: forward ran out of memory. It was run again 3 times. Needed 3 GiB; 2 rows would fit."
    )
    assert text.endswith(f"It said: {ERROR}")
    assert _get_current_dispatch_mode_stack() == []
    assert not {"backward", "clip_grad_norm_"} & vars(trainer.accelerator).keys()
    assert vars(trainer.optimizer).get("step") is found.step


def test_retries_used_up_in_the_optimizer(tmp_path):
    failing = Failing(first=0)
    failing.times = 4
    trainer = trainer_of(tmp_path, failing, InOptimizer)
    trainer.add_callback(Around(failing))
    with pytest.raises(
        OutOfMemory, match=r"step 1: optimizer \(AdamW\) ran out of memory\. .*'adamw_bnb_8bit'"
    ) as caught:
        train(trainer)
    assert str(caught.value).endswith(ERROR)
    assert _get_current_dispatch_mode_stack() == []


def test_modes_without_retries_raise_what_torch_raised(tmp_path):
    class Plain(CheckpointedTrainer):
        failing = None
        training_step = Rescued.training_step

        def _checkpointing_of(self, model):
            state = super()._checkpointing_of(model)
            state.oom_retries = 0
            return state

    Plain.training_step = lambda self, *args: (self.failing.begin(), CheckpointedTrainer.training_step(self, *args))[1]
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(trainer_of(tmp_path, Failing(first=100), Plain))
    assert type(caught.value) is torch.OutOfMemoryError
    assert str(caught.value) == ERROR


class Once(Rescued):
    """Raises an error of one's own in the second micro-batch."""

    error = None

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        error, self.error = (self.error, None) if self.num_calls == 2 else (None, self.error)
        if error is not None:
            raise error()
        return loss


def test_other_errors_pass(tmp_path):
    trainer = trainer_of(tmp_path, Failing(first=NEVER), Once)
    trainer.error = lambda: RuntimeError("expected scalar type Float")
    with pytest.raises(RuntimeError, match="expected scalar type Float") as caught:
        train(trainer)
    assert not isinstance(caught.value, OutOfMemory)
    assert trainer._checkpointing.asked == []


def test_memory_that_really_runs_out(tmp_path, caplog):
    plain = train(trainer_of(tmp_path, Failing(first=NEVER)))
    trainer = trainer_of(tmp_path, Failing(first=NEVER), Once)
    trainer.error = lambda: torch.empty(2**50, dtype=torch.float32)  # which fails
    assert_same(train(trainer), plain)
    assert len(trainer._checkpointing.asked) == 1


def test_lora(tmp_path):
    def adapted():
        torch.manual_seed(4)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1, init_lora_weights=False)
        return peft.get_peft_model(llama(2, use_cache=False), config)

    flags = {"gradient_accumulation_steps": 2, "max_steps": 8}
    plain = train(trainer_of(tmp_path, Failing(first=NEVER), model=adapted(), **flags))
    found = train(trainer_of(tmp_path, Failing(skip=29), model=adapted(), **flags))
    assert_same(found, plain)
    assert len(found.failing.failed) == 16


def test_trl_counts_nothing_twice(tmp_path):
    from datasets import Dataset

    class Sft(Auto, trl.SFTTrainer):
        failing = None
        training_step = Rescued.training_step

    def step(self, *args, **kwargs):
        self.failing.begin()
        try:
            return super(Sft, self).training_step(*args, **kwargs)
        finally:
            self.failing.end()

    Sft.training_step = step

    @dataclasses.dataclass
    class Arguments(CheckpointingArguments, trl.SFTConfig):
        pass

    def sft(failing):
        args = arguments(tmp_path, Arguments, max_length=16, bf16=False, gradient_accumulation_steps=2, max_steps=4)
        data = Dataset.from_dict({"text": ["the cat sat on the mat", "the mat sat"] * 16})
        trainer = Sft(llama(2, use_cache=False), args, train_dataset=data, processing_class=tokenizer())
        trainer.failing = failing
        return train(trainer)

    plain, found = sft(Failing(first=NEVER)), sft(Failing(first=300, skip=37))
    assert_same(found, plain)
    assert len(found.failing.failed) == 8
    assert found._total_train_tokens == plain._total_train_tokens > 0
    assert "mean_token_accuracy" in history(found)[0]


def test_auto_find_batch_size_takes_a_smaller_batch(tmp_path):
    class TooLarge(Auto, CheckpointedTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 2:
                raise torch.OutOfMemoryError(ERROR)
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = trainer_of(
        tmp_path, Failing(first=NEVER), TooLarge, auto_find_batch_size=True, per_device_train_batch_size=4
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer._train_batch_size == 2


def test_nothing_of_a_failed_attempt_is_left(tmp_path):
    peaks = {}

    class Watched(Rescued):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            gc.collect()
            peaks.setdefault(self.key, []).append(live.current)
            return loss

    for key, first in (("plain", NEVER), ("rescued", 150)):
        trainer = trainer_of(tmp_path, Failing(first=first, skip=40), Watched, gradient_accumulation_steps=2)
        trainer.key = key
        seed()
        with LiveBytes(trainer.model) as live, trainer.failing:
            trainer.train()
        forwards = [name for name, module in trainer.model.named_modules() if name and "forward" in vars(module)]
        assert forwards == []
    assert len(trainer.failing.failed) == 6
    assert peaks["rescued"] == peaks["plain"]


def refusal(tmp_path, cls=Rescued, **flags):
    with pytest.raises(OutOfMemory) as caught:
        train(trainer_of(tmp_path, Failing(first=NEVER), cls, **flags))
    return str(caught.value)


class LastFails(Rescued):
    """Its second micro-batch runs out of memory."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.num_calls == 2:
            raise torch.OutOfMemoryError(ERROR)
        return loss


def test_gradients_of_others_are_not_dropped(tmp_path):
    class Own(LastFails):
        def training_step(self, model, *args):
            weight = next(model.parameters())
            weight.grad = torch.ones_like(weight) if weight.grad is None else weight.grad
            return super().training_step(model, *args)

    assert "It was not run again, since there were gradients before its first" in refusal(tmp_path, Own)


def test_weights_that_were_changed_are_not_trained_again(tmp_path):
    class Own(LastFails):
        def compute_loss(self, model, *args, **kwargs):
            with torch.no_grad():
                next(model.parameters()).mul_(1)
            return super().compute_loss(model, *args, **kwargs)

    assert "since weights were changed since its first micro-batch" in refusal(tmp_path, Own)


def test_inputs_written_in_place_are_not_read_again(tmp_path):
    class Own(LastFails):
        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs["labels"][:, 0] = -100
            return super().compute_loss(model, inputs, *args, **kwargs)

    # Small ones are copied.
    text = refusal(tmp_path, Own, per_device_train_batch_size=16)
    assert "since inputs of the model were written in place" in text
    assert "It was run again 3 times" in refusal(tmp_path, Own)


def test_a_buffer_that_is_written_late_is_not_there_again(tmp_path):
    class Own(LastFails):
        def compute_loss(self, model, *args, **kwargs):
            if self.num_calls == 1:
                model.model.layers[0].mlp.constant.add_(1)
            return super().compute_loss(model, *args, **kwargs)

    text = refusal(tmp_path, Own)
    assert "since buffer Statistics.constant was written for the first time, and there is no copy of it" in text
    # In the first window it is copied.
    assert "It was run again 3 times" in refusal(tmp_path, Own, gradient_accumulation_steps=2)


def test_what_is_not_run_again_on_one_rank_alone():
    assert why_not_alone(llama(1), in_backward=True) == ""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(llama(1))
        assert why_not_alone(wrapped, in_backward=False) == ""
        assert why_not_alone(wrapped, in_backward=True).startswith("in backward DDP averages")
        with wrapped.no_sync():
            assert why_not_alone(wrapped, in_backward=True) == ""
        sharded = fully_shard(llama(1), mesh=init_device_mesh("cpu", (1,)))
        assert why_not_alone(sharded, in_backward=False).startswith("under FSDP every forward gathers")
        seen = Collectives(wrapped, synced=lambda: None)
        assert not seen.ran()
        dist.barrier()
        assert seen.ran()
    finally:
        dist.destroy_process_group()
    engine = llama(1)
    engine.zero_optimization_stage = lambda: 0
    assert why_not_alone(engine, in_backward=False).startswith("DeepSpeed keeps gradients")


def test_lists_of_mixed_dtypes_may_be_half_written():
    halves, singles = [torch.ones(2, dtype=torch.bfloat16)] * 2, [torch.ones(2)] * 2
    multiply, add = torch.ops.aten._foreach_mul_, torch.ops.aten._foreach_add
    assert may_be_half_done(multiply.List, (halves, singles))
    assert not may_be_half_done(multiply.List, (singles, singles))
    assert not may_be_half_done(multiply.Tensor, (halves, torch.tensor(2.0)))  # as in clipping
    assert not may_be_half_done(add.List, (halves, singles))  # makes new ones
    assert not may_be_half_done(torch.ops.aten.mul_.Tensor, (singles[0], halves[0]))

    class Fails(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise torch.OutOfMemoryError(ERROR)

    asked = []
    with pytest.raises(torch.OutOfMemoryError), Fails(), Retrying(2, lambda *said: asked.append(said)):
        torch._foreach_mul_(halves, singles)
    assert asked == []
    with pytest.raises(torch.OutOfMemoryError), Fails(), Retrying(2, lambda *said: asked.append(said)):
        torch._foreach_mul_(singles, 2.0)
    assert asked == [("aten._foreach_mul_.Scalar", 1), ("aten._foreach_mul_.Scalar", 2)]


def test_a_mode_that_was_left_on_does_not_keep_retrying_on():
    class Other(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with pytest.raises(ValueError), Retrying(1, print):
        Other().__enter__()
        raise ValueError
    assert _get_current_dispatch_mode_stack() == []


def test_compiled_functions_run_compiled():
    ran = []

    def backend(graph, inputs):
        return lambda *args: (ran.append(1), graph(*args))[1]

    double = torch.compile(lambda x: x.mul_(2), backend=backend)
    with torch.no_grad(), Retrying(1, print) as watched:
        double(torch.ones(3))
    assert ran == [1]
    assert watched.num_ops > 0


@pytest.mark.parametrize(
    ("error", "means"),
    [
        (torch.OutOfMemoryError("anything"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_errors_that_mean_it(error, means):
    assert is_out_of_memory(error) == means
    wrapped = ValueError("while replaying")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped) == means
    if means:
        assert should_reduce_batch_size(OutOfMemory("step 1: forward ran out of memory. It was run again 3 times."))


def test_contents_are_put_back_in_place():
    inner, queue, small = {"a": [1]}, deque([1, 2], maxlen=2), torch.zeros(2)
    owner = {"sums": inner, "queue": queue, "small": small, "count": 1, "_checkpointing_x": 1, "train_dataset": [1]}
    found = Attributes(owner)
    inner["a"].append(2)
    inner["b"] = 1
    queue.append(3)
    small += 1
    owner.update({"count": 2, "new": 5, "_checkpointing_x": 2, "train_dataset": [2]})
    found.put_back()
    assert owner["sums"] is inner
    assert owner["queue"] is queue
    assert inner == {"a": [1]}
    assert list(queue) == [1, 2]
    assert small.tolist() == [0, 0]
    assert owner["count"] == 1
    assert "new" not in owner
    assert owner["_checkpointing_x"] == 2
    assert owner["train_dataset"] == [2]
