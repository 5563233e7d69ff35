"""What a step is said to cost from probes and one measured step: the peak that it then has, to the byte or nearly so."""

import logging
from dataclasses import replace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import CASES, llama

from ckpt_trainer import checkpointing
from ckpt_trainer.costs import Link, Probed, Sample, between, bytes_in_flight, live_costs
from ckpt_trainer.measured import BlockBytes, StepBytes
from ckpt_trainer.memory import LiveBytes
from ckpt_trainer.plan import KEEP, RECOMPUTE, Action, Plan
from ckpt_trainer.step_costs import BlockCost, Option, peak_of

MATMUL = Action("selective", save=("matmul",))
NUM_BUDGETS = 8
ROWS = 6  # times those of the batch, so that blocks weigh more than the optimizer


def lora(dropout=0.1):
    # Of more layers than the others: what of a block's input is expected twice is as much in any number of them.
    config = LoraConfig(r=2, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(llama(8, dropout=dropout), config).train()


MODELS = {name: CASES[name].build for name in ("llama", "bert", "t5", "mixtral", "llava")} | {"lora": lora}


class Training:
    """Steps of one model, each with its loss and its peak; `peak` is of a step with its optimizer."""

    def __init__(self, name, live=True):
        self.model = MODELS[name]()
        batch = CASES[name if name in CASES else "llama"].batch()
        self.batch = {key: torch.cat([value] * (1 if name == "lora" else ROWS)) for key, value in batch.items()}
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


def set_budget(planner, budget, first):
    """As if that had been asked for from the start: of what was learnt, the first step and the probes stay."""
    planner.budget = lambda: budget
    for key, known in planner._known.items():
        known.sample, known.costs = first[key], None
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
        first = planner.samples()
        for number in range(NUM_BUDGETS):
            budget = low + (high - low) * (2 * number + 1) // (2 * NUM_BUDGETS)
            set_budget(planner, budget, first)
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
    # T5 of transformers 4 holds more at its head in the first step than later, and of what was seen the most counts.
    over = [one for one in errors if one >= 0.01]
    assert not over or (name == "t5" and transformers.__version__.startswith("4") and max(over) < 0.02)
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


NAMES = ["a", "b", "c"]
LEVELS = {KEEP: (100, 120, 200), MATMUL: (50, 120, 220), RECOMPUTE: (10, 110, 250)}


def block(levels, gradients=0):
    return BlockBytes(*levels, gradients, 0.0, 0.0)


def sampled(extra=(0, 0, 0), **options):
    """A step under the leanest plan; the last block does something more than the others."""
    own = tuple(level + more for level, more in zip(LEVELS[RECOMPUTE], extra, strict=True))
    blocks = {"a": block(LEVELS[RECOMPUTE], 7), "b": block(LEVELS[RECOMPUTE], 7), "c": block(own, 7)}
    probes = {action: Probed(levels, 1.0 + levels[2] / 100, 0.25) for action, levels in LEVELS.items()}
    step = StepBytes(blocks, 3, 40, 60, 20, 30, 10, start=1000, peak=2000, other_seconds=0.5)
    plan = Plan(dict.fromkeys(NAMES, RECOMPUTE))
    return Sample(plan, step, dict.fromkeys(NAMES, "b"), {"b": probes}, 900, False, **options)


def levels_in(costs, name, action):
    (option,) = [
        option for own in costs.blocks if own.name == name for option in own.options if option.action == action
    ]
    return option.stored_bytes, option.forward_bytes, option.backward_bytes


def test_what_is_no_block_is_what_the_step_did():
    costs = live_costs(sampled(), sampled().step, NAMES)
    assert (costs.before_bytes, costs.head_forward_bytes, costs.head_backward_bytes) == (3, 40, 60)
    assert (costs.head_gradient_bytes, costs.before_backward_bytes, costs.before_gradient_bytes) == (20, 30, 10)
    assert costs.gradient_bytes == 20 + 3 * 7 + 10
    assert not costs.gradients_are_there
    assert not costs.staging_bytes
    assert [own.name for own in costs.blocks] == NAMES


def test_a_block_does_what_the_probe_of_its_kind_did_and_what_it_did_otherwise():
    costs = live_costs(sampled(extra=(1, 2, 3)), sampled().step, NAMES)
    for action, levels in LEVELS.items():
        assert levels_in(costs, "a", action) == levels_in(costs, "b", action) == levels
        assert levels_in(costs, "c", action) == (levels[0] + 1, levels[1] + 2, levels[2] + 3)
    assert costs.blocks[0].options is costs.blocks[1].options
    assert costs.blocks[0].options[0].action == KEEP


def test_seconds_are_those_of_the_probe_beyond_keep():
    first = live_costs(sampled(), sampled().step, NAMES).blocks[0]
    assert [option.seconds for option in first.options] == pytest.approx([0.0, 0.2, 0.5])
    assert (first.forward_seconds, first.backward_seconds) == (0.25, 2.75)


def test_what_a_block_was_seen_to_do_counts_and_its_kind_does_as_much_at_least():
    step = replace(
        sampled().step, blocks={"a": block((104, 125, 206)), "b": block((104, 125, 206)), "c": block((9, 9, 9))}
    )
    seen = sampled().with_seen(Plan({"a": KEEP, "b": KEEP, "c": MATMUL}), step)
    costs = live_costs(seen, seen.step, NAMES)
    assert levels_in(costs, "a", KEEP) == (104, 125, 206)
    assert levels_in(costs, "c", KEEP) == (104, 125, 206)
    assert levels_in(costs, "c", MATMUL) == (9, 9, 9)
    assert levels_in(costs, "b", MATMUL) == LEVELS[MATMUL]  # less of one block is not less of another
    assert levels_in(costs, "c", RECOMPUTE) == LEVELS[RECOMPUTE]
    one = replace(sampled().step, blocks={"a": block((110, 120, 200)), "b": block((130, 120, 200))})
    both = live_costs(sampled().with_seen(Plan({"a": KEEP, "b": KEEP}), one), seen.step, NAMES)
    assert levels_in(both, "c", KEEP)[0] == 130  # of two the higher


def test_what_was_seen_later_counts():
    first = sampled().with_seen(Plan(dict.fromkeys("a", KEEP)), replace(sampled().step, blocks={"a": block((1, 1, 1))}))
    later = first.with_seen(Plan(dict.fromkeys("a", KEEP)), replace(sampled().step, blocks={"a": block((2, 2, 2))}))
    assert levels_in(live_costs(later, later.step, NAMES), "a", KEEP) == (2, 2, 2)
    assert levels_in(live_costs(first, first.step, NAMES), "a", KEEP) == (1, 1, 1)


def test_blocks_that_did_not_run_cost_nothing_and_those_of_no_kind_have_one_action():
    costs = live_costs(replace(sampled(), kinds={"a": "b", "b": "b"}), sampled().step, [*NAMES, "d"])
    assert costs.blocks[3].options == (Option(KEEP, 0, 0, 0),)
    (only,) = costs.blocks[2].options
    assert only == Option(RECOMPUTE, *LEVELS[RECOMPUTE])


def test_host_memory_is_offered_where_there_is_a_link():
    link = Link(bytes_per_second=5.0, host_bytes=70, prefetch=2)
    costs = live_costs(sampled(), sampled().step, NAMES, link)
    moved = [option for option in costs.blocks[0].options if option.action.place == "host"]
    assert [option.link_bytes for option in moved] == [option.host_bytes for option in moved] == [100, 50, 10]
    assert all(option.stored_bytes == 0 for option in moved)
    assert costs.staging_bytes == 200  # two that come back, or of two that have not left
    assert (costs.host_budget_bytes, costs.link_bytes_per_second) == (70, 5.0)
    assert all(own.action.place == "device" for own in live_costs(sampled(), sampled().step, NAMES).blocks[0].options)


def test_between_two_sizes():
    low = live_costs(sampled(), sampled().step, NAMES)
    high = replace(low, before_bytes=103, head_forward_bytes=140, head_backward_bytes=160, before_backward_bytes=130)
    options = tuple(
        Option(o.action, o.stored_bytes + 100, o.forward_bytes + 200, o.backward_bytes + 300, o.seconds)
        for o in low.blocks[0].options
    )
    high = replace(high, blocks=tuple(replace(own, options=options) for own in low.blocks))
    half = between(low, high, 0.5)
    assert (half.before_bytes, half.head_forward_bytes, half.head_backward_bytes) == (53, 90, 110)
    assert half.before_backward_bytes == 80
    assert levels_in(half, "c", MATMUL) == (50 + 50, 120 + 100, 220 + 150)
    assert half.gradient_bytes == high.gradient_bytes
    assert between(low, high, 0.0).blocks[0].options == low.blocks[0].options
    assert between(low, high, 1.0).blocks[0].options == high.blocks[0].options


def test_of_nothing_gradients_are_left():
    high = live_costs(sampled(), sampled().step, NAMES)
    nothing = between(None, high, 0.0)
    for own in nothing.blocks:
        assert {(o.stored_bytes, o.forward_bytes, o.backward_bytes, o.seconds) for o in own.options} == {(0, 0, 7, 0.0)}
    assert (nothing.head_backward_bytes, nothing.before_backward_bytes, nothing.before_bytes) == (20, 10, 0)
    twice = between(None, high, 2.0)
    assert levels_in(twice, "a", KEEP) == (200, 240, 2 * 200 - 7)
    assert twice.before_bytes == 6
    there = between(None, replace(high, gradients_are_there=True), 0.0)
    assert there.head_backward_bytes == there.before_backward_bytes == 0
    assert peak_of(twice, [own.options[0] for own in twice.blocks]).bytes > 0


def test_a_block_whose_options_are_others_in_the_smaller_size_is_as_if_it_had_not_run_there():
    high = live_costs(sampled(), sampled().step, NAMES)
    low = replace(high, blocks=tuple(BlockCost(own.name, own.options[:1]) for own in high.blocks))
    assert levels_in(between(low, high, 0.5), "a", KEEP) == (50, 60, 7 + round(0.5 * 193))


def test_copies_hold_the_newest_block_and_the_one_before_or_those_that_come_back_ahead():
    assert bytes_in_flight([5, 7, 3], 0) == bytes_in_flight([5, 7, 3], 1) == bytes_in_flight([5, 7, 3], 2) == 14
    assert bytes_in_flight([5, 7, 3], 4) == 28
    assert bytes_in_flight([], 1) == 0
