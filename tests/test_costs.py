"""What a step is said to cost from probes and one measured step: the peak that it then has, to the byte or nearly so."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import CASES, llama

from ckpt_trainer import checkpointing
from ckpt_trainer.costs import Link, Probed, Sample, between, live_costs
from ckpt_trainer.measured import BlockBytes, StepBytes
from ckpt_trainer.memory import LiveBytes
from ckpt_trainer.plan import KEEP, RECOMPUTE, Action, Plan
from ckpt_trainer.step_costs import BlockCost, Option, StepCosts, peak_of

MATMUL = Action("selective", save=("matmul",))
NUM_BUDGETS = 8
ROWS = 6  # times those of the batch, so that blocks weigh more than the optimizer


def lora(dropout=0.1):
    config = LoraConfig(r=2, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(llama(dropout=dropout), config).train()


MODELS = {name: CASES[name].build for name in ("llama", "bert", "t5", "mixtral", "llava")} | {"lora": lora}


class Training:
    """Steps of one model, each with its loss and its peak; `peak` is of a step with its optimizer."""

    def __init__(self, name, live=True):
        self.model = MODELS[name]()
        batch = CASES[name if name in CASES else "llama"].batch()
        self.batch = {key: torch.cat([value] * ROWS) for key, value in batch.items()}
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-3, foreach=False)
        self.live = LiveBytes(self.model, *self.batch.values()) if live else None
        self.losses, self.peaks = [], []
        torch.manual_seed(1)

    def step(self):
        self.live.reset_peak()
        loss = self.model(**self.batch)["loss"]
        loss.backward()
        self.losses.append(loss.item())
        del loss
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.peaks.append(self.live.peak)


def range_of(name):
    """Peaks of a step in which all is recomputed, and of one in which all is kept."""
    found = []
    for mode in ("full", "none"):
        training = Training(name)
        with training.live, checkpointing(training.model, mode=mode, self_check=False):
            training.step(), training.step()
        found.append(training.peaks[-1])
    return found


def set_budget(planner, budget):
    """As if that had been asked for from the start: of what was learnt, the measured step and the probes stay."""
    planner.budget = lambda: budget
    for known in planner._known.values():
        known.sample, known.costs = replace(known.sample, seen={}), None
    planner._limits.clear()
    planner._forget_choices()


def without_cache(model):
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config.use_cache = False


@pytest.mark.parametrize("name", MODELS)
def test_peak_is_as_predicted_and_in_the_budget_at_eight_budgets(name):
    logging.getLogger("ckpt_trainer").setLevel(logging.ERROR)
    low, high = range_of(name)
    training, errors, firsts, plans = Training(name), [], [], []
    with training.live, checkpointing(training.model, mode="auto", budget=low) as state:
        training.step()
        assert training.peaks[0] <= low
        planner = state._batches.planner
        for number in range(NUM_BUDGETS):
            budget = low + (high - low) * number // (NUM_BUDGETS - 1)
            set_budget(planner, budget)
            for attempt in range(6):
                training.step()
                choice = state._batches.current
                error = abs(training.peaks[-1] - choice.peak.bytes) / training.peaks[-1]
                firsts += [error] if attempt == 0 else []
                assert training.peaks[-1] <= budget
                if state._batches._watch is None and error < 0.01:
                    break
            errors.append(error)
            plans.append(state.plan)
    print(name, low, high, "first error", max(firsts), "max error", max(errors), "plans", len({str(plan) for plan in plans}), "steps", len(training.losses))
    assert max(errors) < 0.01
    assert max(firsts) < 0.05
    assert len({str(plan) for plan in plans}) >= 4
    plain = Training(name)
    without_cache(plain.model)
    with plain.live, checkpointing(plain.model, mode="none"):
        for _ in training.losses:
            plain.step()
    assert plain.losses == training.losses
    for one, other in zip(plain.model.parameters(), training.model.parameters(), strict=True):
        assert torch.equal(one, other)
