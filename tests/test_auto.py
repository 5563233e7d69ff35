"""Which plan a size gets: numbers in, plans out, and always the same ones."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from ckpt_trainer.auto import Planner
from ckpt_trainer.auto_lines import as_data, counts, explain_out_of_memory, measured_line, plan_line, start_line
from ckpt_trainer.costs import Probed, Sample
from ckpt_trainer.measured import BlockBytes, StepBytes
from ckpt_trainer.plan import KEEP, RECOMPUTE, Action, Plan, SizePlan

MATMUL = Action("selective", save=("matmul",))
NAMES = [f"layers.{i}" for i in range(4)]
LEANEST = Plan(dict.fromkeys(NAMES, RECOMPUTE))
GRADIENTS, STATE, TEMPORARY, WEIGHTS = 1000, 9000, 500, 5000

# Of one token: stored, most in forward, most in backward; seconds.
LEVELS = {KEEP: ((100, 110, 130), 3.0), MATMUL: ((50, 110, 140), 3.5), RECOMPUTE: ((10, 110, 150), 4.0)}


def ids(length, rows=1):
    return (("input_ids", (rows, length)),)


def tokens(size):
    (_, (rows, length)), *_ = size
    return rows * length


def levels(action, number):
    return tuple(number * level for level in LEVELS[action][0])


def step_of(size, actions, there, extra=0, state=0):
    """What a step under some actions does: all grows with the number of tokens, the peak is what `peak_of` says."""
    number, own = tokens(size), 0 if there else GRADIENTS
    blocks = {}
    for name, action in zip(NAMES, actions, strict=True):
        stored, forward, backward = levels(action, number)
        blocks[name] = BlockBytes(stored, forward, backward + own + extra, own, 0.0, 0.0)
    gradients = GRADIENTS * (len(NAMES) + 2) if there else 0
    start = WEIGHTS + state + gradients
    held, peak = start + 2 * number, 0
    for name in NAMES:
        peak = max(peak, held + blocks[name].forward)
        held += blocks[name].stored
    peak = max(peak, held + 10 * number + own)
    grown = own
    for name in reversed(NAMES):
        held -= blocks[name].stored
        peak = max(peak, held + grown + blocks[name].backward)
        grown += own
    head = 10 * number
    return StepBytes(blocks, 2 * number, head, head + own, own, own, own, start=start, peak=peak)


def sample(size, there=False, state=0):
    number, own = tokens(size), 0 if there else GRADIENTS
    probes = {}
    for action, (_, seconds) in LEVELS.items():
        stored, forward, backward = levels(action, number)
        probes[action] = Probed((stored, forward, backward + own), number * seconds, number * 1.0)
    step = step_of(size, [RECOMPUTE] * 4, there, state=state)
    return Sample(LEANEST, step, dict.fromkeys(NAMES, NAMES[1]), {NAMES[1]: probes}, WEIGHTS, there)


def planner(budget, *sizes, there=(False,), is_ready=True):
    made = Planner(NAMES, LEANEST, lambda: budget)
    for size in sizes:
        for own in there:
            made.learn(size, sample(size, own))
    if is_ready:
        made.learn_optimizer(STATE, TEMPORARY)
    return made


def actions(choice):
    return [choice.plan[name] for name in NAMES]


def plain_peak(size, action, there=False):
    """The peak of a step in which all blocks have one action, with the state of the optimizer."""
    return step_of(size, [action] * 4, there, state=STATE).peak


def test_the_first_micro_batch_runs_lean_and_is_measured():
    made = planner(10**9, is_ready=False)
    choice = made.choose(ids(100), False)
    assert choice.plan == LEANEST
    assert choice.measures
    assert choice.solution is None
    assert made.choices() == []


def test_until_the_optimizer_made_a_step_all_run_lean():
    made = planner(10**9, ids(100), is_ready=False)
    assert not made.choose(ids(100), False).measures
    assert made.choose(ids(100), True).measures  # gradients are there: something else
    assert not made.choose(ids(50), False).measures  # what the larger one showed holds for it
    assert made.choose(ids(200), False).measures
    assert all(choice.plan == LEANEST for choice in (made.choose(ids(100), False), made.choose(ids(50), False)))
    made.learn_optimizer(STATE, TEMPORARY)
    assert actions(made.choose(ids(100), False)) == [KEEP] * 4


def test_what_is_predicted_is_what_was_counted():
    size = ids(100)
    made = planner(10**9, size)
    choice = made.choose(size, False)
    assert choice.peak.bytes == plain_peak(size, KEEP)
    tight = planner(plain_peak(size, RECOMPUTE), size).choose(size, False)
    assert actions(tight) != [KEEP] * 4
    assert tight.peak.bytes == step_of(size, actions(tight), False, state=STATE).peak <= plain_peak(size, RECOMPUTE)


@pytest.mark.parametrize("there", [False, True])
def test_no_plan_is_above_the_budget_and_more_budget_is_never_slower(there):
    size, seconds = ids(100), []
    least, most = plain_peak(size, RECOMPUTE, there), plain_peak(size, KEEP, there)
    for part in range(9):
        budget = least + (most - least) * part // 8
        choice = planner(budget, size, there=(there, False)).choose(size, there)
        chosen = step_of(size, actions(choice), there, state=STATE)
        assert choice.peak.bytes == chosen.peak <= budget
        seconds.append(choice.solution.extra_seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] == 0 < seconds[0]
    assert len(set(seconds)) > 4


def test_a_small_batch_is_kept_whole_at_a_budget_that_is_tight_for_a_large_one():
    made = planner(plain_peak(ids(1000), RECOMPUTE), ids(1000))
    assert RECOMPUTE in actions(made.choose(ids(1000), False))
    small = made.choose(ids(40), False)
    assert actions(small) == [KEEP] * 4
    assert not small.measures


def test_a_smaller_size_is_planned_from_the_larger_one():
    made = planner(10**9, ids(800))
    choice = made.choose(ids(384), False)
    assert choice.size == ids(384)
    # As much of what grows; gradients as they are.
    assert choice.peak.bytes == pytest.approx(plain_peak(ids(384), KEEP), abs=8)


def test_a_smaller_size_lies_between_two_that_are_known():
    made = planner(10**9, ids(800), ids(200))
    # By the square of the length it is less of the way than by elements.
    assert made.choose(ids(384), False).peak.bytes == pytest.approx(plain_peak(ids(384), KEEP), abs=8)
    assert made.choose(ids(200), False).peak.bytes == plain_peak(ids(200), KEEP)


def test_the_nearest_of_the_larger_sizes_counts():
    made = planner(10**9, ids(3000), ids(800))
    made._known[ids(3000), False] = replace(made._known[ids(3000), False], sample=sample(ids(90000)))
    assert made.choose(ids(384), False).peak.bytes == pytest.approx(plain_peak(ids(384), KEEP), abs=8)


def test_the_nearest_of_the_smaller_sizes_counts():
    made = planner(10**9, ids(100), ids(400), ids(800))
    made._known[ids(100), False] = replace(made._known[ids(100), False], sample=sample(ids(799)))
    assert made.choose(ids(640), False).peak.bytes == pytest.approx(plain_peak(ids(640), KEEP), abs=8)


def test_sizes_of_a_bucket_share_a_plan():
    made = planner(plain_peak(ids(1000), MATMUL), ids(1000))
    choice = made.choose(ids(641), False)
    assert choice.size == ids(704)
    assert made.choose(ids(700), False) is choice
    assert made.choose(ids(704), False) is choice
    assert made.choose(ids(705), False) is not choice
    assert len(made.choices()) == 2


def test_a_larger_size_runs_lean_and_is_measured():
    made = planner(plain_peak(ids(200), KEEP), ids(100))
    choice = made.choose(ids(1000), False)
    assert (choice.plan, choice.measures, choice.solution) == (LEANEST, True, None)
    assert made.choose(ids(100, rows=3), True).measures  # nothing is known of one with gradients
    made.learn(ids(1000), sample(ids(1000)))
    assert made.choose(ids(1000), False).least is not None


def test_a_larger_size_is_kept_whole_where_the_most_it_can_come_to_fits():
    made = planner(10**9, ids(100))
    choice = made.choose(ids(200), False)
    assert actions(choice) == [KEEP] * 4
    assert choice.size == ids(200)
    assert not choice.measures
    # With the square of the length, its bytes are up to four times as many.
    assert choice.peak.bytes >= plain_peak(ids(400), KEEP) - 3 * 6 * GRADIENTS
    limit = planner(choice.peak.bytes - 1, ids(100)).choose(ids(200), False)
    assert limit.plan == LEANEST
    assert limit.measures
    assert actions(planner(choice.peak.bytes, ids(100)).choose(ids(200), False)) == [KEEP] * 4


def test_a_size_of_other_inputs_is_new():
    made = planner(10**9, ids(100))
    other = (*ids(10), ("pixels", (1, 3, 2, 2)))
    assert made.choose(other, False).measures
    assert made.choose((("labels", (1, 10)),), False).measures


def test_what_is_measured_first_is_only_what_is_tight():
    size = ids(100)
    peak = plain_peak(size, KEEP)
    assert not planner(int(peak / 0.79), size).choose(size, False).measures
    assert planner(int(peak / 0.81), size).choose(size, False).measures


def test_a_budget_that_is_too_small():
    size = ids(100)
    budget = plain_peak(size, RECOMPUTE) - 1
    made = planner(budget, size)
    choice = made.choose(size, False)
    assert choice.plan == LEANEST
    assert choice.least.least.bytes == budget + 1
    assert choice.peak == choice.least.least
    assert choice.measures  # once more: the first step may have taken more than later ones
    assert made.choose(size, False) is choice
    made.learn(size, made.samples()[size, False])
    again = made.choose(size, False)
    assert again.least is not None
    assert not again.measures
    assert "no plan fits" in plan_line(choice)
    assert "input_ids 1x100" in plan_line(choice)


def test_more_than_predicted_is_planned_anew_with_what_was_seen():
    size = ids(100)
    budget = plain_peak(size, KEEP)
    made = planner(budget, size)
    choice = made.choose(size, False)
    assert choice.measures
    assert made.learn_peak(choice, step_of(size, [KEEP] * 4, False, extra=700, state=STATE), True)
    assert choice.measured_bytes == choice.peak.bytes + 700
    assert not choice.measures
    again = made.choose(size, False)
    assert again is not choice
    assert again.budget_bytes == budget
    real = step_of(size, actions(again), False, extra=0, state=STATE)
    assert actions(again) != [KEEP] * 4
    assert real.peak <= budget
    assert "planned anew" in measured_line(choice, size, True)
    assert "above the budget" in measured_line(choice, size, True)
    assert "planned anew" not in measured_line(choice, size, False)


def test_less_than_predicted_is_planned_anew_too():
    size = ids(100)
    made = planner(plain_peak(size, KEEP) - 600, size)
    choice = made.choose(size, False)
    assert actions(choice) != [KEEP] * 4
    first = choice.solution.extra_seconds
    assert made.learn_peak(choice, step_of(size, actions(choice), False, extra=-700, state=STATE), True)
    assert made.choose(size, False).solution.extra_seconds <= first


def test_what_came_to_stay_since_the_first_step_counts_from_then_on():
    size, more = ids(1000), 20_000
    made = planner(2 * plain_peak(size, KEEP) - 1, size)
    choice = made.choose(size, False)
    step = step_of(size, [KEEP] * 4, False, state=STATE)
    assert made.learn_peak(choice, replace(step, start=step.start + more, peak=step.peak + more), True)
    again = made.choose(size, False)
    assert actions(again) == [KEEP] * 4
    assert again.step_bytes == choice.step_bytes + more == step.peak + more


def test_what_is_as_predicted_stays():
    size = ids(1000)
    made = planner(plain_peak(size, KEEP), size)
    choice = made.choose(size, False)
    near = step_of(size, [KEEP] * 4, False, extra=-int(0.001 * choice.budget_bytes), state=STATE)
    assert not made.learn_peak(choice, near, True)
    assert made.choose(size, False) is choice
    assert "left" in measured_line(choice, size, False)


def test_one_byte_above_the_budget_is_too_much():
    size = ids(1000)
    made = planner(plain_peak(size, KEEP), size)
    choice = made.choose(size, False)
    assert made.learn_peak(choice, step_of(size, [KEEP] * 4, False, extra=1, state=STATE), True)


def test_a_step_of_a_smaller_size_teaches_an_offset():
    size = ids(704)
    budget = plain_peak(ids(1000), MATMUL)
    made = planner(budget, ids(1000))
    choice = made.choose(ids(700), False)
    assert choice.size == size
    step = step_of(ids(700), actions(choice), False, state=STATE)
    # Less than predicted says nothing of the largest of its bucket.
    assert not made.learn_peak(choice, replace(step, peak=step.peak - 10**5), False)
    assert made.choose(ids(700), False) is choice
    more = choice.peak.bytes + 5000
    assert made.learn_peak(choice, replace(step, peak=more), False)
    again = made.choose(ids(700), False)
    assert again.budget_bytes == budget - 5000
    assert again.peak.bytes <= budget - 5000
    assert made.choose(ids(1000), False).budget_bytes == budget  # of no other size


def test_it_is_not_planned_anew_for_ever():
    size = ids(100)
    made = planner(plain_peak(size, KEEP), size)
    rounds = 0
    while True:
        choice = made.choose(size, False)
        step = step_of(size, actions(choice), False, state=STATE)
        if not made.learn_peak(choice, replace(step, peak=choice.budget_bytes + 1), True):
            break
        rounds += 1
        assert rounds < 10
    assert rounds == 5  # four with what was seen, then one with less to plan for
    assert made.choose(size, False) is choice
    assert choice.budget_bytes < plain_peak(size, KEEP)


def test_the_optimizer_counts():
    size = ids(10)
    made = planner(10**9, size)
    assert made.choose(size, False).peak.bytes == WEIGHTS + STATE + 6 * GRADIENTS + TEMPORARY
    assert made.choose(size, False).peak.phase == "optimizer"
    assert "optimizer" in plan_line(made.choose(size, False))
    first = made.choose(size, False)
    made.learn_optimizer(STATE, TEMPORARY)
    assert made.choose(size, False) is first
    made.learn_optimizer(STATE, 2 * TEMPORARY)
    assert made.choose(size, False).peak.bytes == first.peak.bytes + TEMPORARY


def test_gradients_that_are_there_count_once():
    size = ids(100)
    made = planner(10**9, size, there=(False, True))
    first, later = made.choose(size, False), made.choose(size, True)
    assert first is not later
    assert later.peak.bytes == plain_peak(size, KEEP, there=True)
    assert "later micro-batch" in plan_line(later)
    assert "later micro-batch" not in plan_line(first)


def test_leaner_after_memory_ran_out():
    size = ids(100)
    made = planner(10**9, size)
    choice, least = made.choose(size, False), plain_peak(size, RECOMPUTE)
    peaks = [choice.peak.bytes]
    for share_left in (2 / 3, 1 / 3):
        choice = made.make_leaner(choice, share_left)
        assert made.choose(size, False) is choice
        assert choice.peak.bytes <= least + share_left * (peaks[-1] - least)
        peaks.append(choice.peak.bytes)
    assert peaks[0] > peaks[1] > peaks[2]
    last = made.make_leaner(choice, 0)
    assert last.plan == LEANEST
    assert not last.measures
    assert made.choose(size, False) is last
    assert actions(made.choose(ids(90), False)) == [KEEP] * 4  # other sizes are as they were


def test_bytes_that_are_lost_to_fragments_are_taken_off_every_plan():
    size = ids(1000)
    made = planner(plain_peak(size, KEEP), size)
    assert actions(made.choose(size, False)) == [KEEP] * 4
    made.learn_fragments(1)
    choice = made.choose(size, False)
    assert choice.solution.peak.bytes <= choice.budget_bytes == plain_peak(size, KEEP) - 1
    assert "the budget less 1 B" in plan_line(choice)
    made.learn_fragments(0)  # no fewer than before
    assert made.choose(size, False) is choice
    least = planner(10, size).choose(size, False)
    assert "the budget less" not in plan_line(least)


def test_leaner_than_the_leanest_is_the_leanest():
    made = planner(1, is_ready=False)
    choice = made.choose(ids(100), False)
    assert made.make_leaner(choice, 0.5).plan == LEANEST


def test_what_would_fit():
    size = ids(1000)
    whole = plain_peak(size, RECOMPUTE)
    made = planner(whole // 2, size)
    choice = made.choose(size, False)
    part = made.fitting_share(choice)
    assert 0 < part < 1
    assert plain_peak(ids(int(1000 * part)), RECOMPUTE) <= whole // 2
    assert plain_peak(ids(int(1100 * part)), RECOMPUTE) > whole // 2
    text = explain_out_of_memory(choice, whole // 2, part)
    assert f"About {part:.0%}" in text
    assert "4 recompute" in text
    assert "by the figures it fits" in explain_out_of_memory(choice, whole, 1.0).lower()
    assert "About" not in explain_out_of_memory(choice, whole, None)
    assert planner(10**6, is_ready=False).fitting_share(choice) is None


def test_given_plans_are_carried_out_and_nothing_is_measured():
    made = planner(plain_peak(ids(1000), MATMUL), ids(1000))
    chosen = [made.choose(ids(length), False) for length in (1000, 700, 300)]
    saved = Plan.from_json(made.plan().to_json())
    assert saved.actions == LEANEST.actions
    again = Planner(NAMES, Plan(saved.actions), lambda: 1, given=saved.sizes)
    for length, choice in zip((1000, 700, 300), chosen, strict=True):
        found = again.choose(ids(length), False)
        assert found.plan == choice.plan
        assert not found.measures
    assert again.choose(ids(999), False).plan == chosen[0].plan
    assert again.choose(ids(2000), False).plan == LEANEST
    assert again.choose(ids(1000), True).plan == LEANEST
    assert not again.choose(ids(2000), False).measures
    assert again.plan() == saved


def test_a_given_plan_that_ran_out_of_memory_gets_leaner():
    keep = dict.fromkeys(NAMES, KEEP)
    made = Planner(NAMES, LEANEST, lambda: 10**6, given=[SizePlan(ids(100), False, keep)])
    choice = made.choose(ids(90), False)
    assert actions(made.make_leaner(choice, 0.5)) == [RECOMPUTE] * 4
    assert made.choose(ids(90), False).plan == made.choose(ids(100), False).plan == LEANEST


def test_the_smallest_given_size_that_covers_is_taken():
    keep = dict.fromkeys(NAMES, KEEP)
    given = [SizePlan(ids(1000), False, LEANEST.actions), SizePlan(ids(100), False, keep)]
    made = Planner(NAMES, LEANEST, lambda: 1, given=given)
    assert actions(made.choose(ids(100), False)) == [KEEP] * 4
    assert actions(made.choose(ids(101), False)) == [RECOMPUTE] * 4


def test_report():
    size = ids(100)
    made = planner(10**9, size)
    choice = made.choose(size, False)
    made.learn_peak(choice, step_of(size, [KEEP] * 4, False, state=STATE), True)
    data = as_data(made, 10**9)
    assert json.loads(json.dumps(data)) == data
    assert data["budget_bytes"] == 10**9
    assert data["optimizer_state_bytes"] == STATE
    (entry,) = data["sizes"]
    assert entry["inputs"] == {"input_ids": [1, 100]}
    assert entry["predicted_peak_bytes"] == entry["measured_peak_bytes"] == plain_peak(size, KEEP)
    assert entry["actions"] == {"keep": 4}
    made.learn_peak(choice, step_of(size, [KEEP] * 4, False, state=STATE + 10**8), True)
    assert made.choices() == []
    assert [entry["measured_peak_bytes"] for entry in as_data(made, 10**9)["sizes"]] == [choice.measured_bytes]
    assert counts(Plan({"a": KEEP, "b": RECOMPUTE, "c": KEEP})) == "2 keep, 1 recompute"
    assert "0.9 of what there is" in start_line(2**30, 0.9, 4)
    assert "as asked for" in start_line(2**30, 2**30, 4)


_SCRIPT = """
import json, random
from test_auto import NAMES, ids, planner, plain_peak, MATMUL
made = planner(plain_peak(ids(1000), MATMUL), ids(1000), ids(300), there=(False, True))
draw = random.Random(0)
for _ in range(200):
    made.choose(ids(draw.randint(1, 1200)), draw.random() < 0.5)
print(json.dumps([(c.size, c.gradients_are_there, c.plan.as_data(), c.peak.bytes) for c in made.choices()]))
"""


@pytest.mark.distributed
def test_the_same_plans_in_every_process():
    found = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, check=True
        )
        found.append(json.loads(run.stdout.splitlines()[-1]))
    assert found[0] == found[1]
    assert len(found[0]) > 20
