"""The fastest choice that fits: block by block in forward order, with all partial choices that may still become it.

A partial choice is dropped where it can no longer fit, where another one holds no more of anything and is no slower, or
where its bound (see `prices`) says that it cannot beat the best choice known. What is left is small: most options cost so
much above the best of their block that they are out before the search begins. If more are left than may go on, those with
the lowest bounds do, and the answer is no longer known to be the optimum; the lowest bound that was lost says how close
it is.

A walk over very many blocks takes too long. There only a few of them are free at first, while all others do what is near
the best way to divide each block; these few are enough to fill what is left of the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ckpt_trainer.choices import Choice, Floats, Table
from ckpt_trainer.exchange import improve
from ckpt_trainer.prices import Prices

# How many partial choices go on from one block to the next. Copies make them differ in more than one way, so that
# comparing them takes longer. In a second walk it is these numbers, divided by the number of blocks squared.
_NARROW, _NARROW_ALONE = 40, 120
_WIDE, _WIDE_ALONE = 2**20, 2**22
# In the first walk, the share of the price of what a partial choice holds more or less than it should by then that speaks
# against it. Of many with the same bound, those near the middle are the ones that can use what there is.
_STRAIGHT = 0.2
# With many blocks only so many are free, at first and later, while the others stay near the middle or what is known; and
# what counts is what they cost, much more than where the middle is.
_DIVES, _FREE = (16, 32), (24,)
_NEAR = 0.02
# How many of the choices at the end of a walk are improved.
_FINISHED, _FINISHED_FEW = 4, 1
# An answer that is proven to be this close is good enough where there are more blocks than this.
_CLOSE, _SMALL = 5e-3, 32
# A walk over all of more blocks than this is made only where it could gain this share of the time, and so many times
# what is not worth a search.
_WALKED, _FAR, _WORTH = 64, 0.03, 100
# Differences in time below this share of the whole are rounding.
_ROUNDING = 1e-10
# More partial choices than these are not compared each with each.
_COMPARED = 1500
_EARLIER = np.triu(np.ones((_COMPARED, _COMPARED), dtype=bool), 1)
# Prices of device memory, host memory and link in units of the best ones.
_AROUND = (
    *(
        (1, 1, 1),
        (0, 1, 1),
        (1, 0, 1),
        (1, 1, 0),
        (0.5, 1, 1),
        (1, 0.5, 1),
        (1, 1, 0.5),
        (2, 1, 1),
        (1, 2, 1),
        (1, 1, 2),
    ),
    *((0.5, 0.5, 1), (0.5, 1, 0.5), (1, 0.5, 0.5), (2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1), (1, 4, 1), (1, 1, 8)),
)


@dataclass
class Partial:
    """Partial choices as columns: what each holds, and how it came to be.

    Args:
        sums: Stored bytes, host bytes, link seconds and seconds of each, as rows.
        single: The option of each block that has no other.
        rows: The blocks that have a choice.
        parents: For each block the position of each partial choice's predecessor.
        taken: For each block the option each took.
    """

    sums: Floats
    single: Choice
    rows: Choice
    parents: list[Choice]
    taken: list[Choice]


def search(prices: Prices, known: float, tolerance: float) -> float:
    """The fastest choice, from what is known from the prices, which keep it.

    Args:
        known: The time of a choice that is known from elsewhere; slower ones are of no use.
        tolerance: Seconds of waiting for copies that are not worth a search.

    Returns:
        The bound: no choice takes less time.
    """
    number, bound = len(prices.table.seconds), prices.bound
    worth = _WORTH * tolerance
    if not _copies(prices.table):
        tolerance = 0.0
    close = _CLOSE if number > _SMALL else 0.0
    for walk in _walks(prices.table):
        known = min(known, prices.best_time)
        target = known - max(tolerance, _ROUNDING * abs(known))
        if prices.bound >= target or bound >= known * (1 - close):
            break
        if number > _WALKED and not walk.free and known - bound < max(_FAR * known, worth):
            break
        lost = _pass(prices, walk, target, prices.choice if walk.free else None)
        if not walk.free:
            bound = max(bound, min(lost, prices.best_time, known))
    return min(max(bound, prices.bound), prices.best_time)


def dive(prices: Prices) -> bool:
    """A choice for many blocks: all but a few take what is near the middle, and these few fill what is left.

    Returns:
        Whether that gave a choice that is faster than what was known.
    """
    if len(prices.table.seconds) <= _SMALL:
        return False
    around, known = prices.rounded(_NEAR), prices.best_time
    for free in _DIVES:
        if prices.best_time >= known:
            _pass(prices, Walk(_narrow(prices.table), _STRAIGHT, free), known, around)
    return prices.best_time < known


@dataclass(frozen=True)
class Walk:
    """How to walk over the blocks.

    Args:
        width: How many partial choices go on from one block to the next.
        straight: How much speaks against those that are not in the middle.
        free: Of how many blocks the options are looked at; the others do what they do in a known choice. 0: of all.
    """

    width: int
    straight: float
    free: int = 0


def _walks(table: Table) -> list[Walk]:
    """The walks over the blocks, each of them made if those before it did not settle it."""
    narrow, number = _narrow(table), len(table.seconds)
    walks = [Walk(narrow, _STRAIGHT, free) for free in _FREE if number > _SMALL]
    walks.append(Walk(narrow, _STRAIGHT))
    if number <= _SMALL:
        walks.append(Walk((_WIDE if _copies(table) else _WIDE_ALONE) // max(number, 1) ** 2, 0.0))
    return walks


def _narrow(table: Table) -> int:
    return _NARROW if _copies(table) else _NARROW_ALONE


def _copies(table: Table) -> bool:
    return bool(table.link.any() or table.host.any())


def _pass(prices: Prices, walk: Walk, target: float, around: Choice | None) -> float:
    """One walk over the blocks, over few of them around a known choice; the least bound of what was dropped."""
    table, cost = prices.table, prices.cost()
    dearer = cost - cost.min(axis=1)[:, None]
    allowed = (dearer + prices.bound < target) & np.isfinite(table.seconds)
    if not allowed.any(axis=1).all():
        return np.inf
    if around is not None:
        allowed = _core(table, around, allowed, dearer, walk.free)
    roof = table.roofs(allowed)
    if roof[0] < 0:
        return np.inf
    partial, dropped, made = _walk(prices, allowed, roof, target, walk)
    prices.evaluations += made
    times = partial.sums[3] + table.exposed(partial.sums[2])
    for position in np.argsort(times, kind="stable")[: _FINISHED if not walk.free else _FINISHED_FEW]:
        prices.offer(improve(table, _trace(partial, int(position)), cost))
    return dropped


def _core(table: Table, around: Choice, allowed: NDArray[np.bool_], dearer: Floats, free: int) -> NDArray[np.bool_]:
    """All options of the blocks that could most easily choose otherwise than they do; of the others what they chose."""
    taken = dearer[table.rows, around]
    other = np.where(allowed, dearer, np.inf)
    other[table.rows, around] = np.inf
    easy = other.min(axis=1) - 2 * taken
    highest = np.sort(easy)[free - 1]
    contested = np.flatnonzero(easy <= highest + 1e-9 * abs(highest))
    # Of many alike some of each option that is taken, from all over.
    contested = contested[np.argsort(around[contested], kind="stable")]
    contested = contested[np.linspace(0, len(contested) - 1, free).astype(np.intp)]
    core = np.zeros_like(allowed)
    core[table.rows, around] = True
    core[contested] |= allowed[contested]
    return core


def _walk(
    prices: Prices, allowed: NDArray[np.bool_], roof: Floats, target: float, walk: Walk
) -> tuple[Partial, float, int]:
    table = prices.table
    with_copies = bool(table.link[allowed].any() or table.host[allowed].any())
    slopes, rests = _bounds(prices, allowed, with_copies and not walk.free)
    lost, made = np.inf, 0
    spare_host = table.host_limit - _least_later(table.host, allowed)
    steps = np.stack((table.stored, table.host, table.link, table.seconds))
    single = allowed.argmax(axis=1)
    open_rows = np.flatnonzero(allowed.sum(axis=1) > 1)
    fixed = np.zeros((4, len(single) + 1))
    fixed[:, 1:] = steps[:, table.rows, single]
    fixed[:, open_rows + 1] = 0.0
    fixed = np.cumsum(fixed, axis=1)
    stops = [*open_rows.tolist(), len(single)]
    partial = Partial(fixed[:, stops[0], None], single, open_rows, [], [])
    for row, stop in pairwise(stops):
        options = np.flatnonzero(allowed[row])
        sums, parents, number = _extend(partial, steps[:, row, options])
        taken = options[number]
        keep = (sums[0] <= roof[row + 1]) & (sums[1] <= spare_host[row + 1])
        keep &= partial.sums[0, parents] + table.needed[row, taken] <= table.limits[row]
        sums += (fixed[:, stop] - fixed[:, row + 1])[:, None]
        bounds = sums[3] + (slopes[:, stop] @ sums[:3] + rests[:, stop, None]).max(axis=0)
        keep &= bounds < target
        away = slopes[0, stop] @ np.abs(sums[:3] - prices.middle[:, stop, None])
        keep, dropped = _thin(sums, keep, bounds, bounds + walk.straight * away, with_copies, walk.width)
        lost = min(lost, dropped)
        made += sums.shape[1]
        where = np.flatnonzero(keep)
        partial.sums = sums[:, where]
        partial.parents.append(parents[where])
        partial.taken.append(taken[where])
        if not len(where):
            break
    return partial, lost, made


def _extend(partial: Partial, steps: Floats) -> tuple[Floats, Choice, Choice]:
    """Each partial choice with each option of the next block: the sums, which choice it was, which option."""
    number, options = partial.sums.shape[1], steps.shape[1]
    sums = (partial.sums[:, None, :] + steps[:, :, None]).reshape(4, -1)
    return sums, np.tile(np.arange(number), options), np.repeat(np.arange(options), number)


def _thin(
    sums: Floats, keep: NDArray[np.bool_], bounds: Floats, rank: Floats, with_copies: bool, width: int
) -> tuple[NDArray[np.bool_], float]:
    """Without those that another is as good as, and not more than go on; the least bound of what was lost by that."""
    where = np.flatnonzero(keep)
    lost = np.inf
    if with_copies and len(where):
        where = _distinct(sums, where)
        if len(where) > 3 * width:
            order = np.argsort(rank[where], kind="stable")
            lost = float(bounds[where[order[3 * width :]]].min())
            where = where[order[: 3 * width]]
    where = _best_of(sums, where, with_copies)
    if len(where) > width:
        order = np.argsort(rank[where], kind="stable")
        lost = min(lost, float(bounds[where[order[width:]]].min()))
        where = where[order[:width]]
    thinned = np.zeros_like(keep)
    thinned[where] = True
    return thinned, lost


def _distinct(sums: Floats, where: Choice) -> Choice:
    """The fastest of those that hold the same of everything, as blocks of one class make many."""
    stored, host, link, seconds = sums[:, where]
    key = stored + np.sqrt(2) * host + np.sqrt(3) * np.rint(link * (2**40 / max(float(link.max()), 1e-30)))
    order = np.lexsort((seconds, key))
    first = np.concatenate(([True], np.diff(key[order]) > 0))
    return np.asarray(where[order[first]])


def _best_of(sums: Floats, where: Choice, with_copies: bool) -> Choice:
    stored, host, link, seconds = sums[:, where]
    where = where[order := np.argsort(seconds, kind="stable")]
    stored, host, link = stored[order], host[order], link[order]
    if not with_copies:
        before = np.concatenate(([np.inf], np.minimum.accumulate(stored)[:-1]))
        return np.asarray(where[stored < before])
    if len(where) > _COMPARED:
        return where
    beaten = stored[:, None] <= stored[None, :]
    beaten &= host[:, None] <= host[None, :]
    beaten &= link[:, None] <= link[None, :]
    beaten &= _EARLIER[: len(where), : len(where)]
    return np.asarray(where[~beaten.any(axis=0)])


def _bounds(prices: Prices, allowed: NDArray[np.bool_], with_copies: bool) -> tuple[Floats, Floats]:
    """What a partial choice is worth before each block: a price for each of its first three sums, and a constant.

    Any prices give a bound. The best ones for the whole step are not the best ones for each partial choice, which may have
    taken much of one thing and little of another, so there are some around them, and the highest bound counts.
    """
    table = prices.table
    slopes, rests = [], []
    for device, host, link in _AROUND if with_copies else _AROUND[:1]:
        near = Prices(table, prices.device * device, prices.host * host, min(prices.link * link, 2.0))
        least = np.where(allowed, near.cost(), np.inf).min(axis=1)
        worth = near.device * table.limits
        constant = near.given() - float(worth.sum()) + worth[-1]
        rests.append(np.concatenate((np.cumsum((least - worth[:-1])[::-1])[::-1], [0.0])) - constant)
        later = np.cumsum(near.device[::-1])[::-1]
        slopes.append(np.stack((later, np.full(len(later), near.host), np.full(len(later), near.link)), axis=1))
    return np.array(slopes), np.array(rests)


def _least_later(field: Floats, allowed: NDArray[np.bool_]) -> Floats:
    least = np.where(allowed, field, np.inf).min(axis=1)
    return np.concatenate((np.cumsum(least[::-1])[::-1], [0.0]))


def _trace(partial: Partial, position: int) -> Choice:
    choice: Choice = partial.single.copy()
    for row, parents, taken in zip(partial.rows[::-1], partial.parents[::-1], partial.taken[::-1], strict=True):
        choice[row] = taken[position]
        position = int(parents[position])
    return choice
