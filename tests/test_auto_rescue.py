"""Mode `auto` that runs out of memory anywhere, in steps that are measured too: the training is bitwise the undisturbed one."""

import gc

import pytest
import torch
from failing import NEVER, Failing
from test_rescue import Rescued, assert_same, history, model_with_statistics, seed, train, trainer_of
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
        first += 97
    assert places > 25
