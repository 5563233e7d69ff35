"""The fastest choice that fits: block by block in forward order, with all partial choices that may still become it.

A partial choice is dropped where it can no longer fit, where another one holds no more of anything and is no slower, or
where its bound (see `prices`) says that it cannot beat the best choice known. What is left is small: most options cost so
much above the best of their block that they are out before the search begins. If more are left than may go on, those with
the lowest bounds do, and the answer is no longer known to be the optimum; the lowest bound that was lost says how close
it is.
"""

from __future__ import annotations

from dataclasses import dataclass

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
# How many of the choices at the end of a walk are improved.
_FINISHED = 4
# An answer that is proven to be this close is good enough where there are more blocks than this.
_CLOSE, _SMALL = 5e-3, 32
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
        parents: For each block the position of each partial choice's predecessor.
        taken: For each block the option each took.
    """

    sums: Floats
    parents: list[Choice]
    taken: list[Choice]


@dataclass(frozen=True)
class Found:
    """What the search found.

    Args:
        bound: No choice takes less time.
        partials: How many partial choices were made.
    """

    bound: float
    partials: int


def search(prices: Prices, known: float, tolerance: float) -> Found:
    """The fastest choice, from what is known from the prices, which keep it.

    Args:
        known: The time of a choice that is known from elsewhere; slower ones are of no use.
        tolerance: Seconds of waiting for copies that are not worth a search.
    """
    partials, bound = 0, prices.bound
    if not _copies(prices.table):
        tolerance = 0.0
    close = _CLOSE if len(prices.table.seconds) > _SMALL else 0.0
    for width, straight in _walks(prices.table):
        known = min(known, prices.best_time)
        target = known - max(tolerance, _ROUNDING * abs(known))
        if prices.bound >= target or bound >= known * (1 - close):
            break
        lost, made = _pass(prices, width, straight, target)
        bound, partials = max(bound, min(lost, prices.best_time, known)), partials + made
    return Found(min(max(bound, prices.bound), prices.best_time), partials)


def _walks(table: Table) -> list[tuple[int, float]]:
    """How many partial choices go on, and how straight, in the first walk over the blocks and in a second if need be."""
    narrow, wide = (_NARROW, _WIDE) if _copies(table) else (_NARROW_ALONE, _WIDE_ALONE)
    wide //= len(table.seconds) ** 2
    return [(narrow, _STRAIGHT), *([(wide, 0.0)] if wide > 2 * narrow else [])]


def _copies(table: Table) -> bool:
    return bool(table.link.any() or table.host.any())


def _pass(prices: Prices, width: int, straight: float, target: float) -> tuple[float, int]:
    """One walk over the blocks; the least bound of what was dropped without proof, and how many were made."""
    table = prices.table
    cost = prices.cost()
    dearer = cost - cost.min(axis=1)[:, None]
    allowed = (dearer + prices.bound < target) & np.isfinite(table.seconds)
    roof = table.roofs(allowed)
    if not allowed.any(axis=1).all() or roof[0] < 0:
        return np.inf, 0
    partial, lost, made = _walk(prices, allowed, roof, target, width, straight)
    times = partial.sums[3] + table.exposed(partial.sums[2])
    for position in np.argsort(times, kind="stable")[:_FINISHED]:
        prices.offer(improve(table, _trace(partial, int(position)), cost))
    return lost, made


def _walk(
    prices: Prices, allowed: NDArray[np.bool_], roof: Floats, target: float, width: int, straight: float
) -> tuple[Partial, float, int]:
    table = prices.table
    with_copies = bool(table.link[allowed].any() or table.host[allowed].any())
    slopes, rests = _bounds(prices, allowed, with_copies)
    lost, made = np.inf, 0
    partial = Partial(np.zeros((4, 1)), [], [])
    spare_host = table.host_limit - _least_later(table.host, allowed)
    steps = np.stack((table.stored, table.host, table.link, table.seconds))
    for row in range(len(table.seconds)):
        options = np.flatnonzero(allowed[row])
        if len(options) == 1:
            partial.sums = partial.sums + steps[:, row, options]
            partial.parents.append(np.arange(partial.sums.shape[1]))
            partial.taken.append(np.broadcast_to(options, partial.sums.shape[1]))
            continue
        sums, parents, number = _extend(partial, steps[:, row, options])
        keep = (sums[0] <= roof[row + 1]) & (sums[1] <= spare_host[row + 1])
        taken = options[number]
        keep &= partial.sums[0, parents] + table.needed[row, taken] <= table.limits[row]
        bounds = sums[3] + (slopes[:, row + 1] @ sums[:3] + rests[:, row + 1, None]).max(axis=0)
        keep &= bounds < target
        away = slopes[0, row + 1] @ np.abs(sums[:3] - prices.middle[:, row + 1, None])
        keep, dropped = _thin(sums, keep, bounds, bounds + straight * away, with_copies, width)
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
    choice = np.empty(len(partial.taken), dtype=np.intp)
    for row in range(len(choice) - 1, -1, -1):
        choice[row] = partial.taken[row][position]
        position = int(partial.parents[row][position])
    return choice
