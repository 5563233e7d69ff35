"""Mode `auto` that runs out of memory anywhere, in steps that are measured too: the training is the undisturbed one."""

import gc

import pytest
from accelerate.utils.memory import should_reduce_batch_size
from failing import ERROR, NEVER, Failing
from test_rescue import Rescued, assert_same, history, model_with_statistics, train, trainer_of
from tiny_models import llama

from ckpt_trainer import CheckpointedTrainer
from ckpt_trainer.out_of_memory import OutOfMemory


@pytest.fixture(autouse=True, scope="module")
def _little_garbage():
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Real(Rescued):
    """The trainer as it is, with the counts of `Rescued` and without its stand-in for mode `auto`."""

    def _checkpointing_of(self, model):
        return CheckpointedTrainer._checkpointing_of(self, model)


def trained(tmp_path, failing, **flags):
    flags = {"checkpointing_mode": "auto", "max_steps": 5, **flags}
    return train(trainer_of(tmp_path, failing, Real, model_with_statistics(), **flags))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_place_of_each_kind_of_step(tmp_path, accumulation):
    flags = {"gradient_accumulation_steps": accumulation, "checkpointing_budget": "1GiB"}
    expected = trained(tmp_path, Failing(first=NEVER), **flags)
    failing = Failing(skip=0, first=NEVER)
    once = trained(tmp_path, failing, **flags)
    assert_same(once, expected)
    first, places = 0, 0
    while True:
        failing = Failing(skip=23, first=first)  # of each stretch another op, steps that are measured among them
        found = trained(tmp_path, failing, **flags)
        if not failing.failed:
            break
        assert_same(found, expected)
        places += len(failing.failed)
        first += 211
    assert places > 12


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_fails_again_and_again_gets_the_leanest_plan_then_an_error(tmp_path, accumulation, caplog):
    flags = {"gradient_accumulation_steps": accumulation, "checkpointing_oom_retries": 2}
    failing = Failing(first=300)
    failing.times = NEVER
    with pytest.raises(OutOfMemory) as raised:
        trained(tmp_path, failing, **flags)
    text = str(raised.value)
    for words in ("run again 2 times", "input_ids 2x12", "recompute", ERROR):
        assert words in text
    assert should_reduce_batch_size(raised.value)
    assert "a smaller micro-batch" in text


def test_a_step_that_fails_once_goes_on_with_a_leaner_plan(tmp_path):
    expected = trained(tmp_path, Failing(first=NEVER), max_steps=6)
    trainer = trainer_of(
        tmp_path, Failing(first=NEVER), Real, llama(4, use_cache=False), checkpointing_mode="auto", max_steps=6
    )
    trainer.train()
    kept = trainer.memory_report()["auto"]["sizes"][0]
    assert kept["actions"] == {"keep": 4}
    assert history(expected)

    class FailsInTheFifth(Real):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 4:
                self.failing.next = 150
            return super().training_step(*args, **kwargs)

    model = llama(4, use_cache=False)
    trainer = trainer_of(
        tmp_path, Failing(first=NEVER, skip=NEVER), FailsInTheFifth, model, checkpointing_mode="auto", max_steps=6
    )
    train(trainer)
    (found,) = trainer.memory_report()["auto"]["sizes"]
    assert found["actions"] != {"keep": 4}
    assert found["predicted_peak_bytes"] < kept["predicted_peak_bytes"]


class Two(Real):
    """A loss of two forwards; in the fifth step the second runs out of memory, once."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        one = super().compute_loss(model, dict(inputs), *args, **kwargs)
        if self.state.global_step == 4 and not self.failing.failed:
            self.failing.next = self.failing.count + 100
        return one + super().compute_loss(model, dict(inputs), *args, **kwargs)


def test_the_first_of_several_forwards_gets_the_leaner_plan(tmp_path):
    def trained(failing):
        model = llama(4, use_cache=False)
        return train(trainer_of(tmp_path, failing, Two, model, checkpointing_mode="auto", max_steps=6))

    expected = trained(_never_failing())
    failing = Failing(first=NEVER, skip=NEVER)
    found = trained(failing)
    assert len(failing.failed) == 1
    assert history(found) == history(expected)
    kept, leaner = (trainer.memory_report()["auto"]["sizes"][0]["actions"] for trainer in (expected, found))
    assert kept == {"keep": 4}
    assert leaner != kept


def _never_failing():
    failing = Failing(first=NEVER, skip=NEVER)
    failing.failed.append("an op of no step")
    return failing
