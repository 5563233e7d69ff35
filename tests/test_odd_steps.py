"""Mode `auto` in steps that are not one forward and one backward of a whole model with one optimizer."""

import copy
import gc
import logging
import pickle
import warnings as warnings_module
import weakref
from contextlib import nullcontext

import pytest
import torch
from test_batch_plans import MUCH, Loop, adamw, assert_same, hooks_of, modes, plain, tokens
from tiny_models import llama, plain_transformer
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_any_mode_without_ignore_compile_internals, is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ckpt_trainer import checkpointing
from ckpt_trainer.memory import LiveBytes


def warnings(caplog):
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


class Steps:
    """Training by a function of its own; the losses, the weights at the end and the peak of each step."""

    def __init__(self, model, step, number=6, make_optimizers=lambda model: [adamw(model.parameters())], **flags):
        self.model, self.losses, self.peaks = model, [], []
        optimizers = make_optimizers(model)
        torch.manual_seed(1)
        with LiveBytes(model) as live, checkpointing(model, **flags) as self.state:
            for count in range(number):
                live.reset_peak()
                self.losses.append(step(model, count).detach())
                for optimizer in optimizers:
                    optimizer.step()
                self.peaks.append(live.peak)
                for optimizer in optimizers:
                    optimizer.zero_grad()
        assert modes() == 0

    @property
    def planner(self):
        return self.state._batches.planner


def assert_same_training(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one.losses, other.losses, strict=True))
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def between(model, step, **options):
    """A budget half-way between what `full` and no checkpointing need."""
    full, none = (Steps(model(), step, mode=mode, **options).peaks for mode in ("full", "none"))
    return (max(full) + max(none)) // 2


def twice(model, count):
    one, other = model(**tokens(8, 30))["loss"], model(**tokens(8, 40))["loss"]
    loss = one * other
    loss.backward()
    return loss


def thrice(model, count):
    """Of the first forwards nothing is left but their graphs."""
    loss = sum(F.logsigmoid(model(**tokens(8, 40 - 5 * number))["logits"]).mean() for number in range(3))
    loss.backward()
    return loss


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("step", "number"), [(twice, 2), (thrice, 3)], ids=["two", "three"])
def test_several_forwards_before_a_backward_keep_to_the_budget(caplog, step, number, share):
    full, none = (Steps(plain_transformer(), step, mode=mode) for mode in ("full", "none"))
    budget = int(max(full.peaks) + share * (max(none.peaks) - max(full.peaks)))
    found = Steps(plain_transformer(), step, mode="auto", budget=budget)
    assert_same_training(found, none)
    assert max(found.peaks) <= budget
    assert sum("several forwards" in text for text in warnings(caplog)) == 1
    if share == 1:  # the first forward of each step but the first keeps all
        assert found.state.report()["calls"]["recompute"] == 4 * (number + 5 * (number - 1))


class Counted:
    """A step with a mode of the user around its forward, its backward, or both."""

    def __init__(self, around):
        self.around, self.flops = around, []

    def __call__(self, model, count):
        counter = FlopCounterMode(display=False)
        if self.around == "all steps":
            return self.within(model, count)
        with counter if self.around != "backward" else nullcontext():
            loss = model(**tokens(2, 12))["loss"]
            if self.around == "both":
                loss.backward()
        with counter if self.around == "backward" else nullcontext():
            if self.around != "both":
                loss.backward()
        self.flops.append(counter.get_total_flops())
        return loss

    def within(self, model, count):
        if count == 0:
            self.counter = FlopCounterMode(display=False)
            self.counter.__enter__()
        before = self.counter.get_total_flops()
        loss = model(**tokens(2, 12))["loss"]
        loss.backward()
        self.flops.append(self.counter.get_total_flops() - before)
        if count == 5:
            self.counter.__exit__(None, None, None)
        return loss


@pytest.mark.parametrize("around", ["forward", "backward", "both", "all steps"])
def test_a_mode_of_the_user_counts_what_it_would_and_does_not_hinder(around):
    plain_count, count = Counted(around), Counted(around)
    expected = Steps(plain_transformer(), plain_count, mode="none")
    found = Steps(plain_transformer(), count, mode="auto", budget=MUCH)
    assert_same_training(found, expected)
    assert found.state.plan.count("keep") == 4
    assert found.planner.samples()
    assert count.flops[1:] == plain_count.flops[1:]
    assert all(flops > 0 for flops in count.flops)


def test_a_mode_around_all_training_is_no_obstacle():
    with FlopCounterMode(display=False):
        found = Loop(plain_transformer())
        found.live = LiveBytes()  # counted as a mode that is on
        found.run([tokens(2, 12)] * 3, mode="auto", budget=MUCH)
    assert found.state.plan.count("keep") == 4


@pytest.fixture
def compiled():
    """A backend that runs op by op, and how often something it compiled ran."""
    torch._dynamo.reset()
    runs = []

    def backend(graph, inputs):
        def run(*args):
            runs.append(1)
            return graph.forward(*args)

        return run

    backend.runs = runs
    yield backend
    torch._dynamo.reset()


@pytest.mark.parametrize("budget", [MUCH, "1 KiB"])
def test_a_loss_that_is_compiled_runs_compiled_where_it_is_measured(compiled, budget):
    @torch.compile(fullgraph=True, backend=compiled)
    def loss_of(logits, labels):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def step(model, count):
        ids = tokens(2, 12)["input_ids"]
        loss = loss_of(model(input_ids=ids).logits, ids)
        loss.backward()
        return loss

    def build():
        model = llama()
        model.config.use_cache = False
        return model

    expected = Steps(build(), step, mode="none")
    runs = len(compiled.runs)
    assert runs == 6
    found = Steps(build(), step, mode="auto", budget=budget)
    assert_same_training(found, expected)
    assert len(compiled.runs) == 2 * runs


@pytest.mark.parametrize("flags", [{"mode": "full"}, {"mode": "auto", "budget": MUCH}], ids=str)
def test_a_part_of_a_block_that_is_compiled_runs_compiled(compiled, flags):
    gate = torch.compile(lambda x, y: F.silu(x) * y, fullgraph=True, backend=compiled)

    def build():
        model = llama()
        model.config.use_cache = False
        for layer in model.model.layers:
            mlp = layer.mlp
            mlp.forward = lambda x, mlp=mlp: mlp.down_proj(gate(mlp.gate_proj(x), mlp.up_proj(x)))
        return model

    def step(model, count):
        loss = model(**tokens(2, 12))["loss"]
        loss.backward()
        return loss

    expected = Steps(build(), step, mode="none")
    assert_same_training(Steps(build(), step, **flags), expected)


def by_a_part(model, count):
    ids = tokens(2, 12)["input_ids"]
    logits = model.lm_head(model.model(input_ids=ids).last_hidden_state)
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    loss.backward()
    return loss


def test_a_model_that_is_entered_by_a_part(caplog):
    losses, plans = [], []
    for mode in ("none", "auto"):
        model = llama()
        model.config.use_cache = False
        options = {"budget": MUCH} if mode == "auto" else {}
        for _ in range(3):  # each step in a context of its own, as a trainer's is
            with checkpointing(model, mode=mode, **options) as state:
                losses.append(by_a_part(model, 0).detach())
            plans.append(state.plan)
    assert all(torch.equal(a, b) for a, b in zip(losses[:3], losses[3:], strict=True))
    assert sum("without a call of the model itself" in text for text in warnings(caplog)) == 3
    assert plans[-1].count("recompute") == 4


def within_a_backward(model, count):
    """The whole model under a reentrant checkpoint of torch: its forward with gradients runs within a backward."""
    scale = torch.ones((), requires_grad=True)

    def forward(scale):
        return model(**tokens(2, 12))["loss"] * scale

    loss = checkpoint(forward, scale, use_reentrant=True)
    loss.backward()
    return loss


def test_a_forward_within_a_backward_is_not_measured():
    found = Steps(plain_transformer(), within_a_backward, mode="auto", budget=MUCH)
    assert_same_training(found, Steps(plain_transformer(), within_a_backward, mode="none"))
    assert found.planner.samples() == {}


class Skipping(nn.Module):
    """Leaves out its upper half in steps that say so."""

    def __init__(self):
        super().__init__()
        self.inner = plain_transformer()
        self.all = False

    def forward(self, input_ids, labels):
        kept = self.inner.blocks
        if not self.all:
            self.inner.blocks = kept[:2]
        try:
            return self.inner(input_ids=input_ids, labels=labels)
        finally:
            self.inner.blocks = kept


def skipping(model, count):
    model.all = count >= 3
    loss = model(**tokens(8, 40))["loss"]
    loss.backward()
    return loss


def test_blocks_that_did_not_run_when_it_was_measured_have_room_in_the_plan():
    budget = between(Skipping, skipping)
    found = Steps(Skipping(), skipping, mode="auto", budget=budget)
    assert_same_training(found, Steps(Skipping(), skipping, mode="none"))
    assert max(found.peaks) <= budget


def halves(model):
    parameters = list(model.parameters())
    middle = len(parameters) // 2
    return [
        torch.optim.AdamW(parameters[:middle], lr=1e-3),
        torch.optim.SGD(parameters[middle:], lr=1e-3, momentum=0.9),
    ]


def one_step(model, count):
    loss = model(**tokens(8, 40))["loss"]
    loss.backward()
    return loss


def test_the_state_of_several_optimizers_counts():
    options = {"make_optimizers": halves}
    budget = between(plain_transformer, one_step, **options)
    found = Steps(plain_transformer(), one_step, mode="auto", budget=budget, **options)
    assert_same_training(found, Steps(plain_transformer(), one_step, mode="none", **options))
    assert max(found.peaks) <= budget
    sizes = [p.nbytes for p in found.model.parameters()]
    middle = len(sizes) // 2
    numbers = middle * 4  # AdamW counts its steps in a tensor for each weight
    assert found.planner.state_bytes == 2 * sum(sizes[:middle]) + numbers + sum(sizes[middle:])
    assert found.state.plan.count("recompute") < 4


class FailsOnce(torch.optim.SGD):
    """An optimizer whose first step ends with an error."""

    has_failed = False

    def step(self, closure=None):
        if not self.has_failed:
            self.has_failed = True
            raise KeyError("step")
        return super().step(closure)


def test_after_an_optimizer_that_failed_nothing_is_on_and_training_goes_on():
    model = plain_transformer()
    optimizer = FailsOnce(model.parameters(), lr=1e-2)
    with checkpointing(model, mode="auto", budget=MUCH) as state:
        one_step(model, 0)
        with pytest.raises(KeyError, match="step"):
            optimizer.step()
        optimizer.zero_grad()
        for _ in range(3):
            one_step(model, 0)
            optimizer.step()
            assert modes() == 0
            optimizer.zero_grad()
    assert state.plan.count("keep") == 4
    undisturbed = Steps(
        plain_transformer(), one_step, 3, lambda m: [torch.optim.SGD(m.parameters(), lr=1e-2)], mode="auto"
    )
    assert state._batches.planner.optimizer_bytes == undisturbed.planner.optimizer_bytes


def with_cache(model, count):
    loss = model(**tokens(2, 12), use_cache=True)["loss"]
    loss.backward()
    return loss


def test_blocks_that_fill_a_cache_are_kept_and_not_run_again(caplog):
    found = Steps(llama(), with_cache, mode="auto", budget=MUCH)
    assert_same_training(found, Steps(llama(), with_cache, mode="none"))
    assert not any("cannot be run alone" in text for text in warnings(caplog))


def test_warnings_are_told_after_the_log_is_full_of_plans(caplog):
    caplog.set_level(logging.INFO, "ckpt_trainer")
    Loop(plain_transformer()).run([tokens(2, length) for length in range(70, 8, -2)], mode="auto", budget=MUCH)
    before = len(caplog.records)
    assert before <= 32
    assert sum("further sizes" in record.message for record in caplog.records) == 1
    Loop(plain_transformer()).run([tokens(2, length) for length in range(70, 8, -2)], mode="auto", budget="1 KiB")
    assert sum("no plan fits" in text for text in warnings(caplog)) >= 28  # sizes from 64 on share plans


class WithNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.inner, self.norm = plain_transformer(), norm

    def forward(self, **batch):
        return self.inner(**batch)


def test_where_ranks_must_run_the_same_blocks_all_are_recomputed(caplog):
    caplog.set_level(logging.INFO, "ckpt_trainer")
    found = Steps(WithNorm(nn.SyncBatchNorm(4)), one_step, mode="auto", budget=MUCH, number=2)
    assert found.state.plan.count("recompute") == 4
    assert any("SyncBatchNorm makes all ranks" in record.message for record in caplog.records)


def test_nothing_stays_on_the_model_or_on_optimizers():
    for step in (twice, Counted("both"), within_a_backward):
        model = plain_transformer()
        hooks = hooks_of(model)
        Steps(model, step, number=3, mode="auto", budget=MUCH)
        assert hooks_of(model) == hooks


def test_plain_steps_are_as_in_a_loop():
    """The helper of this file does what that of `test_batch_plans` does."""
    found = Steps(plain_transformer(), one_step, number=3, mode="auto", budget=MUCH)
    expected = plain(plain_transformer, [tokens(8, 40)] * 3)
    assert all(torch.equal(a, b) for a, b in zip(found.losses, expected.losses, strict=True))
    assert_same(expected, plain(plain_transformer, [tokens(8, 40)] * 3))


def beside_a_checkpoint(model, count):
    """One forward with gradients runs within the backward of another, whose graph is closed by then."""
    scale = torch.ones((), requires_grad=True)
    one = checkpoint(lambda scale: model(**tokens(2, 12))["loss"] * scale, scale, use_reentrant=True)
    loss = one + model(**tokens(2, 20))["loss"]
    loss.backward()
    return loss


def test_no_mode_stays_where_a_forward_runs_within_the_backward_of_another():
    found = Steps(plain_transformer(), beside_a_checkpoint, mode="auto", budget=MUCH)
    assert_same_training(found, Steps(plain_transformer(), beside_a_checkpoint, mode="none"))
    assert modes() == 0
    assert found.planner.samples() == {}


class Output:
    """What a model may return that nobody can take apart."""

    def __init__(self, loss):
        self.loss = loss


class OwnOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = plain_transformer()

    def forward(self, **batch):
        return Output(self.inner(**batch)["loss"])


def test_several_forwards_are_noticed_by_the_graphs_of_any_output(caplog):
    def step(model, count):
        loss = sum(torch.exp(model(**tokens(8, 40)).loss) for _ in range(3))
        loss.backward()
        return loss

    full, none = (max(Steps(OwnOutput(), step, mode=each).peaks) for each in ("full", "none"))
    budget = (full + none) // 2
    found = Steps(OwnOutput(), step, mode="auto", budget=budget)
    assert max(found.peaks) <= budget
    assert any("several forwards" in text for text in warnings(caplog))


class PartOfHead(nn.Module):
    """The head sees only what has a label, and how much that is no size of an input tells."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = plain_transformer()
        self.head = nn.Linear(64, 4096)

    def forward(self, input_ids, labels):
        logits = self.inner(input_ids=input_ids)["logits"]
        chosen = labels >= 0
        return {"loss": F.cross_entropy(self.head(logits[chosen]), labels[chosen])}


def few_labels(model, count):
    batch = tokens(8, 40)
    if 0 < count < 4:
        batch["labels"][:, 4:] = -1
    loss = model(**batch)["loss"]
    loss.backward()
    return loss


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_head_that_was_once_smaller_may_be_larger_again(share):
    full, none = (max(Steps(PartOfHead(), few_labels, mode=each).peaks) for each in ("full", "none"))
    budget = int(full + share * (none - full))
    found = Steps(PartOfHead(), few_labels, mode="auto", budget=budget)
    assert_same_training(found, Steps(PartOfHead(), few_labels, mode="none"))
    assert max(found.peaks) <= budget


class Growing(nn.Module):
    """A block that stores more from some length on, beside something larger that comes and goes."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x):
        with torch.no_grad():
            x.repeat(1, 1, 40).sum()
        y = self.inner(x)
        for _ in range(8 if x.shape[1] > 48 else 1):
            y = torch.sin(y)
        return x + y


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(Growing() for _ in range(6))
        self.head = nn.Linear(32, 64)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return {"loss": F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


def longer(model, count):
    loss = model(**tokens(8, (16, 32, 96)[min(count // 3, 2)]))["loss"]
    loss.backward()
    return loss


def test_what_a_longer_batch_stores_besides_is_seen():
    full, none = (max(Steps(Stack(), longer, 12, mode=each).peaks) for each in ("full", "none"))
    budget = (full + none) // 2
    found = Steps(Stack(), longer, 12, mode="auto", budget=budget)
    assert_same_training(found, Steps(Stack(), longer, 12, mode="none"))
    assert max(found.peaks) <= budget


def test_optimizers_that_are_gone_are_not_held():
    model = plain_transformer()
    with checkpointing(model, mode="auto", budget=MUCH) as state:
        for _ in range(3):
            optimizer = adamw(model.parameters())
            held = weakref.ref(optimizer)
            for _ in range(2):
                one_step(model, 0)
                optimizer.step()
                optimizer.zero_grad()
            del optimizer
            gc.collect()
            assert held() is None
        assert state._batches._optimizers.state_bytes == 0


def test_flags_of_torch_are_as_they_were_after_modes_that_did_not_end_in_turn():
    Steps(plain_transformer(), Counted("forward"), mode="auto", budget=MUCH)
    assert not is_in_torch_dispatch_mode()
    assert not is_in_torch_dispatch_mode(include_infra_modes=False)
    assert not is_in_any_mode_without_ignore_compile_internals()


def test_a_model_can_be_copied_and_saved_between_steps(tmp_path):
    """As for a moving average of weights, or a snapshot, in a loop of one's own."""
    model = plain_transformer()
    optimizer = adamw(model.parameters())
    with checkpointing(model, mode="auto", budget=MUCH) as state:
        for number in range(3):
            loss = one_step(model, 0)
            result = model(**tokens(2, 12))["logits"]
            with warnings_module.catch_warnings():
                warnings_module.simplefilter("error")
                torch.save(result.detach(), tmp_path / "logits.pt")
            optimizer.step()
            optimizer.zero_grad()
            made = copy.deepcopy(model)
            for copied in (made, pickle.loads(pickle.dumps(model))):
                torch.manual_seed(number)
                expected = copied(**tokens(2, 12))["loss"]
                expected.backward()
                assert all(p.grad is not None for p in copied.parameters())
        assert state._batches.planner.samples()
    assert torch.isfinite(loss)


def view_of_something_changed(model, count):
    loss = model(**tokens(2, 12))["loss"]
    loss.backward()
    return loss


class WithView(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = plain_transformer()

    def forward(self, **batch):
        out = self.inner(**batch)
        base = out["logits"] * 1
        parts = base.unbind(0)
        with torch.no_grad():
            base.mul_(2)
        return {**out, "part": parts[0]}


def test_a_view_without_a_graph_that_could_be_asked_for_is_no_obstacle():
    found = Steps(WithView(), view_of_something_changed, mode="auto", budget=MUCH)
    assert_same_training(found, Steps(WithView(), view_of_something_changed, mode="none"))
    assert found.state.plan.count("keep") == 4
