"""Making a choice better by changes of one block, or of two at once of which one pays for the other."""

from __future__ import annotations

import numpy as np

from ckpt_trainer.choices import Choice, Floats, Table

# How many single changes are tried in pairs, and how many of the promising pairs are looked at closely.
_PAIRED = 64
_CLOSELY = 12
_ROUNDING = 1e-12


def improve(table: Table, choice: Choice, cost: Floats) -> Choice:
    """A choice that fits, made faster until no change of one block helps and none of the pairs that were tried.

    Args:
        cost: What each option costs under prices of all that is scarce; pairs are made of changes that cost least.
    """
    choice = choice.copy()
    least_gain = _ROUNDING * (abs(table.time(choice)) + 1e-30)
    while _change_one(table, choice, least_gain) or _change_two(table, choice, cost, least_gain):
        pass
    return choice


def _change_one(table: Table, choice: Choice, least_gain: float) -> bool:
    rows = table.rows
    slack = table.slack(choice)
    later = np.minimum.accumulate(slack[::-1])[::-1][1:]
    link, host = table.link[rows, choice], table.host[rows, choice]
    fits = table.stored - table.stored[rows, choice][:, None] <= later[:, None]
    fits &= table.needed - table.needed[rows, choice][:, None] <= slack[:-1, None]
    fits &= table.host - host[:, None] <= table.host_limit - host.sum()
    waiting = table.exposed(link.sum() - link[:, None] + table.link) - table.exposed(link.sum())
    time = np.where(fits, table.seconds - table.seconds[rows, choice][:, None] + waiting, np.inf)
    row, option = np.unravel_index(int(time.argmin()), time.shape)
    if time[row, option] >= -least_gain:
        return False
    choice[row] = option
    return True


def _change_two(table: Table, choice: Choice, cost: Floats, least_gain: float) -> bool:
    rows = table.rows
    dearer = cost - cost[rows, choice][:, None]
    dearer[rows, choice] = np.inf
    row, option = _least(np.abs(dearer), _PAIRED)
    stored, host, link, seconds = (
        field[row, option] - field[row, choice[row]] for field in (table.stored, table.host, table.link, table.seconds)
    )
    copied, there = table.link[rows, choice].sum(), table.host_limit - table.host[rows, choice].sum()
    time = seconds[:, None] + seconds + table.exposed(copied + link[:, None] + link) - table.exposed(copied)
    fits = (stored[:, None] + stored <= table.slack(choice)[-1]) & (host[:, None] + host <= there)
    fits &= row[:, None] < row
    first, second = np.nonzero(fits & (time < -least_gain))
    pairs = np.argsort(time[first, second], kind="stable")[:_CLOSELY]
    if not len(pairs):
        return False
    changed = np.tile(choice, (len(pairs), 1))
    for change in (first[pairs], second[pairs]):
        changed[np.arange(len(pairs)), row[change]] = option[change]
    found = np.flatnonzero(table.slack(changed).min(axis=1) >= 0)
    if len(found):
        choice[:] = changed[found[0]]
    return bool(len(found))


def _least(values: Floats, number: int) -> tuple[Choice, Choice]:
    """Where the least values are, in ascending order; no more than there are finite ones."""
    flat = values.ravel()
    # The value, not the place, is what a partition gives alike on every machine.
    highest = np.partition(flat, number)[number] if len(flat) > number else np.inf
    candidates = np.flatnonzero((flat <= highest) & np.isfinite(flat))
    order = candidates[np.argsort(flat[candidates], kind="stable")[:number]]
    row, column = np.unravel_index(order, values.shape)
    return row, column


def repair(table: Table, choice: Choice, cost: Floats) -> Choice | None:
    """A choice changed until it fits: each time what costs least for what it frees where most is missing.

    Returns:
        None where that leads nowhere.
    """
    choice, rows = choice.copy(), table.rows
    for _ in range(2 * len(choice)):
        slack = table.slack(choice)
        worst = int(slack.argmin())
        missing, uses = -slack[worst], table.uses(worst)
        over_host = float(table.host[rows, choice].sum() - table.host_limit)
        if missing <= 0:
            if over_host <= 0:
                return choice
            missing, uses = over_host, table.host
        freed = np.minimum(uses[rows, choice][:, None] - uses, missing)
        dearer = cost - cost[rows, choice][:, None]
        price = np.where(freed > 0, dearer, np.inf) / np.maximum(freed, 1e-9)
        row, option = np.unravel_index(int(price.argmin()), price.shape)
        if not np.isfinite(price[row, option]):
            return None
        choice[row] = option
    return None
