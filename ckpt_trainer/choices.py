"""The options of all blocks as arrays, and what a choice of one for each block comes to.

A choice is an array with one column number for each block. `prices` bounds what is possible, `search` finds the best.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt_trainer.step_costs import StepCosts

Floats = NDArray[np.float64]
Choice = NDArray[np.intp]

# Copies that are hidden are not free for whoever else uses the link: of equal choices the one that copies less is better.
_TIE = 1e-7

_numbers = attrgetter("seconds", "stored_bytes", "forward_bytes", "backward_bytes", "host_bytes", "link_bytes")


@dataclass(frozen=True)
class Table:
    """What each option costs: arrays of blocks x options, padded with options that take infinite time.

    Args:
        seconds: Extra time, copies excepted.
        stored: Bytes held after the block's forward.
        needed: The most bytes of the block's own forward and backward above what earlier blocks hold, gradients included.
        host: Bytes of host memory.
        link: Seconds on the link in each direction.
        column: The number of the option in the block's own tuple.
        classes: The number of each block's class; blocks of one have the same options.
        limits: Bytes that may be held before each block with its own need, and at the end of forward.
        host_limit: Bytes of host memory that there are.
        hiding: Seconds of compute that hide copies, ascending.
    """

    seconds: Floats
    stored: Floats
    needed: Floats
    host: Floats
    link: Floats
    column: Choice
    classes: Choice
    limits: Floats
    host_limit: float
    hiding: tuple[float, float]

    @cached_property
    def rows(self) -> Choice:
        """The number of each block."""
        return np.arange(len(self.seconds))

    def of(self, choice: Choice) -> list[int]:
        """The number of the chosen option in each block's own tuple."""
        return [int(column) for column in self.column[self.rows, choice]]

    def exposed(self, link: Any) -> Any:
        """Time that the step waits for copies of so many seconds."""
        first, second = self.hiding
        return np.maximum(0.0, link - first) + np.maximum(0.0, link - second) + _TIE * link

    def time(self, choice: Choice) -> float:
        """Extra time of a choice."""
        rows = self.rows
        return float(self.seconds[rows, choice].sum() + self.exposed(self.link[rows, choice].sum()))

    def slack(self, choice: Choice) -> Floats:
        """Bytes that are free in each block and at the end of forward; negative where they are missing.

        Args:
            choice: One, or several as rows.
        """
        rows = self.rows
        held = np.zeros((*choice.shape[:-1], len(rows) + 1))
        np.cumsum(self.stored[rows, choice], axis=-1, out=held[..., 1:])
        held[..., :-1] += self.needed[rows, choice]
        return np.asarray(self.limits - held)

    def fits(self, choice: Choice) -> bool:
        """Whether a choice stays within all limits."""
        return bool(self.slack(choice).min() >= 0 and self.host[self.rows, choice].sum() <= self.host_limit)

    def can_fit(self) -> bool:
        """Whether any choice stays within the limits of the device."""
        there = np.isfinite(self.seconds)
        least_stored = np.where(there, self.stored, np.inf).argmin(axis=1)
        return bool(self.slack(least_stored).min() >= 0 or self.roofs(there)[0] >= 0)

    def uses(self, limit: int) -> Floats:
        """What each option adds to what is held at one of the limits."""
        uses = np.zeros_like(self.stored)
        uses[:limit] = self.stored[:limit]
        if limit < len(uses):
            uses[limit] = self.needed[limit]
        return uses

    def roofs(self, allowed: NDArray[np.bool_]) -> Floats:
        """The most bytes that may be held before each block so that it and all later ones can still fit."""
        first, single = allowed.argmax(axis=1), allowed.sum(axis=1) == 1
        stored = np.where(allowed, self.stored, np.inf)
        own = np.where(allowed, self.limits[:-1, None] - self.needed, -np.inf)
        # Most blocks have one option where it matters: plain numbers are faster than arrays of one.
        only_stored, only_own = (field[self.rows, first].tolist() for field in (stored, own))
        roof = [float(self.limits[-1])]
        for row in range(len(stored) - 1, -1, -1):
            if single[row]:
                roof.append(min(roof[-1] - only_stored[row], only_own[row]))
            else:
                roof.append(float(np.minimum(roof[-1] - stored[row], own[row]).max()))
        return np.array(roof[::-1])


@dataclass(frozen=True)
class Offers:
    """What all options of all blocks cost, as arrays; blocks whose options cost the same are one class.

    Args:
        numbers: For seconds, stored, forward, backward, host and link bytes an array of classes x options.
        there: Which of these are options, and which are padding.
        classes: The number of each block's class.
    """

    numbers: Floats
    there: NDArray[np.bool_]
    classes: Choice


def make_offers(costs: StepCosts) -> Offers:
    """The options of a step as arrays; made once for all tables."""
    # Most blocks of one class share a tuple: comparing what it holds would take longer than all of the rest.
    tuples = {id(block.options): block.options for block in costs.blocks}
    width = max(map(len, tuples.values()), default=1)
    padding = [(np.inf,) * 6]
    rows = [[*map(_numbers, options), *(padding * (width - len(options)))] for options in tuples.values()]
    numbers = np.array(rows, dtype=np.float64).reshape(-1, width, 6)
    found: dict[bytes, int] = {}
    class_of = {key: found.setdefault(row.tobytes(), len(found)) for key, row in zip(tuples, numbers, strict=True)}
    first = np.unique([*class_of.values()], return_index=True)[1] if tuples else np.zeros(0, dtype=np.intp)
    classes = np.array([class_of[id(block.options)] for block in costs.blocks], dtype=np.intp)
    numbers = numbers[first].transpose(2, 0, 1)
    return Offers(numbers, np.isfinite(numbers[1]), classes)


def make_table(costs: StepCosts, offers: Offers, budget_bytes: int, copies: bool) -> Table:
    """The options that can be of use within a budget, as arrays.

    Args:
        copies: Whether options may copy; where they may, the bytes of copies in flight are taken from the budget.
    """
    seconds, stored, forward, backward, host, link = offers.numbers
    moves = copies and costs.link_bytes_per_second > 0
    there = offers.there & (host <= costs.host_budget_bytes) & (moves | (link == 0))
    useful = there & ~_beaten(offers.numbers, there)
    width = max(1, int(useful.sum(axis=1).max(initial=0)))
    # Those of use first, in their own order.
    columns = np.argsort(~useful, axis=1, kind="stable")[:, :width]
    used = np.take_along_axis(useful, columns, axis=1)
    picked = np.where(used, np.take_along_axis(offers.numbers, columns[None], axis=2), 0.0)
    picked[0][~used] = np.inf
    picked[5] /= costs.link_bytes_per_second or 1.0
    seconds, stored, forward, backward, host, link = picked[:, offers.classes]
    needed = np.maximum(forward, backward + np.array(costs.grown_bytes(), dtype=float).reshape(-1, 1))
    room = budget_bytes - costs.base_bytes - (costs.staging_bytes if copies else 0)
    limits = np.full(len(costs.blocks) + 1, float(room))
    limits[-1] -= costs.head_bytes
    first, second = sorted(costs.hiding_seconds())
    classes, column = offers.classes, columns[offers.classes]
    arrays = (seconds, stored, needed, host, link, column, classes, limits)
    return Table(*arrays, float(costs.host_budget_bytes), (first, second))


def _beaten(numbers: Floats, there: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which options of each class another one is as good as in every way."""
    as_good = there[:, :, None] & there[:, None, :]
    for field in numbers:
        as_good &= field[:, :, None] <= field[:, None, :]
    # Of two that are equal the earlier one stays.
    earlier = np.triu(np.ones(as_good.shape[1:], dtype=bool), 1)
    return np.asarray((as_good & (~as_good.transpose(0, 2, 1) | earlier)).any(axis=1))
