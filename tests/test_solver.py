"""The solver against a mixed integer program and against all choices there are; work is counted, time is not measured."""

import ast
import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

import ckpt_trainer
from ckpt_trainer.plan import Action
from ckpt_trainer.solver import least_peak, solve
from ckpt_trainer.step_costs import BlockCost, BudgetTooSmall, Option, Peak, StepCosts, extra_seconds, peak_of

MIB = 2**20
TIERS = ("keep", "selective:expensive", "selective:matmul", "selective:half_matmul", "selective:attention", "recompute")


def options_of_class(rng, number, host):
    """The options of one class of block, and the seconds of its forward: less stored takes more time."""
    inputs, seconds = rng.randint(4, 64) * MIB, rng.uniform(1e-3, 2e-2)
    everything = int(inputs * rng.uniform(6, 25))
    work = int(everything * rng.uniform(1.0, 1.5))
    shares = [1.0, *sorted((rng.uniform(0.05, 0.9) for _ in range(4)), reverse=True), 0.0]
    slower = [0.0, *sorted(rng.uniform(0.0, 0.8) for _ in range(4)), rng.uniform(0.85, 1.2)]
    options = []
    for text, share, slow in zip(TIERS, shares, slower, strict=True):
        kept = int(inputs + share * (everything - inputs)) // 512 * 512
        forward = kept + int(everything * rng.uniform(0.05, 0.3))
        options.append(Option(Action.from_text(text), kept, forward, work, slow * seconds))
    for option in options[:] if host else []:
        action = Action.from_text(f"{option.action.short}@host")
        moved = option.stored_bytes
        options.append(
            replace(option, action=action, stored_bytes=rng.randint(0, MIB), host_bytes=moved, link_bytes=moved)
        )
    chosen = rng.sample(options[1:], min(number, len(options)) - 1)
    return (options[0], *chosen), seconds, rng.choice([0, int(rng.uniform(0.1, 3) * everything)])


def random_costs(rng, most_blocks=14, number=None, width=None, host=None, classes=None):
    """A step of mixed classes of blocks, with or without host memory, gradients there or growing."""
    number = number or rng.randint(1, most_blocks)
    host = rng.random() < 0.5 if host is None else host
    width = width or rng.randint(2, 12)
    made = [options_of_class(rng, width, host) for _ in range(classes or rng.choice([1, 1, 2, 3, 5, number]))]
    picked = [rng.randrange(len(made)) for _ in range(number)]
    if rng.random() < 0.5:
        picked.sort()
    blocks = tuple(
        BlockCost(f"model.layers.{i}", options, gradients, seconds, 2 * seconds)
        for i, (options, seconds, gradients) in enumerate(made[c] for c in picked)
    )
    kept = sum(block.options[0].stored_bytes for block in blocks)
    forward = sum(block.forward_seconds for block in blocks)
    return StepCosts(
        blocks,
        resident_bytes=rng.randint(0, 2000) * MIB,
        before_bytes=rng.randint(0, 64) * MIB,
        head_forward_bytes=int(kept * rng.choice([0, 0.05, 0.3])),
        head_backward_bytes=int(kept * rng.choice([0, 0.1, 0.4])),
        head_gradient_bytes=rng.randint(0, 100) * MIB,
        before_backward_bytes=rng.randint(0, 200) * MIB,
        before_gradient_bytes=rng.randint(0, 100) * MIB,
        optimizer_bytes=rng.randint(0, 300) * MIB,
        staging_bytes=rng.choice([0, 64 * MIB]) if host else 0,
        gradients_are_there=rng.random() < 0.5,
        host_budget_bytes=int(kept * rng.choice([0.1, 0.5, 2])) if host else 0,
        link_bytes_per_second=kept / forward * rng.choice([0.1, 0.3, 1, 3]) if host else 0.0,
    )


def peak_of_keep(costs):
    return peak_of(costs, [block.options[0] for block in costs.blocks]).bytes


def random_budget(costs, rng):
    least, most = least_peak(costs).bytes, peak_of_keep(costs)
    return least + int((most - least) * rng.choice([0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 1]))


def live_peak(costs, chosen):
    """The peak, counted a second time: by following what is on the device through the step."""
    gradients = costs.gradient_bytes
    copies = costs.staging_bytes if any(option.link_bytes for option in chosen) else 0
    live = costs.resident_bytes + costs.before_bytes + copies + (gradients if costs.gradients_are_there else 0)
    seen = []
    for option in chosen:
        seen.append(live + option.forward_bytes)
        live += option.stored_bytes
    seen += [live + costs.head_forward_bytes, live + costs.head_backward_bytes]
    live += 0 if costs.gradients_are_there else costs.head_gradient_bytes
    for block, option in zip(reversed(costs.blocks), reversed(chosen), strict=True):
        live -= option.stored_bytes
        seen.append(live + option.backward_bytes)
        live += 0 if costs.gradients_are_there else block.gradient_bytes
    seen.append(live - copies + costs.before_backward_bytes)
    return max(*seen, costs.resident_bytes + gradients + costs.optimizer_bytes)


def optimum(costs, budget_bytes):
    """The least extra time, by a mixed integer program, without copies and with them: found, and proven to be a bound."""
    found = [_program(costs, budget_bytes, copies) for copies in (False, True)]
    times, bounds = zip(*(times for times in found if times is not None), strict=True)
    return min(times), min(bounds)


def _program(costs, budget_bytes, copies):
    entries = [
        (i, option)
        for i, block in enumerate(costs.blocks)
        for option in block.options
        if not option.link_bytes or (copies and costs.link_bytes_per_second)
    ]
    number, speed = len(costs.blocks), costs.link_bytes_per_second or 1.0
    room = budget_bytes - costs.base_bytes - (costs.staging_bytes if copies else 0)
    later = np.array([option.gradient_bytes for option in costs.blocks])
    grown = [
        0 if costs.gradients_are_there else costs.head_gradient_bytes + later[i + 1 :].sum() for i in range(number)
    ]
    rows, least, most = [], [], []

    def limit(row, high, low=-np.inf, waits=(0.0, 0.0)):
        rows.append([*row, *waits])
        least.append(low)
        most.append(high)

    for i in range(number):
        limit([float(j == i) for j, _ in entries], 1, 1)
        before = [(o.stored_bytes / MIB if j < i else 0.0, j == i, o) for j, o in entries]
        limit([stored + own * o.forward_bytes / MIB for stored, own, o in before], room / MIB)
        limit([stored + own * (o.backward_bytes + grown[i]) / MIB for stored, own, o in before], room / MIB)
    limit([o.stored_bytes / MIB for _, o in entries], (room - costs.head_bytes) / MIB)
    limit([o.host_bytes / MIB for _, o in entries], costs.host_budget_bytes / MIB)
    out, back = costs.hiding_seconds()
    limit([o.link_bytes / speed for _, o in entries], out, waits=(-1.0, 0.0))
    limit([o.link_bytes / speed for _, o in entries], back, waits=(0.0, -1.0))
    found = milp(
        [*(o.seconds for _, o in entries), 1.0, 1.0],
        constraints=LinearConstraint(np.array(rows), least, most),
        integrality=[1] * len(entries) + [0, 0],
        bounds=Bounds(0, [1.0] * len(entries) + [np.inf] * 2),
        options={"mip_rel_gap": 1e-3, "time_limit": 5},
    )
    return None if found.x is None else (found.fun, found.mip_dual_bound)


@pytest.mark.parametrize("seed", range(25))
def test_within_one_percent_of_the_program_and_never_over_the_budget(seed):
    for number in range(20):
        rng = random.Random(1000 * seed + number)
        costs = random_costs(rng)
        budget_bytes = random_budget(costs, rng)
        solution = solve(costs, budget_bytes)
        assert solution.peak.bytes == live_peak(costs, solution.options) <= budget_bytes
        assert solution.host_bytes == sum(option.host_bytes for option in solution.options) <= costs.host_budget_bytes
        assert solution.extra_seconds == extra_seconds(costs, solution.options)
        best, bound = optimum(costs, budget_bytes)
        compute = sum(block.forward_seconds + block.backward_seconds for block in costs.blocks)
        assert solution.extra_seconds <= 1.01 * best + 2e-5 * compute, number
        # What is said to be a bound is one, and both mean the same by time.
        assert solution.bound_seconds <= best * (1 + 1e-6) + 2e-5 * compute
        assert solution.extra_seconds >= bound * (1 - 1e-6) - 1e-9


@pytest.mark.parametrize("seed", range(40))
def test_the_best_of_all_choices(seed):
    rng = random.Random(seed)
    costs = random_costs(rng, most_blocks=5, width=4)
    choices = list(itertools.product(*(block.options for block in costs.blocks)))
    peaks = {
        choice: live_peak(costs, choice)
        for choice in choices
        if sum(option.host_bytes for option in choice) <= costs.host_budget_bytes
    }
    assert least_peak(costs).bytes == min(peaks.values())
    compute = sum(block.forward_seconds + block.backward_seconds for block in costs.blocks)
    for share in (0, 0.25, 0.6):
        budget_bytes = int(min(peaks.values()) + share * (peak_of_keep(costs) - min(peaks.values())))
        best = min(extra_seconds(costs, choice) for choice, peak in peaks.items() if peak <= budget_bytes)
        found = solve(costs, budget_bytes).extra_seconds
        assert best - 1e-12 <= found <= best + 2e-5 * compute


@pytest.mark.parametrize("seed", range(12))
def test_more_budget_is_never_slower(seed):
    costs = random_costs(random.Random(seed), number=10, width=6, host=seed % 2 == 0)
    compute = sum(block.forward_seconds + block.backward_seconds for block in costs.blocks)
    least, most = least_peak(costs).bytes, peak_of_keep(costs)
    times = [solve(costs, least + (most - least) * step // 40).extra_seconds for step in range(41)]
    # What is below this is not worth a search for who copies.
    allowed = 1e-12 if seed % 2 else 1e-5 * compute
    assert all(after <= before + allowed for before, after in itertools.pairwise(times))
    assert times[-1] == 0.0
    assert times[0] > 0.0 or most == least


def test_the_same_costs_give_the_same_solution():
    for seed in range(6):
        rng = random.Random(seed)
        costs = random_costs(rng, number=24, width=12)
        budget_bytes = random_budget(costs, rng)
        first = solve(costs, budget_bytes)
        again = random_costs(random.Random(seed), number=24, width=12)
        assert again == costs
        assert solve(again, budget_bytes) == first


@pytest.mark.parametrize("classes", [1, 2, 128])
@pytest.mark.parametrize("host", [False, True])
def test_work_stays_small_for_128_blocks_of_12_actions(classes, host):
    for seed in range(3):
        rng = random.Random(seed)
        costs = random_costs(rng, number=128, width=12, host=host, classes=classes)
        least, most = least_peak(costs).bytes, peak_of_keep(costs)
        for share in (0.1, 0.5, 0.9):
            solution = solve(costs, least + int(share * (most - least)))
            assert solution.peak.bytes <= least + int(share * (most - least))
            # A table of 16384 sizes would take 128 * 12 * 16384 = 25 million.
            assert solution.work <= (40_000 if host else 30_000)


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("number", [12, 80])
def test_blocks_with_equal_options_are_one_class(host, number):
    """Also where each block has a tuple of its own: the same plan, and the same work."""
    rng = random.Random(3)
    shared = random_costs(rng, number=number, width=8, host=host, classes=2)
    own = replace(
        shared, blocks=tuple(replace(block, options=tuple(map(replace, block.options))) for block in shared.blocks)
    )
    assert own == shared
    assert len({id(block.options) for block in own.blocks}) == number
    least, most = least_peak(shared).bytes, peak_of_keep(shared)
    for share in (0.1, 0.5, 0.9):
        budget_bytes = least + int(share * (most - least))
        assert solve(own, budget_bytes) == solve(shared, budget_bytes)


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("number", [6, 40])
def test_a_few_bytes_more_or_less(host, number):
    """The least peak fits and a byte less does not; keep fits at its own peak and not a byte below."""
    for seed in range(4):
        costs = random_costs(random.Random(seed), number=number, width=8, host=host, classes=3)
        least, most = least_peak(costs).bytes, peak_of_keep(costs)
        with pytest.raises(BudgetTooSmall):
            solve(costs, least - 1)
        # Where the peak is in the optimizer there is nothing between the two.
        for budget_bytes in (least, least + 1, least + 511, most - 1) if most > least + 512 else ():
            solution = solve(costs, budget_bytes)
            assert solution.peak.bytes <= budget_bytes
            assert solution.plan.is_active
        assert not solve(costs, most).plan.is_active


def llama(number=32, stored=(64, 30, 8), seconds=(0.0, 0.001, 0.01), **others):
    """Blocks of one class with three options in MiB, and nothing else unless it is asked for."""
    actions = (Action("keep"), Action("selective"), Action("recompute"))
    options = tuple(
        Option(action, size * MIB, size * MIB, 72 * MIB, time)
        for action, size, time in zip(actions, stored, seconds, strict=True)
    )
    blocks = tuple(BlockCost(f"model.layers.{i}", options, 0, 0.01, 0.02) for i in range(number))
    return StepCosts(blocks, **others)


def test_all_is_kept_where_all_fits():
    costs = llama()
    solution = solve(costs, (31 * 64 + 72) * MIB)
    assert not solution.plan.is_active
    assert (solution.extra_seconds, solution.work) == (0.0, 1)
    assert solve(costs, (31 * 64 + 72) * MIB - 1).plan.is_active


def test_identical_blocks_form_runs_with_the_leaner_ones_first():
    for budget in range(320, 2000, 80):
        stored = [option.stored_bytes for option in solve(llama(), budget * MIB).options]
        assert stored == sorted(stored)


def test_runs_give_way_where_they_would_not_fit():
    # Only the first block is small enough to be kept while the last gradients are there.
    costs = llama(2, stored=(64, 30, 8))
    big = tuple(
        replace(option, backward_bytes=(200 if i == 0 else 40) * MIB)
        for i, option in enumerate(costs.blocks[0].options)
    )
    costs = StepCosts(tuple(replace(block, options=big) for block in costs.blocks))
    solution = solve(costs, 203 * MIB)
    assert [option.action.kind for option in solution.options] == ["keep", "selective"]


def test_growing_gradients_count_in_backward():
    # Kept activations shrink from 640 MiB while gradients grow to 1000: the peak is where backward ends.
    costs = llama(10)
    grown = StepCosts(tuple(replace(block, gradient_bytes=100 * MIB) for block in costs.blocks))
    keep = [block.options[0] for block in grown.blocks]
    assert peak_of(grown, keep) == Peak(1000 * MIB, "optimizer")
    solution = solve(grown, 1000 * MIB)
    assert not solution.plan.is_active
    assert solution.peak_is_elsewhere
    there = replace(grown, gradients_are_there=True)
    assert peak_of(there, keep) == Peak((1000 + 9 * 64 + 72) * MIB, "backward", "model.layers.9")
    assert solve(there, 1300 * MIB).plan.is_active


@pytest.mark.parametrize(
    ("costs", "least"),
    [
        (llama(resident_bytes=100 * MIB, optimizer_bytes=900 * MIB), Peak(1000 * MIB, "optimizer")),
        (llama(head_backward_bytes=900 * MIB), Peak((900 + 32 * 8) * MIB, "head and loss")),
        (llama(before_bytes=50 * MIB, before_backward_bytes=900 * MIB), Peak(950 * MIB, "embeddings")),
        (llama(), Peak((72 + 31 * 8) * MIB, "backward", "model.layers.31")),
        (llama(0, head_forward_bytes=7 * MIB), Peak(7 * MIB, "head and loss")),
    ],
)
def test_a_budget_that_is_too_small_says_what_is_needed_and_where(costs, least):
    with pytest.raises(BudgetTooSmall, match=rf"(?s)asked for.*{least.where}") as caught:
        solve(costs, least.bytes - 1)
    assert caught.value.least == least_peak(costs) == least
    solution = solve(costs, least.bytes)
    assert solution.peak == least
    assert solution.peak_is_elsewhere == (least.phase in ("optimizer", "embeddings"))


def test_the_least_peak_within_the_host_budget():
    costs = offloading(host_budget_bytes=10 * 8 * MIB)
    assert least_peak(costs).bytes == (72 + 21 * 8) * MIB
    with pytest.raises(BudgetTooSmall):
        solve(costs, least_peak(costs).bytes - 1)
    assert solve(costs, least_peak(costs).bytes).host_bytes == 10 * 8 * MIB


def offloading(speed=1e12, **others):
    """The blocks of `llama` with recompute on the host as well, which moves 8 MiB."""
    costs = llama()
    host = Option(Action("recompute", place="host"), 0, 8 * MIB, 72 * MIB, 0.01, 8 * MIB, 8 * MIB)
    kept = Option(Action("keep", place="host"), 0, 64 * MIB, 72 * MIB, 0.0, 64 * MIB, 64 * MIB)
    options = (*costs.blocks[0].options, kept, host)
    blocks = tuple(replace(block, options=options) for block in costs.blocks)
    return StepCosts(blocks, **{"host_budget_bytes": 10**12, "link_bytes_per_second": speed, **others})


def test_a_fast_link_hides_what_it_moves_and_no_more_moves_than_must():
    solution = solve(offloading(), 1032 * MIB)
    assert solution.extra_seconds == 0.0
    moved = [option for option in solution.options if option.link_bytes]
    assert {option.action.short for option in moved} == {"keep@host"}
    # 16 blocks fit into the budget; all others move.
    assert len(moved) == 16
    assert [bool(option.link_bytes) for option in solution.options] == [True] * 16 + [False] * 16


def test_a_slow_link_is_used_only_where_memory_demands_it():
    slow = offloading(speed=MIB)
    assert not any(option.link_bytes for option in solve(slow, 500 * MIB).options)
    solution = solve(slow, 260 * MIB)
    assert 0 < sum(option.link_bytes for option in solution.options) <= 8 * 8 * MIB
    # Recomputed blocks cannot all stay: 72 + 31 * 8 = 320 MiB. What copies take beyond the compute is counted.
    assert solution.extra_seconds > 31 * 0.01


def test_nothing_moves_without_a_link_or_without_host_memory():
    for costs in (offloading(speed=0.0), offloading(host_budget_bytes=0)):
        assert not any(option.link_bytes for option in solve(costs, 500 * MIB).options)
        assert least_peak(costs) == least_peak(llama())


def test_copies_in_flight_need_room_of_their_own():
    with_room = offloading(staging_bytes=100 * MIB)
    solution = solve(with_room, 1032 * MIB)
    assert solution.peak.bytes == live_peak(with_room, solution.options) <= 1032 * MIB
    assert sum(bool(option.link_bytes) for option in solution.options) == 18
    # More than copies can free: the device alone does better.
    crowded = solve(offloading(staging_bytes=2000 * MIB), 1024 * MIB)
    assert not any(option.link_bytes for option in crowded.options)


def test_of_equal_options_the_first_is_taken():
    costs = llama(4)
    twice = tuple(replace(option, action=Action("selective", save=("matmul",))) for option in costs.blocks[0].options)
    both = (*costs.blocks[0].options, *twice)
    doubled = StepCosts(tuple(replace(block, options=both) for block in costs.blocks))
    for budget in (96, 150, 200, 250):
        assert solve(doubled, budget * MIB).options == solve(costs, budget * MIB).options


def test_the_first_option_is_one_that_needs_nothing():
    moved = Option(Action("keep", place="host"), 0, 0, 0, 0.0, 1, 1)
    for options in ((), (moved,)):
        with pytest.raises(ValueError, match=r"'layers\.0' needs a first option"):
            BlockCost("layers.0", options)


def test_numbers_only():
    """Neither torch nor a solver is imported, by the solver or by what it imports."""
    package = Path(ckpt_trainer.__file__).parent
    seen, others, left = set(), set(), ["solver"]
    while left:
        name = left.pop()
        seen.add(name)
        for node in ast.walk(ast.parse((package / f"{name}.py").read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            ours = {module.partition(".")[2] for module in modules if module.startswith("ckpt_trainer.")}
            left += ours - seen
            others |= {module.partition(".")[0] for module in modules} - {"ckpt_trainer"}
    assert others <= {
        "__future__",
        "collections",
        "dataclasses",
        "functools",
        "itertools",
        "operator",
        "typing",
        "numpy",
        "difflib",
        "json",
        "re",
    }
    assert seen == {"solver", "choices", "prices", "exchange", "search", "step_costs", "plan"}
