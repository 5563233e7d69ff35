"""The free parts of a line, against a naive model of it."""

import gc
import random
import threading
from collections import deque

import pytest

from ckpt_trainer.extents import UNIT, Extents, Taken, drain, rounded_up


class Naive:
    """One letter for each unit of the line."""

    def __init__(self, units):
        self.free = [True] * units

    def runs(self):
        """(length, start) of the free parts, in units."""
        runs, start = [], None
        for at, free in enumerate([*self.free, False]):
            if free and start is None:
                start = at
            elif not free and start is not None:
                runs.append((at - start, start))
                start = None
        return runs

    def set(self, offset, length, free):
        units = range(offset // UNIT, (offset + rounded_up(length)) // UNIT)
        assert all(self.free[unit] is not free for unit in units)
        for unit in units:
            self.free[unit] = free


def state(extents):
    return sorted((length // UNIT, offset // UNIT) for length, offset in extents._sizes)


def agree(extents, naive):
    assert state(extents) == sorted(naive.runs())
    assert extents._offsets == sorted(extents._lengths) == sorted(offset for _, offset in extents._sizes)
    assert extents.free == sum(naive.free) * UNIT
    assert extents.length == len(naive.free) * UNIT


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_agree_with_a_naive_model(seed):
    rng = random.Random(seed)
    extents, naive, taken = Extents(40 * UNIT), Naive(40), []
    for _ in range(300):
        kind = rng.choice(["take", "take", "parts", "largest", "give", "give", "give", "grow"])
        length = rng.randint(1, 12 * UNIT)
        units = rounded_up(length) // UNIT
        runs = naive.runs()
        fitting = [run for run in runs if run[0] >= units]
        if kind == "take":
            offset = extents.take(length)
            assert offset == (min(fitting)[1] * UNIT if fitting else None)
            parts = [] if offset is None else [(offset, length)]
        elif kind == "largest":
            part = extents.take_largest(length)
            assert (part is None) == (not runs)
            assert part is None or part[1] == min(units, max(runs)[0]) * UNIT
            parts = [part] if part else []
        elif kind == "parts":
            parts = extents.take_parts(length)
            assert (parts is None) == (units > sum(naive.free))
            parts = parts or []
            assert not parts or sum(size for _, size in parts) == units * UNIT
            assert not fitting or len(parts) == 1
        elif kind == "give" and taken:
            part = taken.pop(rng.randrange(len(taken)))
            extents.give_back(*part)
            naive.set(*part, free=True)
            parts = []
        else:
            parts = []
            if kind == "grow" and len(naive.free) < 80:
                extents.grow(3 * UNIT)
                naive.free += [True] * 3
        for part in parts:
            naive.set(*part, free=False)
            taken.append(part)
        agree(extents, naive)
    for part in taken:
        extents.give_back(*part)
    assert state(extents) == [(len(naive.free), 0)]


def test_parts_are_as_few_as_there_can_be():
    extents = Extents(20 * UNIT)
    assert extents.take(20 * UNIT) == 0
    for start, length in ((0, 1), (2, 5), (8, 2), (11, 4), (16, 3)):
        extents.give_back(start * UNIT, length * UNIT)
    # 5 and 4 of the largest, then the smallest that holds the last one.
    assert extents.take_parts(10 * UNIT) == [(2 * UNIT, 5 * UNIT), (11 * UNIT, 4 * UNIT), (0, UNIT)]
    assert extents.take_parts(6 * UNIT) is None
    assert extents.free == 5 * UNIT


def test_lengths_are_rounded_up_both_ways():
    extents = Extents(3 * UNIT)
    assert (extents.take(1), extents.take(UNIT + 1), extents.take(1)) == (0, UNIT, None)
    extents.give_back(UNIT, UNIT + 1)
    assert extents.free == 2 * UNIT
    assert extents.take_largest(UNIT + 7) == (UNIT, 2 * UNIT)
    assert extents.take_largest(1) is None


def test_an_empty_line_has_nothing_and_grows():
    extents = Extents()
    assert (extents.length, extents.free, extents.take(1), extents.take_largest(1)) == (0, 0, None, None)
    extents.grow(UNIT)
    extents.grow(UNIT)
    assert extents.take(2 * UNIT) == 0


@pytest.mark.parametrize("part", [(0, 1), (3, 1), (1, 3), (0, 2), (4, 1), (-1, 1), (1, 0)])
def test_what_is_free_cannot_be_given_back(part):
    extents = Extents(4 * UNIT)
    extents.take(4 * UNIT)
    extents.give_back(0, UNIT)
    extents.give_back(3 * UNIT, UNIT)
    with pytest.raises(AssertionError):
        extents.give_back(part[0] * UNIT, part[1] * UNIT)
    assert extents.free == 2 * UNIT
    assert state(extents) == [(1, 0), (1, 3)]


def test_odd_growth_and_empty_takes_are_refused():
    extents = Extents(UNIT)
    for call in (
        lambda: extents.grow(UNIT + 1),
        lambda: extents.grow(0),
        lambda: extents.take(0),
        lambda: extents.take_largest(0),
    ):
        with pytest.raises(AssertionError):
            call()
    assert (extents.length, extents.free) == (UNIT, UNIT)


def test_parts_go_back_once():
    extents, returned = Extents(4 * UNIT), deque()
    taken = Taken(extents.take_parts(2 * UNIT), returned)
    taken.give_back()
    taken.give_back()
    del taken
    assert list(returned) == [(0, 2 * UNIT)]
    drain(returned, extents)
    assert extents.free == 4 * UNIT
    assert not returned


def test_parts_go_back_when_their_owner_is_collected():
    returned = deque()
    gc.disable()
    try:
        Taken([(0, UNIT), (2 * UNIT, UNIT)], returned)
    finally:
        gc.enable()
    assert sorted(returned) == [(0, UNIT), (2 * UNIT, UNIT)]


def test_threads_that_give_back_at_once_do_not_double_the_parts():
    parts, returned = [(at * UNIT, UNIT) for at in range(200)], deque()
    for _ in range(20):
        returned.clear()
        taken, start = Taken(parts, returned), threading.Barrier(4)
        threads = [threading.Thread(target=lambda: (start.wait(), taken.give_back())) for _ in range(4)]  # noqa: B023
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(returned) == parts
