"""Mode `auto` in training: which micro-batches are measured, that the budget holds, and that nothing else is any other."""

import logging
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import transformers
from tiny_models import CASES, VOCABULARY, llama, plain_transformer, text_dataset
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ckpt_trainer import CheckpointedTrainer, CheckpointTrainingArguments, batch_plans, checkpointing, engine
from ckpt_trainer.memory import LiveBytes

MUCH = 10**9


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("ckpt_trainer").setLevel(logging.INFO)


@pytest.fixture
def counted(monkeypatch):
    """How often things that cost time happened."""
    counts = Counter()

    def count(owner, name, key):
        theirs = getattr(owner, name)

        def counting(*args, **kwargs):
            counts[key] += 1
            return theirs(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(batch_plans, "probe", "probes")
    count(batch_plans.WatchedStep, "__enter__", "watched")
    count(engine.Installed, "__init__", "installed")
    return counts


def modes():
    return len(_get_current_dispatch_mode_stack())


def hooks_of(model):
    groups = [(m._forward_hooks, m._forward_pre_hooks, m._backward_hooks) for m in model.modules()]
    own = sum(len(hooks) for group in groups for hooks in group)
    return own, len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)


def tokens(rows, length, seed=1):
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def adamw(parameters, **options):
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-3, **options)


class Loop:
    """A training loop; its losses, its last gradients, and the peak of each step."""

    def __init__(self, model, make_optimizer=adamw, autocast=False):
        self.model, self.optimizer = model, make_optimizer(model.parameters())
        self.losses, self.peaks, self.gradients, self.state = [], [], [], None
        self.autocast, self.live = autocast, None

    def run(self, batches, accumulate=1, during=lambda loop, number: None, **flags):
        torch.manual_seed(1)
        with checkpointing(self.model, **flags) as self.state:
            for number in range(0, len(batches), accumulate):
                if self.live is not None:
                    self.live.reset_peak()
                for batch in batches[number : number + accumulate]:
                    with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                        loss = self.model(**batch)["loss"]
                    loss.backward()
                    self.losses.append(loss.detach().clone())
                    del loss
                if self.live is not None:
                    self.peaks.append(self.live.peak)
                if number + accumulate >= len(batches):
                    self.gradients = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
                self.optimizer.step()
                self.optimizer.zero_grad()
                during(self, number)
        assert modes() == (self.live is not None)
        return self

    def measured(self, batches, **options):
        """The same with its peaks."""
        self.live = LiveBytes(self.model)
        with self.live:
            return self.run(batches, **options)


def assert_same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one.losses, other.losses, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.gradients, other.gradients, strict=True))
    pairs = zip(one.model.state_dict().items(), other.model.state_dict().items(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def no_cache(model):
    if hasattr(model, "config"):
        model.config.use_cache = False
    return model


def plain(build, batches, make_optimizer=adamw, autocast=False, **options):
    return Loop(no_cache(build()), make_optimizer, autocast).run(batches, mode="none", **options)


LENGTHS = (24, 7, 33, 12, 40, 18, 9, 29, 40, 36, 24, 7, 33, 12, 40, 18, 9, 29, 40, 36)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lengths_that_vary_stay_in_the_budget(counted, accumulate):
    batches = [tokens(4, length, length) for length in LENGTHS]
    full = Loop(plain_transformer()).measured(batches, mode="full", accumulate=accumulate)
    none = Loop(plain_transformer()).measured(batches, mode="none", accumulate=accumulate)
    # The longest takes half of what it could, and a little for what is kept to look at.
    budget = (max(full.peaks) + max(none.peaks)) // 2
    counted.clear()
    found = Loop(plain_transformer()).measured(batches, mode="auto", budget=budget, accumulate=accumulate)
    assert_same(found, none)
    assert max(found.peaks) <= budget
    choices = found.state._batches.planner.choices()
    assert any(choice.plan.count("keep") == 4 for choice in choices)
    assert any(choice.plan.count("keep") < 4 for choice in choices)
    # Each action of one block; those that learn from a replay twice the first time.
    lean = len(found.state._batches.planner.samples())
    learning = sum(action.kind == "selective" for action in batch_plans.ACTIONS)
    assert counted["probes"] <= lean * len(batch_plans.ACTIONS) + learning
    assert lean <= 5 * accumulate
    assert counted["watched"] <= 2 * len(set(LENGTHS)) * accumulate


def test_gradients_that_are_there_when_a_micro_batch_begins_count_once(counted):
    batches = [tokens(8, 40)] * 12
    full, none = (Loop(plain_transformer()).measured(batches, mode=mode, accumulate=2) for mode in ("full", "none"))
    budget = (max(full.peaks) + max(none.peaks)) // 2
    counted.clear()
    found = Loop(plain_transformer()).measured(batches, mode="auto", budget=budget, accumulate=2)
    assert counted["watched"] == 4  # each kind on the leanest plan, then on its own, which is as predicted
    entries = found.state.report()["auto"]["sizes"]
    assert [entry["gradients_are_there"] for entry in entries] == [False, True]
    for entry in entries:
        assert entry["measured_peak_bytes"] == pytest.approx(entry["predicted_step_peak_bytes"], rel=0.01)
    assert max(found.peaks) <= budget


@pytest.mark.parametrize("accumulate", [1, 2])
def test_after_two_sizes_larger_ones_are_not_probed_and_keep_to_the_budget(counted, accumulate):
    def build():
        return no_cache(llama(dropout=0.0))  # with dropout, attention on a CPU stores scores, which grow by the square

    lengths = [length for length in (64, 128, 192, 256, 320, 384) for _ in range(accumulate)]
    batches = [tokens(2, length) for length in lengths] * 2
    full, none = (Loop(build()).measured(batches, mode=mode, accumulate=accumulate) for mode in ("full", "none"))
    budget = (max(full.peaks) + max(none.peaks)) // 2
    counted.clear()
    found = Loop(build()).measured(batches, mode="auto", budget=budget, accumulate=accumulate)
    assert_same(found, none)
    assert max(found.peaks) <= budget
    samples = found.state._batches.planner.samples()
    assert len(samples) >= 4 * accumulate
    assert all(sample.probes for sample in samples.values())
    learning = sum(action.kind == "selective" for action in batch_plans.ACTIONS)
    # Two sizes of first micro-batches, and of later ones: what was probed of a size counts for both. With transformers 4
    # masks are copied in blocks, which grow by the square: one size more.
    more = counted["probes"] - (1 + accumulate) * len(batch_plans.ACTIONS) - learning
    assert more in ([0] if transformers.__version__.startswith("5") else [0, len(batch_plans.ACTIONS)])


def test_once_planned_nothing_is_measured_and_nothing_is_made(counted):
    batches = [tokens(4, length) for length in (40, 12, 24) * 8]
    seen = []

    def during(loop, number):
        seen.append((counted["watched"], counted["probes"], counted["installed"], modes()))

    full = Loop(plain_transformer()).measured(batches[:2], mode="full")
    counted.clear()
    loop = Loop(plain_transformer()).run(batches, mode="auto", budget=int(max(full.peaks) * 1.3), during=during)
    assert seen[11] == seen[-1]
    assert seen[-1][0] > 1
    assert all(on == 0 for *_, on in seen)
    assert len({str(choice.plan) for choice in loop.state._batches.planner.choices()}) >= 2


def test_with_room_for_all_one_step_is_measured(counted):
    loop = Loop(plain_transformer()).run([tokens(2, 12)] * 5, mode="auto", budget=MUCH)
    assert counted["watched"] == 1
    assert loop.state.plan.count("keep") == 4
    # Blocks that are kept are not counted, and probes are not either.
    assert loop.state.report()["calls"] == {"recompute": 4}


def test_no_mode_is_on_between_steps_or_in_a_step_that_is_not_measured():
    model, seen = plain_transformer(), []
    optimizer = adamw(model.parameters())
    with checkpointing(model, mode="auto", budget=MUCH):
        for _ in range(3):
            loss = model(**tokens(2, 12))["loss"]
            seen.append(modes())
            loss.backward()
            optimizer.step()
            seen.append(modes())
            optimizer.zero_grad()
    assert seen == [2, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["residual_net", "wav2vec2_conformer", "albert", "gpt2", "mixtral", "swin", "gemma3n"])
def test_bits_are_those_of_plain_training(name):
    case = CASES[name]
    batches = [case.batch()] * 4
    expected = plain(case.build, batches)
    model = case.build()
    full = Loop(case.build()).measured(batches[:2], mode="full")
    found = Loop(model).run(batches, mode="auto", budget=int(1.05 * max(full.peaks)))
    assert_same(found, expected)
    # transformers leaves some of its own, and forwards too.
    assert hooks_of(model) == hooks_of(expected.model)
    left = [["forward" in vars(module) for module in each.modules()] for each in (model, expected.model)]
    assert left[0] == left[1]


def test_a_probe_leaves_nothing(counted):
    """Neither in random numbers, nor buffers, nor gradients: all is as after a step that is not looked at."""
    model, other = CASES["wav2vec2_conformer"].build(), CASES["wav2vec2_conformer"].build()
    batch = CASES["wav2vec2_conformer"].batch()
    states = []
    for each, mode in ((model, "auto"), (other, "full")):
        torch.manual_seed(3)
        with checkpointing(each, mode=mode):
            each(**batch)["loss"].backward()
        states.append((torch.get_rng_state(), dict(each.named_buffers()), [p.grad for p in each.parameters()]))
    assert counted["probes"] > 0
    assert torch.equal(states[0][0], states[1][0])
    assert all(torch.equal(states[0][1][key], value) for key, value in states[1][1].items())
    for one, another in zip(states[0][2], states[1][2], strict=True):
        assert (one is None and another is None) or torch.equal(one, another)


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: adamw(ps, foreach=True),
        lambda ps: adamw(ps, fused=True),
        lambda ps: torch.optim.SGD(list(ps), lr=1e-2),
        lambda ps: torch.optim.SGD(list(ps), lr=1e-2, momentum=0.9),
    ],
    ids=["foreach", "fused", "sgd", "momentum"],
)
def test_optimizers(make):
    batches = [tokens(8, 40)] * 4
    full = Loop(plain_transformer(), make).measured(batches, mode="full")
    none = Loop(plain_transformer(), make).measured(batches, mode="none")
    budget = (full.peaks[-1] + none.peaks[-1]) // 2
    found = Loop(plain_transformer(), make).measured(batches, mode="auto", budget=budget)
    assert_same(found, none)
    assert max(found.peaks) <= budget
    planner = found.state._batches.planner
    assert planner.state_bytes == sum(
        leaf.nbytes for state in found.optimizer.state.values() for leaf in state.values() if torch.is_tensor(leaf)
    )


class Own:
    """An optimizer that is none of torch's."""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    @torch.no_grad()
    def step(self):
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-2)

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None


def test_an_optimizer_that_is_none_of_torch():
    batches = [tokens(4, 20)] * 5
    expected = plain(plain_transformer, batches, Own)
    found = Loop(plain_transformer(), Own).run(batches, mode="auto", budget=MUCH)
    assert_same(found, expected)
    assert found.state._batches.planner.is_ready
    assert found.state.plan.count("keep") == 4


def test_frozen_parts_and_autocast(caplog):
    def build():
        model = llama()
        for layer in model.model.layers[:2]:
            layer.requires_grad_(False)
        return model

    batches = [tokens(4, 20)] * 4
    expected = plain(build, batches, autocast=True)
    found = Loop(build(), autocast=True).run(batches, mode="auto", budget=MUCH)
    assert_same(found, expected)
    assert found.state.plan.count("keep") == 4
    # Frozen blocks store nothing, and are not probed.
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_two_forwards_before_a_backward():
    losses = []
    for mode in ("none", "auto"):
        model = plain_transformer()
        optimizer = adamw(model.parameters())
        torch.manual_seed(1)
        with checkpointing(model, mode=mode, **({"budget": MUCH} if mode == "auto" else {})):
            for _ in range(4):
                one, other = model(**tokens(2, 12))["loss"], model(**tokens(2, 20))["loss"]
                (one * other).backward()
                losses.append((one * other).detach())
                optimizer.step()
                optimizer.zero_grad()
        assert modes() == 0
    assert all(torch.equal(a, b) for a, b in zip(losses[:4], losses[4:], strict=True))


def test_forwards_without_backward_and_evaluation_in_between(counted):
    losses = []
    for mode in ("none", "auto"):
        model = plain_transformer()
        optimizer = adamw(model.parameters())
        torch.manual_seed(1)
        with checkpointing(model, mode=mode, **({"budget": MUCH} if mode == "auto" else {})) as state:
            for _ in range(3):
                model(**tokens(2, 30))  # nobody wants its gradients
                loss = model(**tokens(2, 12))["loss"]
                with torch.no_grad():
                    losses.append(model(**tokens(2, 50))["loss"])
                loss.backward()
                losses.append(loss.detach())
                optimizer.step()
                optimizer.zero_grad()
                model.eval()
                with torch.no_grad():
                    losses.append(model(**tokens(2, 12))["loss"])
                model.train()
        assert modes() == 0
    assert all(torch.equal(a, b) for a, b in zip(losses[:9], losses[9:], strict=True))
    sizes = {dict(size)["input_ids"] for size, _ in state._batches.planner.samples()}
    assert (2, 12) in sizes
    assert not sizes & {(2, 50), (2, 30)}


class _Fails(nn.Module):
    """Passes on what it gets; fails when told to, in forward or in backward."""

    where = ""

    def forward(self, x):
        if self.where == "forward":
            raise KeyError("forward")
        if self.where == "backward":
            x.register_hook(self._fail)
        return x

    def _fail(self, gradient):
        raise KeyError("backward")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("caught", ["inside", "outside"])
def test_after_an_exception_all_is_as_it_was_and_training_goes_on(where, caught):
    model = plain_transformer()
    expected = plain(plain_transformer, [tokens(2, 12)] * 3)
    model.blocks[2].dropout = nn.Sequential(model.blocks[2].dropout, failing := _Fails())
    hooks, optimizer, losses = hooks_of(model), adamw(model.parameters()), []

    def fail():
        failing.where = where
        with pytest.raises(KeyError, match=where):
            model(**tokens(2, 12))["loss"].backward()
        failing.where = ""
        optimizer.zero_grad()

    if caught == "outside":
        failing.where = where
        with pytest.raises(KeyError, match=where), checkpointing(model, mode="auto", budget=MUCH):
            model(**tokens(2, 12))["loss"].backward()
        failing.where = ""
        optimizer.zero_grad()
        assert modes() == 0
        assert hooks_of(model) == hooks
        assert not any("forward" in vars(module) for module in model.modules())
    with checkpointing(model, mode="auto", budget=MUCH) as state:
        if caught == "inside":
            fail()
        torch.manual_seed(1)
        for _ in range(3):
            loss = model(**tokens(2, 12))["loss"]
            loss.backward()
            losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(losses, expected.losses, strict=True))
    assert state.plan.count("keep") == 4
    assert modes() == 0
    assert hooks_of(model) == hooks


def test_what_failed_is_not_held(counted):
    """A budget that is too small is remembered with its reason, and not with the frames that it passed through."""
    live = LiveBytes(model := plain_transformer())
    optimizer, held = adamw(model.parameters()), []
    with live, checkpointing(model, mode="auto", budget="1 KiB"):
        for _ in range(3):
            loss = model(**tokens(16, 40))["loss"]
            del loss
            held.append(live.current)
            model(**tokens(16, 40))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    state = 2 * sum(p.nbytes for p in model.parameters())
    assert held[2] <= held[0] + state + 4096


def test_parts_with_a_mode_of_their_own():
    batches = [tokens(2, 12)] * 3
    expected = plain(plain_transformer, batches)
    modules = {"blocks.1": "full"}
    found = Loop(plain_transformer()).run(batches, mode="auto", modules=modules, budget=MUCH)
    assert_same(found, expected)
    assert [action.kind for action in found.state.plan.actions.values()] == ["keep", "recompute", "keep", "keep"]


def test_a_policy_that_answers_for_some_blocks():
    batches = [tokens(2, 12)] * 3
    expected = plain(plain_transformer, batches)

    def policy(block):
        return "selective:matmul" if block.name == "blocks.3" else None

    found = Loop(plain_transformer()).run(batches, mode="auto", policy=policy, budget=MUCH)
    assert_same(found, expected)
    assert [a.short for a in found.state.plan.actions.values()] == ["keep", "keep", "keep", "selective:matmul"]


def arguments(folder, **options):
    return CheckpointTrainingArguments(
        output_dir=str(folder), max_steps=5, per_device_train_batch_size=2, report_to=[], save_strategy="no",
        use_cpu=True, logging_steps=1, **options,
    )  # fmt: skip


class Smoothed(CheckpointedTrainer):
    """Computes the loss outside of the model."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("cls", [CheckpointedTrainer, Smoothed])
def test_in_a_trainer(tmp_path, counted, cls, accumulate):
    found = []
    for mode in ("full", "auto"):
        counted.clear()
        options = {"checkpointing_budget": MUCH} if mode == "auto" else {}
        model = llama(2)
        hooks = hooks_of(model)
        args = arguments(tmp_path, checkpointing_mode=mode, gradient_accumulation_steps=accumulate, **options)
        trainer = cls(model=model, args=args, train_dataset=text_dataset(10))
        trainer.train()
        assert modes() == 0
        assert hooks_of(model) == hooks
        found.append(([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model.state_dict()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][key], value) for key, value in found[1][1].items())
    # The last step of an epoch of five batches has one only.
    assert counted["watched"] == accumulate
    assert trainer._checkpointing.plan.count("keep") == 2


def test_a_trainer_keeps_all_of_short_batches_from_the_first_on(tmp_path):
    """The number of items in a batch, which it hands to the model in a tensor, is the same for all lengths."""
    rows = [row for length in (64, 64, 16, 16, 16) for row in text_dataset(2, length)]

    class InOrder(CheckpointedTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def train(**flags):
        args = arguments(tmp_path, gradient_accumulation_steps=1, **flags)
        trainer = InOrder(model=llama(4), args=args, train_dataset=rows)
        trainer.train()
        return trainer

    roomy = train(checkpointing_mode="auto", checkpointing_budget=MUCH).memory_report()["auto"]["sizes"]
    budget = int(0.7 * roomy[0]["predicted_peak_bytes"])
    long, short = train(checkpointing_mode="auto", checkpointing_budget=budget).memory_report()["auto"]["sizes"]
    assert "num_items_in_batch" in long["inputs"]
    assert long["inputs"]["input_ids"] == [2, 64]
    assert set(long["actions"]) != {"keep"}
    assert short["actions"] == {"keep": 4}


def test_a_step_in_which_flops_are_counted_is_not_measured_the_next_is(tmp_path, counted, caplog):
    def train(budget):
        counted.clear()
        args = arguments(tmp_path, checkpointing_mode="auto", checkpointing_budget=budget)
        trainer = CheckpointedTrainer(model=llama(2), args=args, train_dataset=text_dataset(10))
        trainer.train()
        return trainer.memory_report()["auto"]["sizes"]

    (roomy,) = train(MUCH)
    assert roomy["measured_peak_bytes"] is None
    caplog.clear()
    (tight,) = train(int(1.05 * roomy["predicted_peak_bytes"]))
    assert tight["actions"] == {"keep": 2}
    assert tight["measured_peak_bytes"] == pytest.approx(tight["predicted_step_peak_bytes"], rel=1e-3)
    assert counted["watched"] == 2
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@contextmanager
def no_learning(planner):
    """Whoever learns something raises."""
    theirs, planner.learn = planner.learn, None
    try:
        yield
    finally:
        planner.learn = theirs


def test_a_loss_that_does_not_reach_the_blocks_teaches_nothing():
    model = plain_transformer()
    with checkpointing(model, mode="auto", budget=MUCH) as state:
        with no_learning(state._batches.planner):
            model(**tokens(2, 12))
            model.head.weight.sum().backward()
            state._batches.conclude()
        assert state._batches.planner.samples() == {}
        model(**tokens(2, 12))["loss"].backward()
    assert len(state._batches.planner.samples()) == 1
