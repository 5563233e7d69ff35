"""What bytes are worth: prices under which each block can choose for itself.

With a price on the bytes held at each point of the step, on host memory and on the link, the best choice for each block is
independent of the others, and what it comes to is a bound that no choice can beat (Lagrangian duality; Everett 1963).
The prices that give a high bound are found by Newton's method: the least over the options of a block is smoothed, and
the smoothing is taken back step by step. The choices seen on the way are the first candidates, and what each option costs
above the best one of its block tells which options cannot be part of an optimum.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ckpt_trainer.choices import Choice, Floats, Table

# How often the smoothing is taken back, by which factor, and how many steps are made each time.
_STAGES = 7
_SHARPER = 0.2
_STEPS = 6
# How often a step that leads down is made shorter.
_SHORTER = 6
# The highest price of all bytes that there are, in units of what it begins with. Where nothing fits it has no end.
_HIGHEST = 1e4

# Numbers of what is scarce beyond the table's limits, which count from 0. The link has two: copies out and copies in.
_HOST, _FIRST, _SECOND = -1, -2, -3


@dataclass
class Prices:
    """Prices of all that is scarce, and the best that was found with them.

    Args:
        table: The options.
        device: Seconds for each byte, for each of the table's limits.
        host: Seconds for each byte of host memory.
        link: Seconds for each second on the link, from 0 to 2.
        bound: No choice takes less time.
        choice: The fastest choice seen that fits.
        best_time: Its time; infinite while there is none.
        evaluations: How many choices were looked at.
        middle: Stored bytes, host bytes and link seconds before each block and at the end, where blocks may be divided.
    """

    table: Table
    device: Floats
    host: float = 0.0
    link: float = 0.0
    bound: float = -np.inf
    bound_prices: tuple[Floats, float, float] = field(default=(np.zeros(1), 0.0, 0.0))
    choice: Choice = field(default_factory=lambda: np.zeros(0, dtype=np.intp))
    best_time: float = np.inf
    evaluations: int = 0
    middle: Floats = field(default_factory=lambda: np.zeros((3, 1)))

    def cost(self) -> Floats:
        """What each option costs under these prices."""
        table = self.table
        later = np.cumsum(self.device[::-1])[::-1]
        cost = table.seconds + table.stored * later[1:, None] + table.needed * self.device[:-1, None]
        if self.host:
            cost += table.host * self.host
        return np.asarray(cost + table.link * self.link if self.link else cost)

    def given(self) -> float:
        """What the limits themselves are worth under these prices: the bound is the blocks' cost less this."""
        first, second = self.table.hiding
        link = min(self.link, 1.0) * first + max(self.link - 1.0, 0.0) * second
        return float(self.device @ self.table.limits + self.host * self.table.host_limit + link)

    def choose(self) -> Choice:
        """The choice of each block under these prices; bound and best are kept up to date."""
        self.evaluations += 1
        cost = self.cost()
        choice: Choice = cost.argmin(axis=1)
        bound = float(cost[self.table.rows, choice].sum()) - self.given()
        if bound > self.bound:
            self.bound, self.bound_prices = bound, (self.device.copy(), self.host, self.link)
        if self.table.fits(choice):
            self.offer(choice)
        return choice

    def offer(self, choice: Choice) -> None:
        """Keep a choice that fits if it is the fastest so far."""
        time = self.table.time(choice)
        if time < self.best_time:
            self.choice, self.best_time = choice, time

    def rounded(self, near: float = 1.0) -> Choice:
        """For each block in turn the option that costs little and stays close to `middle`.

        Args:
            near: How much it matters to stay close, as a share of the price of what is away.
        """
        table, cost = self.table, self.cost()
        dearer = cost - cost.min(axis=1)[:, None]
        later = np.cumsum(self.device[::-1])[::-1][1:]
        price = near * np.stack((later, np.full(len(later), self.host), np.full(len(later), self.link)))
        steps = np.stack((table.stored, table.host, table.link)) * price[:, :, None]
        middle = np.diff(self.middle, axis=1) * price
        away, choice = np.zeros((3, 1)), np.zeros(len(cost), dtype=np.intp)
        for row in range(len(cost)):
            ahead = steps[:, row] + (away - middle[:, row, None])
            choice[row] = option = (dearer[row] + np.abs(ahead).sum(axis=0)).argmin()
            away = ahead[:, option, None]
        return choice

    def restore(self) -> None:
        """Go back to the prices of the bound."""
        device, self.host, self.link = self.bound_prices
        self.device = device.copy()


@dataclass
class _Scarce:
    """What has a price: how much of it each option uses, as shares of what there is, and its price for all there is."""

    which: list[int]
    uses: Floats
    worth: Floats
    highest: Floats

    def add(self, table: Table, which: int, worth: float) -> None:
        """One more, at a price to begin with."""
        uses, there = _uses(table, which)
        self.which.append(which)
        self.uses = np.concatenate((self.uses, uses[None] / there))
        self.worth = np.append(self.worth, min(worth, there / 2) if which <= _FIRST else worth)
        # What waits for the link costs its own time, for each direction, and no more.
        self.highest = np.append(self.highest, there if which <= _FIRST else _HIGHEST * worth)

    def ahead(self, before: Floats) -> Floats:
        """The prices after the next sharpening, as far as they go on as they went: in proportion to the smoothing."""
        ahead = self.worth + _SHARPER * (self.worth - before)
        return np.clip(ahead, 0.1 * self.worth, 0.5 * (self.worth + self.highest))


def find_prices(table: Table, known: float = np.inf) -> Prices:
    """Prices whose bound is high, and the best choice seen while they were found.

    Args:
        known: A bound that is this high is high enough: nothing below it beats what is known from elsewhere.
    """
    prices = Prices(table, np.zeros(len(table.limits)))
    prices.choose()
    there = np.isfinite(table.seconds)
    span = np.where(there, table.seconds, -np.inf).max(axis=1) - table.seconds.min(axis=1)
    smooth = float(span.mean() + table.link.max(axis=1).mean()) + 1e-12
    scarce = _Scarce([], np.zeros((0, *table.seconds.shape)), np.zeros(0), np.zeros(0))
    for which in _scarce_at_first(table):
        scarce.add(table, which, smooth * len(table.seconds) / 4)
    before = scarce.worth
    for _ in range(_STAGES):
        at = _smoothed(table, scarce, scarce.ahead(before), smooth)
        before = scarce.worth
        for _ in range(_STEPS):
            at, gain = _newton_step(table, scarce, smooth, at)
            if gain < 0.1 * smooth:
                break
        scarce.worth = at.worth
        _set(prices, scarce)
        prices.choose()
        slack = _slack(table, at.weights)
        missing = int(slack.argmin())
        if missing not in scarce.which and slack[missing] < 0:
            scarce.add(table, missing, smooth)
            before = scarce.worth
        smooth *= _SHARPER
        if prices.bound >= known:
            break
    means = [(field * at.weights).sum(axis=1) for field in (table.stored, table.host, table.link)]
    prices.middle = np.concatenate((np.zeros((3, 1)), np.cumsum(means, axis=1)), axis=1)
    prices.restore()
    return prices


def _slack(table: Table, weights: Floats) -> Floats:
    """Bytes that are free in each block and at the end of forward where blocks are divided."""
    held = np.concatenate(([0.0], np.cumsum((table.stored * weights).sum(axis=1))))
    held[:-1] += (table.needed * weights).sum(axis=1)
    return np.asarray(table.limits - held)


def _scarce_at_first(table: Table) -> list[int]:
    fastest = table.seconds.argmin(axis=1)
    worst = int(np.argmin(table.slack(fastest)))
    device = sorted({worst, len(table.limits) - 1})
    host = [_HOST] if table.host.any() and table.host_limit > 0 else []
    return device + host + ([_FIRST, _SECOND] if table.link.any() else [])


def _uses(table: Table, which: int) -> tuple[Floats, float]:
    """What each option uses of something, and how much there is of it."""
    if which == _HOST:
        return table.host, max(table.host_limit, 1.0)
    if which <= _FIRST:
        return table.link, max(table.hiding[_FIRST - which], 1e-9)
    return table.uses(which), max(float(table.limits[which]), 1.0)


@dataclass(frozen=True)
class _Point:
    """The smoothed bound at some prices, and how much of each option each block takes there."""

    worth: Floats
    value: float
    weights: Floats


def _smoothed(table: Table, scarce: _Scarce, worth: Floats, smooth: float) -> _Point:
    cost = table.seconds + (worth @ scarce.uses.reshape(len(worth), table.seconds.size)).reshape(table.seconds.shape)
    least = cost.min(axis=1, keepdims=True)
    weights = np.exp((least - cost) / smooth)
    total = weights.sum(axis=1, keepdims=True)
    away = float(np.log(worth * (scarce.highest - worth)).sum())
    value = float(least.sum() - worth.sum()) + smooth * (away - float(np.log(total).sum()))
    weights /= total
    return _Point(worth, value, weights)


def _newton_step(table: Table, scarce: _Scarce, smooth: float, at: _Point) -> tuple[_Point, float]:
    """One step up the smoothed bound, away from prices of 0 and from the highest; how much it promised to gain."""
    weighted = scarce.uses * at.weights
    used = weighted.sum(axis=2)
    number = len(at.worth)
    spread = weighted.reshape(number, -1) @ scarce.uses.reshape(number, -1).T - used @ used.T
    low, high = 1 / at.worth, 1 / (scarce.highest - at.worth)
    slope = used.sum(axis=1) - 1.0 + smooth * (low - high)
    step = np.linalg.solve(spread / smooth + smooth * np.diag(low**2 + high**2), slope)
    gain = float(slope @ step)
    length = min(1.0, 0.9 / max(float((-step * low).max()), float((step * high).max()), 1e-30))
    for _ in range(_SHORTER):
        after = _smoothed(table, scarce, at.worth + length * step, smooth)
        if after.value >= at.value + 0.1 * length * gain:
            break
        length *= 0.4
    return after, gain


def _set(prices: Prices, scarce: _Scarce) -> None:
    prices.device = np.zeros(len(prices.table.limits))
    prices.host = prices.link = 0.0
    for which, worth in zip(scarce.which, scarce.worth, strict=True):
        price = float(worth) / _uses(prices.table, which)[1]
        if which == _HOST:
            prices.host = price
        elif which <= _FIRST:
            prices.link += price
        else:
            prices.device[which] = price
