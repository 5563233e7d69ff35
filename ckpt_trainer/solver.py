"""Which action each block gets so that a step fits a budget and takes as little time as that allows.

Pure numbers: from the costs of each block under each action (`step_costs`) to one action for each block. The answer is
the optimum wherever the search was not cut short, and says by how much it can miss it where it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ckpt_trainer.choices import Choice, Table, make_offers, make_table
from ckpt_trainer.exchange import improve, repair
from ckpt_trainer.plan import Plan
from ckpt_trainer.prices import Prices, find_prices
from ckpt_trainer.search import dive, search
from ckpt_trainer.step_costs import BudgetTooSmall, Option, Peak, StepCosts, constant_peak, extra_seconds, peak_of

# How many pairs of device and host bytes `leanest` follows, and how many at first where any choice that fits will do.
_PAIRS, _FEW_PAIRS = 1000, 60


@dataclass(frozen=True)
class Solution:
    """What was chosen for each block, and what it comes to.

    Args:
        plan: Block name -> action.
        options: What was chosen, in forward order.
        peak: The predicted peak and where it is.
        extra_seconds: Predicted time beyond that of a step in which all blocks are kept.
        bound_seconds: No choice that fits takes less; equal to `extra_seconds` where the choice is the optimum.
        host_bytes: Host memory that the choice takes.
        work: How many choices, whole and partial, were looked at.
    """

    plan: Plan
    options: tuple[Option, ...]
    peak: Peak
    extra_seconds: float
    bound_seconds: float
    host_bytes: int
    work: int

    @property
    def peak_is_elsewhere(self) -> bool:
        """Whether the peak is where no action on any block lowers it: in the optimizer or the embeddings."""
        return not self.peak.block and self.peak.phase != "head and loss"


def solve(costs: StepCosts, budget_bytes: int) -> Solution:
    """The fastest choice of one option for each block whose peak is within a budget.

    Raises:
        BudgetTooSmall: No choice is.
    """
    keep = tuple(block.options[0] for block in costs.blocks)
    if peak_of(costs, keep).bytes <= budget_bytes:
        return _solution(costs, keep, 0.0, 1)
    if constant_peak(costs).bytes > budget_bytes:
        raise BudgetTooSmall(budget_bytes, least_peak(costs))
    offers = make_offers(costs)
    fitting: list[Prices] = []
    for copies in _ways(costs):
        known = min((prices.best_time for prices in fitting), default=np.inf)
        prices = _prices(make_table(costs, offers, budget_bytes, copies), known)
        fitting += [prices] if prices is not None else []
    if not fitting:
        raise BudgetTooSmall(budget_bytes, least_peak(costs))
    best, bound, work = _best_of(sorted(fitting, key=lambda prices: prices.bound), _tolerance(costs))
    options = _options(costs, best.table, _in_runs(best.table, best.choice))
    return _solution(costs, options, bound, work)


def _best_of(ways: list[Prices], tolerance: float) -> tuple[Prices, float, int]:
    """The best after the search, the bound of all, and the work done. What cannot beat another way is not searched."""
    bound = np.inf
    for prices in ways:
        target = min(way.best_time for way in ways)
        bound = min(bound, search(prices, target, tolerance))
    work = sum(prices.evaluations for prices in ways)
    return min(ways, key=lambda prices: prices.best_time), bound, work


def least_peak(costs: StepCosts) -> Peak:
    """The peak of the choice that has the lowest one, within the host budget."""
    offers = make_offers(costs)
    tables = [make_table(costs, offers, 0, copies) for copies in _ways(costs)]
    chosen = [_options(costs, table, leanest(table)) for table in tables]
    return min((peak_of(costs, options) for options in chosen), key=lambda peak: peak.bytes)


def _ways(costs: StepCosts) -> list[bool]:
    """With copies where there is a link and something to move, and without them.

    Where copies take no room of their own, a choice that may copy is also one that need not.
    """
    moves = costs.link_bytes_per_second > 0 and any(o.link_bytes for block in costs.blocks for o in block.options)
    return [*([True] if moves else []), *([False] if costs.staging_bytes or not moves else [])]


def _prices(table: Table, known: float) -> Prices | None:
    """Prices, and a choice that fits; None where none does, or none that is faster than what is known."""
    if not table.can_fit():
        return None
    prices = find_prices(table, known)
    if prices.bound >= known:
        return prices
    filled, cost = dive(prices), prices.cost()
    seeds = [prices.choice] if np.isfinite(prices.best_time) else []
    rounded = None if filled else repair(table, prices.rounded(), cost)
    seeds += [rounded] if rounded is not None else []
    for seed in seeds or (leanest(table, pairs) for pairs in (_FEW_PAIRS, _PAIRS)):
        if table.fits(seed):
            prices.offer(improve(table, seed, cost))
        if np.isfinite(prices.best_time) and not seeds:
            break
    return prices if np.isfinite(prices.best_time) else None


def _tolerance(costs: StepCosts) -> float:
    """Seconds that are not worth a search: a hundred thousandth of the blocks' own time."""
    return 1e-5 * sum(block.forward_seconds + block.backward_seconds for block in costs.blocks)


def _solution(costs: StepCosts, options: tuple[Option, ...], bound: float, work: int) -> Solution:
    seconds = extra_seconds(costs, options)
    plan = Plan({block.name: option.action for block, option in zip(costs.blocks, options, strict=True)})
    host_bytes = sum(option.host_bytes for option in options)
    return Solution(plan, options, peak_of(costs, options), seconds, min(bound, seconds), host_bytes, work)


def _options(costs: StepCosts, table: Table, choice: Choice) -> tuple[Option, ...]:
    return tuple(block.options[column] for block, column in zip(costs.blocks, table.of(choice), strict=True))


def leanest(table: Table, pairs: int = _PAIRS) -> Choice:
    """The choice with the lowest peak within the host budget.

    From the last block to the first, all pairs of the most bytes from a block on, above what earlier blocks hold, and the
    host memory that takes. Only pairs that no other is as good as go on.
    """
    most, host = np.array([table.limits[0] - table.limits[-1]]), np.zeros(1)
    steps: list[tuple[Choice, Choice]] = []
    for row in range(len(table.seconds) - 1, -1, -1):
        options = np.flatnonzero(np.isfinite(table.seconds[row]))
        higher = np.maximum(most[None, :] + table.stored[row, options, None], table.needed[row, options, None]).ravel()
        moved = (host[None, :] + table.host[row, options, None]).ravel()
        order = np.lexsort((moved, higher))
        before = np.concatenate(([np.inf], np.minimum.accumulate(moved[order])[:-1]))
        order = order[(moved[order] < before) & (moved[order] <= table.host_limit)]
        if len(order) > pairs:
            order = order[np.linspace(0, len(order) - 1, pairs).astype(np.intp)]
        steps.append((order % len(most), options[order // len(most)]))
        most, host = higher[order], moved[order]
    position, choice = 0, []
    for parents, taken in reversed(steps):
        choice.append(taken[position])
        position = parents[position]
    return np.array(choice, dtype=np.intp)


def _in_runs(table: Table, choice: Choice) -> Choice:
    """The same options for the same classes, but the leaner ones at earlier blocks, wherever that fits as well.

    What a late block keeps is freed first, so this order never holds more, and a plan of a few runs is easier to read.
    """
    stored = table.stored[table.rows, choice]
    by_class = np.argsort(table.classes, kind="stable")
    leaner_first = np.lexsort((choice, stored, table.classes))
    ordered: Choice = choice.copy()
    ordered[by_class] = choice[leaner_first]
    if table.fits(ordered):
        return ordered
    for one in np.unique(table.classes[ordered != choice]):
        changed = np.where(table.classes == one, ordered, choice)
        if table.fits(changed):
            choice = np.asarray(changed)
    return choice
