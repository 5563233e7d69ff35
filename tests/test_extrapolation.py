"""What probes would show of a size that was not probed: exact where bytes grow evenly, and nothing where they do not."""

import pytest

from ckpt_trainer.costs import Probed, Sample
from ckpt_trainer.extrapolation import extrapolated_probes
from ckpt_trainer.measured import BlockBytes, StepBytes
from ckpt_trainer.plan import KEEP, RECOMPUTE, Action, Plan

MIB = 2**20
MATMUL = Action("selective", save=("matmul",))
NAMES = ("a", "b")


def ids(rows, length):
    return (("input_ids", (rows, length)), ("labels", (rows, length)))


def levels(tokens, share, quadratic=0.0):
    """Of an action: a constant, and so much for each token and each pair of them; backward holds all that can be stored."""
    grown = tokens * 8192 + quadratic * tokens**2
    return tuple(int(MIB * number / 8 + part * grown) for number, part in enumerate((share, share + 0.1, 1.3)))


def step_of(tokens, quadratic=0.0, names=NAMES):
    own = levels(tokens, 0.1, quadratic)
    blocks = {name: BlockBytes(*own, 0, 1e-6 * tokens + 1e-9 * tokens**2, 2e-6 * tokens) for name in names}
    return StepBytes(blocks, 0, 0, 0, 0, 0, 0)


def sample_of(tokens, quadratic=0.0, **options):
    probes = {
        "a": {
            KEEP: Probed(levels(tokens, 1.0, quadratic), 3e-6 * tokens, 1e-6 * tokens),
            MATMUL: Probed(levels(tokens, 0.5, quadratic), 3.5e-6 * tokens, 1e-6 * tokens),
            RECOMPUTE: Probed(levels(tokens, 0.1, quadratic), 4e-6 * tokens, 1e-6 * tokens),
        }
    }
    plan = Plan(dict.fromkeys(NAMES, RECOMPUTE))
    return Sample(plan, step_of(tokens, quadratic, **options), dict.fromkeys(NAMES, "a"), probes, 0, False)


def samples(*sizes, quadratic=0.0):
    return {ids(2, length): sample_of(2 * length, quadratic) for length in sizes}


@pytest.mark.parametrize("length", [300, 450, 1000, 50])
def test_what_grows_evenly_is_exact_beyond_between_and_below(length):
    known = samples(100, 400) if length != 50 else samples(40, 400)
    found = extrapolated_probes(ids(2, length), step_of(2 * length), known)
    assert set(found) == {"a"}
    for action, share in ((KEEP, 1.0), (RECOMPUTE, 0.1)):
        exact = levels(2 * length, share)
        assert all(abs(own - other) <= 2 for own, other in zip(found["a"][action].levels, exact, strict=True))


@pytest.mark.parametrize("length", [500, 900])
def test_what_grows_by_the_square_is_exact_from_the_fourth_size_on(length):
    found = extrapolated_probes(ids(2, length), step_of(2 * length, 3.0), samples(100, 250, 400, quadratic=3.0))
    for action, share in ((KEEP, 1.0), (RECOMPUTE, 0.1)):
        exact = levels(2 * length, share, 3.0)
        assert all(abs(own - other) <= 30 for own, other in zip(found["a"][action].levels, exact, strict=True))


def test_rows_count_as_length_does():
    known = {ids(2, 100): sample_of(200), ids(4, 100): sample_of(400)}
    assert extrapolated_probes(ids(3, 300), step_of(900), known)


def test_times_follow_what_the_block_took():
    length = 1000
    found = extrapolated_probes(ids(2, length), step_of(2 * length), samples(100, 400))
    # A square in the time of the step is in that of all actions.
    way = (length - 100) / (400 - 100)
    low, high, own = (3e-6 * n + 1e-9 * n**2 for n in (200, 800, 2000))
    slower = own / (low + way * (high - low))
    assert slower > 1.1
    assert found["a"][KEEP].seconds == pytest.approx(3e-6 * 2000 * slower)
    assert found["a"][KEEP].forward_seconds == pytest.approx(1e-6 * 2000 * slower)


@pytest.mark.parametrize(
    ("size", "step", "known"),
    [
        pytest.param(ids(2, 900), step_of(1800, 3.0), samples(100, 400, quadratic=3.0), id="scores, two sizes"),
        pytest.param(ids(2, 900), step_of(1800), samples(100, 200, 400, quadratic=3.0), id="scores no more"),
        pytest.param(ids(2, 4000), step_of(8000, 3.0), samples(100, 200, 400, quadratic=3.0), id="scores, too far"),
        pytest.param(ids(2, 900), step_of(1800), samples(400), id="one size"),
        pytest.param(ids(2, 9000), step_of(18000), samples(390, 400), id="too far"),
        pytest.param(ids(2, 30), step_of(60), samples(100, 400), id="below both"),
        pytest.param(ids(2, 900), step_of(1800, names=("a",)), samples(100, 400), id="other blocks"),
        pytest.param((("x", (2, 900)),), step_of(1800), samples(100, 400), id="other inputs"),
        pytest.param(
            (("input_ids", (2, 900)), ("labels", (2, 1))), step_of(1800), samples(100, 400), id="inputs that part ways"
        ),
    ],
)
def test_where_two_sizes_do_not_tell_nothing_is_said(size, step, known):
    assert extrapolated_probes(size, step, known) == {}


def test_inputs_of_one_size_may_be_beside_those_that_grow():
    def size(length):
        return (*ids(2, length), ("pixels", (2, 3, 8, 8)))

    known = {size(length): sample_of(2 * length) for length in (100, 400)}
    assert extrapolated_probes(size(900), step_of(1800), known)
    other = (*ids(2, 900), ("pixels", (2, 3, 8, 9)))
    assert extrapolated_probes(other, step_of(1800), known) == {}


def test_another_pair_is_tried_where_the_nearest_does_not_tell():
    known = samples(100, 200)
    known[ids(2, 400)] = sample_of(800, quadratic=50.0)
    assert extrapolated_probes(ids(2, 900), step_of(1800), known)


def test_blocks_that_hold_more_than_they_can_store_do_not_tell():
    known = samples(100, 400)
    for sample in known.values():
        sample.probes["a"][KEEP] = sample.probes["a"][MATMUL]
    assert extrapolated_probes(ids(2, 900), step_of(1800), known) == {}


def test_actions_that_were_not_probed_in_both_are_not_made_up():
    known = samples(100, 400)
    del known[ids(2, 100)].probes["a"][MATMUL]
    assert extrapolated_probes(ids(2, 900), step_of(1800), known) == {}
