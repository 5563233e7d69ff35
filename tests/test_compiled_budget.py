"""Mode `auto` in compiled models: one plan of marks, within the budget, with the gradients of the plain compiled model."""

import logging
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from test_compile import forget, gradients  # noqa: F401 - a fixture
from tiny_models import llama
from torch._dynamo.backends import registry
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch import config as partitioner
from torch.fx import Interpreter

from ckpt_trainer import checkpointing
from ckpt_trainer.call_costs import costs_of_call
from ckpt_trainer.compiled_budget import ACTIONS
from ckpt_trainer.engine import Checkpointing
from ckpt_trainer.memory import LiveBytes
from ckpt_trainer.plan import KEEP, RECOMPUTE
from ckpt_trainer.roofline import HOST
from ckpt_trainer.step_costs import BlockCost, Option, StepCosts
from ckpt_trainer.training_args import settings_of_flags

MATMUL, ATTENTION = ACTIONS[1:3]
ROOM = "64MiB"


class Live(LiveBytes):
    """Goes on within compiled graphs, which a `Backend` enters it for."""

    supports_higher_order_operators = True


class Backend:
    """As aot_eager, with the bytes of its graphs counted."""

    def __init__(self, live):
        self.live = live

    def __call__(self, graph, inputs):
        def compiled(graph, inputs):
            def run(args):
                with self.live:
                    return Interpreter(graph).boxed_run(args)

            run._boxed_call = True
            return run

        run = aot_autograd(
            fw_compiler=compiled,
            bw_compiler=compiled,
            partition_fn=min_cut_rematerialization_partition,
            keep_inference_input_mutations=True,
        )
        return run(graph, inputs)


def batch(rows=2, length=64):
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids.clone()}


def train(budget, monkeypatch, how="torch.compile", dropout=0.0, layers=3, steps=3):
    """Gradients of each step, its peak with the state of the optimizer, and the plan; without a budget, without us."""
    torch._dynamo.reset()
    counters.clear()
    model, inputs = llama(layers, dropout=dropout, use_cache=False), batch()
    live = Live(model, *inputs.values())
    monkeypatch.setitem(registry._COMPILER_FNS, "aot_eager", Backend(live))
    call = torch.compile(model, backend="aot_eager") if how == "torch.compile" else model
    if how == "model.compile":
        model.compile(backend="aot_eager")
    for layer in model.model.layers if how == "block.compile" else ():
        layer.compile(backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters())
    found, peaks = [], []
    with checkpointing(call, "auto", budget=budget) if budget else nullcontext() as state:
        for step in range(steps):
            torch.manual_seed(step)
            live.reset_peak()
            call(**inputs).loss.backward()
            tensors = [t for s in optimizer.state.values() for t in s.values()]
            peaks.append(live.peak + sum(tensor.nbytes for tensor in tensors))
            found.append([parameter.grad.clone() for parameter in model.parameters()])
            optimizer.step()
            optimizer.zero_grad()
            assert partitioner.activation_memory_budget == 1.0
        report = state.report() if budget else None
    assert model._compiled_call_impl is None or how == "model.compile"
    return found, peaks, report, counters["stats"]["unique_graphs"]


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_plans_at_several_budgets(monkeypatch, caplog):
    """Peaks are of one graph, forward and backward: all that there is."""
    expected, plain, _, _ = train(None, monkeypatch)
    stored = []
    for budget, fits in ((ROOM, True), (1_250_000, True), (1_120_000, True), (600_000, False)):
        caplog.clear()
        grads, peaks, report, graphs = train(budget, monkeypatch)
        assert_equal(grads, expected)
        auto, actions = report["auto"], report["auto"]["sizes"][0]["actions"]
        lines = [record for record in caplog.records if record.getMessage().startswith("auto, ")]
        assert [record.levelno for record in lines] == [logging.INFO if fits else logging.WARNING]
        assert graphs == 1
        assert (max(peaks) <= auto["budget_bytes"]) == fits
        assert max(peaks) <= auto["sizes"][0]["predicted_peak_bytes"] <= (auto["budget_bytes"] if fits else 10**9)
        stored.append((actions, max(peaks)))
    assert stored[0] == ({"keep": 3}, max(plain))
    assert 0 < stored[1][0].get("keep", 0) < 3
    assert stored[-1][0] == {"recompute": 3}
    assert sorted((peak for _, peak in stored[:3]), reverse=True) == [peak for _, peak in stored[:3]]
    assert len({peak for _, peak in stored[:3]}) == 3
    assert "no plan fits 586 KiB; the leanest is used" in caplog.text


@pytest.mark.parametrize("how", ["model.compile", "block.compile"])
def test_a_model_that_draws_gets_marks(how, monkeypatch):
    expected, _, _, _ = train(None, monkeypatch, how, dropout=0.3, layers=2, steps=2)
    grads, _, report, _ = train(1_000_000, monkeypatch, how, dropout=0.3, layers=2, steps=2)
    assert_equal(grads, expected)
    assert report["auto"]["sizes"][0]["actions"] != {"keep": 2}
    assert report["compiled"]["memory_budget"] is None


def test_with_the_trainer(tmp_path, monkeypatch):
    def build():
        return llama(2, dropout=0.1, use_cache=False)

    expected, _ = gradients(tmp_path, "none", build)
    found, report = gradients(tmp_path, "auto", build, checkpointing_budget=700_000)
    assert_equal(found, expected)
    assert report["auto"]["sizes"][0]["inputs"]["input_ids"] == [2, 12]
    assert report["compiled"]["blocks"] == 2


def test_costs_are_those_of_the_model_without_compiler_and_nothing_is_touched():
    model, found = llama(2, dropout=0.1, use_cache=False), []
    plain = costs(model)
    before = [value.clone() for value in model.state_dict().values()]
    for call in (torch.compile(model, backend="aot_eager"), model):
        model.compile(backend="aot_eager")
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        found.append(costs(call))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.array_equal(np.random.get_state()[1], states[2])
    assert found == [plain, plain]
    assert counters["stats"]["unique_graphs"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def costs(model, **changes):
    inputs = {**batch(), **changes}
    return costs_of_call(model, (), inputs, ACTIONS[1:], HOST, settings_of_flags({"mode": "full"}), False)


def test_a_loss_outside_of_the_model_is_allowed_for():
    model = llama(1, dropout=0.0, use_cache=False)
    inside, outside = costs(model), costs(model, labels=None)
    logits = 2 * 64 * 64 * 4
    assert inside.blocks[0].options == outside.blocks[0].options
    assert outside.head_bytes >= 2 * logits
    with torch.autocast("cpu", torch.bfloat16):
        assert costs(model).blocks[0].options[0].stored_bytes < inside.blocks[0].options[0].stored_bytes


# What is decided, with costs of a round number: nothing is compiled here.

UNIT = 2**20
STORED = {KEEP: 8, MATMUL: 4, ATTENTION: 2, RECOMPUTE: 1}


class Costs:
    """Costs that are in proportion to the elements of the first input."""

    def __init__(self, fails=False):
        self.calls, self.fails = [], fails

    def __call__(self, model, args, kwargs, actions, device, settings, gradients_are_there):
        assert actions == ACTIONS[1:]
        self.calls.append((tuple(kwargs["input_ids"].shape), gradients_are_there))
        if self.fails:
            raise RuntimeError("no costs\nfor this")
        unit = UNIT * kwargs["input_ids"].numel() // 128
        options = tuple(Option(a, n * unit, n * unit, 9 * unit, 9.0 - n) for a, n in STORED.items())
        names = [f"model.layers.{i}" for i in range(4)]
        there = {"gradients_are_there": gradients_are_there, "before_gradient_bytes": 8 * unit}
        return StepCosts(tuple(BlockCost(name, options) for name in names), **there)


@pytest.fixture
def model():
    built = llama(4, dropout=0.0, use_cache=False)
    built.compile(backend="aot_eager")
    with torch.compiler.set_stance("force_eager"):
        yield built


def state_of(model, costs_of, budget, **flags):
    return Checkpointing(model, settings_of_flags({"mode": "auto", "budget": budget, **flags}), costs_of=costs_of)


def step(state, model, inputs=None, optimizer=None, backward=True):
    with state.step():
        loss = model(**(inputs or batch())).loss
        if backward:
            loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return [action.short for action in state.plan.actions.values()]


def kept(actions):
    return actions.count("keep")


def test_a_larger_batch_gets_a_leaner_plan_and_a_smaller_one_none(model):
    costs_of = Costs()
    state = state_of(model, costs_of, 40 * UNIT)
    first = step(state, model)
    assert kept(first) == 4
    model.zero_grad()
    assert step(state, model, batch(1)) == first
    assert costs_of.calls == [((2, 64), False)]
    model.zero_grad()
    second = step(state, model, batch(4), backward=False)
    assert kept(second) < 4
    assert step(state, model, batch(3), backward=False) == step(state, model) == second
    assert costs_of.calls == [((2, 64), False), ((4, 64), False)]


def test_a_larger_batch_that_surely_fits_is_not_asked_for(model):
    costs_of = Costs()
    state = state_of(model, costs_of, 1000 * UNIT)
    for rows in (2, 3, 4, 3):
        step(state, model, batch(rows))
        model.zero_grad()
    assert costs_of.calls == [((2, 64), False)]


def test_later_micro_batches_have_the_gradients_beside_them(model):
    costs_of = Costs()
    state = state_of(model, costs_of, 40 * UNIT)
    assert kept(step(state, model)) == 4
    assert kept(step(state, model)) < 4
    assert costs_of.calls == [((2, 64), False), ((2, 64), True)]


@pytest.mark.parametrize(("optimizer", "more"), [(torch.optim.SGD, True), (torch.optim.AdamW, False)])
def test_the_plan_is_made_anew_with_what_the_optimizer_holds(optimizer, more):
    built = llama(4, dropout=0.0, use_cache=False, intermediate_size=4096)
    built.compile(backend="aot_eager")
    weights = sum(parameter.nbytes for parameter in built.parameters())
    assert weights > 6 * UNIT
    optimizer = optimizer(built.parameters(), lr=1e-3)
    with torch.compiler.set_stance("force_eager"):
        state = state_of(built, Costs(), 3 * weights + 25 * UNIT)
        first = step(state, built, optimizer=optimizer)
        later = [step(state, built, optimizer=optimizer) for _ in range(2)]
    assert 0 < kept(first) < 4
    assert (kept(later[0]) > kept(first)) == more
    assert later[0] == later[1]
    assert (state.report()["auto"]["optimizer_state_bytes"] < UNIT) == more
    state.release()


def test_out_of_memory_makes_the_plan_leaner(model):
    state = state_of(model, Costs(), 60 * UNIT)
    found = [step(state, model)]
    for attempt in (1, 2, 3):
        state.make_leaner(attempt, 3)
        model.zero_grad()
        found.append(step(state, model))
    assert kept(found[0]) == 4
    assert kept(found[1]) < 4
    assert found[1] != ["recompute"] * 4
    assert found[-1] == ["recompute"] * 4
    assert "a micro-batch of input_ids 2x64 does not fit, with 4 recompute" in state.explain_out_of_memory(None)


def test_where_costs_cannot_be_told_all_are_recomputed(model, caplog):
    costs_of = Costs(fails=True)
    state = state_of(model, costs_of, 60 * UNIT)
    assert [step(state, model), step(state, model)] == [["recompute"] * 4] * 2
    assert len(costs_of.calls) == 1
    assert caplog.text.count("before it is compiled (RuntimeError: no costs)") == 1


def test_blocks_that_are_not_free_keep_their_action(model):
    state = state_of(model, Costs(), 22 * UNIT, modules={"*.0": "full", "*.1": "none"})
    found = step(state, model)
    assert found[:2] == ["recompute", "keep"]
    assert found[2:] != ["keep", "keep"]


@pytest.mark.parametrize(
    ("backend", "flags", "text"),
    [
        ("eager", {}, "eager is not known to heed what is marked"),
        ("cudagraphs", {}, "cudagraphs is not known to heed what is marked"),
        ("aot_eager", {"compile_budget": 0.5}, "checkpointing_compile_budget says what"),
        ("aot_eager", {"costs_of": None}, "ops of a compiled model are not seen one by one"),
    ],
)
def test_why_not(backend, flags, text, caplog):
    model = torch.compile(llama(1, dropout=0.0), backend=backend)
    costs_of = flags.pop("costs_of", costs_of_call)
    state = state_of(model, costs_of, 60 * UNIT, **flags)
    assert state.report()["auto"] is None
    assert state.plan.count("recompute") == 1
    assert f"the same is done to micro-batches of all sizes, since {text}" in caplog.text
