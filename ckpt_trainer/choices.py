"""The options of all blocks as arrays, and what a choice of one for each block comes to.

A choice is an array with one column number for each block. `prices` bounds what is possible, `search` finds the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt_trainer.step_costs import Option, StepCosts

Floats = NDArray[np.float64]
Choice = NDArray[np.intp]

# Copies that are hidden are not free for whoever else uses the link: of equal choices the one that copies less is better.
_TIE = 1e-7


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
    limits: Floats
    host_limit: float
    hiding: tuple[float, float]

    @property
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
        """Bytes that are free in each block and at the end of forward; negative where they are missing."""
        rows = self.rows
        held = np.concatenate(([0.0], np.cumsum(self.stored[rows, choice])))
        held[:-1] += self.needed[rows, choice]
        return np.asarray(self.limits - held)

    def fits(self, choice: Choice) -> bool:
        """Whether a choice stays within all limits."""
        return bool(self.slack(choice).min() >= 0 and self.host[self.rows, choice].sum() <= self.host_limit)

    def uses(self, limit: int) -> Floats:
        """What each option adds to what is held at one of the limits."""
        uses = np.zeros_like(self.stored)
        uses[:limit] = self.stored[:limit]
        if limit < len(uses):
            uses[limit] = self.needed[limit]
        return uses

    def roofs(self, allowed: NDArray[np.bool_]) -> Floats:
        """The most bytes that may be held before each block so that it and all later ones can still fit."""
        roof = np.empty(len(self.limits))
        roof[-1] = self.limits[-1]
        stored = np.where(allowed, self.stored, np.inf)
        own = np.where(allowed, self.limits[:-1, None] - self.needed, -np.inf)
        for row in range(len(stored) - 1, -1, -1):
            roof[row] = np.minimum(roof[row + 1] - stored[row], own[row]).max()
        return roof


def make_table(costs: StepCosts, budget_bytes: int, copies: bool) -> Table:
    """The options that can be of use within a budget, as arrays.

    Args:
        copies: Whether options may copy; where they may, the bytes of copies in flight are taken from the budget.
    """
    # Blocks of one class share a tuple: comparing the options themselves would take longer than all of the rest.
    classes = {id(block.options): block.options for block in costs.blocks}
    useful = {key: _useful(options, costs, copies) for key, options in classes.items()}
    packed = {key: _numbers([classes[key][number] for number in numbers], costs) for key, numbers in useful.items()}
    columns = [useful[id(block.options)] for block in costs.blocks]
    width = max((len(one) for one in columns), default=1)
    shape = (len(costs.blocks), width)
    fields = np.zeros((6, *shape))
    fields[0] = np.inf
    column = np.zeros(shape, dtype=np.intp)
    for row, block in enumerate(costs.blocks):
        used = len(columns[row])
        fields[:, row, :used] = packed[id(block.options)]
        column[row, :used] = columns[row]
    seconds, stored, forward, backward, host, link = fields
    needed = np.maximum(forward, backward + np.array(costs.grown_bytes(), dtype=float).reshape(-1, 1))
    room = budget_bytes - costs.base_bytes - (costs.staging_bytes if copies else 0)
    limits = np.full(len(costs.blocks) + 1, float(room))
    limits[-1] -= costs.head_bytes
    first, second = sorted(costs.hiding_seconds())
    return Table(seconds, stored, needed, host, link, column, limits, float(costs.host_budget_bytes), (first, second))


def _numbers(options: Sequence[Option], costs: StepCosts) -> Floats:
    speed = costs.link_bytes_per_second or 1.0
    rows = [
        (one.seconds, one.stored_bytes, one.forward_bytes, one.backward_bytes, one.host_bytes, one.link_bytes / speed)
        for one in options
    ]
    numbers: Floats = np.array(rows, dtype=np.float64).reshape(-1, 6).T
    return numbers


def _useful(options: tuple[Option, ...], costs: StepCosts, copies: bool) -> list[int]:
    """Without those that cannot be carried out, and those that another is as good as in every way."""
    there = [number for number, option in enumerate(options) if _possible(option, costs, copies)]
    numbers = _numbers([options[number] for number in there], costs).T
    as_good = (numbers[:, None, :] <= numbers[None, :, :]).all(axis=2)
    # Of two that are equal the earlier one stays.
    better = as_good & (~as_good.T | np.triu(np.ones_like(as_good), 1))
    return [number for number, beaten in zip(there, better.any(axis=0), strict=True) if not beaten]


def _possible(option: Option, costs: StepCosts, copies: bool) -> bool:
    if option.link_bytes and not (copies and costs.link_bytes_per_second):
        return False
    return option.host_bytes <= costs.host_budget_bytes
