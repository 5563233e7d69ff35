"""Sizes of micro-batches: that what is known of one bounds what is said of another, whatever the bytes grow with."""

import random
from collections import UserDict

import pytest
import torch

from ckpt_trainer.sizes import bucket_of, covers, describe, growth, is_like, share, size_of, terms


def ids(rows, length, name="input_ids"):
    return ((name, (rows, length)),)


def random_size(random):
    return (
        ("pixels", (random.randint(1, 4), 3, random.randint(8, 40), random.randint(8, 40))),
        ("ids", (random.randint(1, 9), random.randint(1, 300))),
        ("flag", ()),
    )


def random_polynomial(random):
    """Bytes of a step: a constant, and what grows with the elements of each input and with those times the longest."""
    constant = random.choice([0, random.randint(0, 10**6)])
    factors = [random.choice([0, 0, random.random() * 10 ** random.randint(0, 4)]) for _ in range(4)]
    return lambda size: constant + sum(f * term for f, term in zip(factors, terms(size), strict=True))


def sizes_in_order(random, number):
    """Sizes of which each covers the one before."""
    drawn = [random_size(random) for _ in range(number)]
    sorted_dims = [
        [sorted(dims) for dims in zip(*(size[i][1] for size in drawn), strict=True)] for i in range(len(drawn[0]))
    ]
    return [
        tuple((name, tuple(dims[n] for dims in sorted_dims[i])) for i, (name, _) in enumerate(drawn[0]))
        for n in range(number)
    ]


def test_the_terms_are_elements_and_elements_times_the_longest():
    size = (("ids", (2, 10)), ("pixels", (1, 3, 4, 5)), ("scalar", ()))
    assert terms(size) == (20, 60, 200, 600)


def test_a_number_in_a_tensor_is_no_size():
    """Hugging Face's trainer hands one to the model, by which no batch would be shorter than another."""
    low, high = ((*ids(2, length), ("num_items_in_batch", ())) for length in (10, 40))
    assert share(None, high, low) == 0.25


def test_rows_do_not_count_as_length():
    assert terms(ids(50, 10)) == (500, 5000)
    assert terms((("labels", (50,)),)) == (50, 50)


def test_share_bounds_what_lies_between():
    draw, strict = random.Random(0), 0
    for _ in range(500):
        low, size, high = sizes_in_order(draw, 3)
        bytes_of, part = random_polynomial(draw), share(low, high, size)
        assert 0 <= part <= 1
        bound = bytes_of(low) + part * (bytes_of(high) - bytes_of(low))
        assert bytes_of(size) <= bound * (1 + 1e-9) + 1e-6
        strict += part < 0.9
    assert strict > 100  # it is no bound of everything by the highest


def test_share_of_a_size_of_nothing_bounds_what_has_no_constant():
    draw = random.Random(1)
    for _ in range(500):
        size, high = sizes_in_order(draw, 2)
        bytes_of = random_polynomial(draw)
        constant = bytes_of((("pixels", (0, 3, 1, 1)), ("ids", (0, 1)), ("flag", ())))
        without = [of(s) - constant for of, s in ((bytes_of, size), (bytes_of, high))]
        assert without[0] <= share(None, high, size) * without[1] * (1 + 1e-9) + 1e-6


def test_growth_bounds_what_lies_above():
    draw = random.Random(2)
    for _ in range(500):
        low, size = sizes_in_order(draw, 2)
        bytes_of = random_polynomial(draw)
        assert bytes_of(size) <= growth(low, size) * bytes_of(low) * (1 + 1e-9) + 1e-6


def test_the_bounds_are_reached():
    """By what grows with the fastest term alone; no smaller number would do."""
    low, size, high = ids(2, 10), ids(2, 20), ids(2, 40)
    assert share(low, high, size) == pytest.approx(1 / 3)  # elements; with the longest it would be 3 / 15
    assert growth(low, size) == 4  # elements times the longest; elements alone double
    assert share(None, high, size) == 0.5


def test_share_of_equal_sizes_and_of_larger_ones():
    assert share(ids(2, 10), ids(2, 10), ids(2, 10)) == 1
    assert share(ids(2, 10), ids(2, 20), ids(2, 10)) == 0
    assert share(ids(2, 10), ids(2, 20), ids(4, 20)) == 1
    assert growth(ids(2, 10), ids(2, 10)) == 1


def test_an_empty_input_is_no_division_by_zero():
    assert growth(ids(0, 10), ids(2, 10)) == 1
    assert share(ids(0, 10), ids(2, 10), ids(1, 10)) == 0.5


@pytest.mark.parametrize(
    ("dim", "rounded"),
    [(1, 1), (63, 63), (64, 64), (65, 72), (72, 72), (73, 80), (127, 128), (128, 128), (129, 144), (1000, 1024)],
)
def test_buckets(dim, rounded):
    assert bucket_of(ids(2, dim), ids(9, 4096)) == ids(2, rounded)


def test_a_bucket_is_not_beyond_what_was_measured():
    assert bucket_of(ids(2, 129), ids(4, 140)) == ids(2, 140)
    assert bucket_of(ids(2, 140), ids(4, 140)) == ids(2, 140)


def test_a_bucket_is_little_above_its_sizes_and_there_are_few():
    most = ids(1, 4096)
    found = {bucket_of(ids(1, length), most)[0][1][1] for length in range(64, 4097)}
    assert len(found) == 8 * 6 + 1
    for length in range(64, 4097):
        bucket = bucket_of(ids(1, length), most)
        assert covers(bucket, ids(1, length))
        assert bucket[0][1][1] <= length * 9 / 8
        assert bucket_of(bucket, most) == bucket


def test_sizes_that_compare():
    assert is_like(ids(2, 10), ids(3, 20))
    assert not is_like(ids(2, 10), ids(2, 10, name="labels"))
    assert not is_like(ids(2, 10), (("input_ids", (2,)),))
    assert not is_like(ids(2, 10), (*ids(2, 10), *ids(2, 10, name="labels")))
    assert not is_like((*ids(2, 10), *ids(2, 10, name="labels")), (*ids(2, 10, name="labels"), *ids(2, 10)))


def test_what_covers():
    assert covers(ids(2, 10), ids(2, 10))
    assert covers(ids(2, 10), ids(1, 9))
    assert not covers(ids(2, 10), ids(1, 11))
    assert not covers(ids(2, 10), ids(3, 9))
    assert not covers(ids(2, 10), ids(2, 10, name="labels"))
    assert not covers(ids(2, 10), (*ids(2, 10), *ids(1, 1, name="labels")))


def test_size_of_a_call():
    mask = torch.zeros(2, 1, 5, 5)
    args = torch.zeros(2, 5), None, 3
    kwargs = {
        "mask": {"full": mask, "none": None},
        "states": (torch.zeros(1), [torch.zeros(2, 2)]),
        "scale": torch.ones(1)[0],
    }
    assert size_of(args, kwargs) == (
        ("0", (2, 5)),
        ("mask.full", (2, 1, 5, 5)),
        ("states.0", (1,)),
        ("states.1.0", (2, 2)),
        ("scale", ()),
    )


def test_inputs_in_a_mapping_and_how_many_logits_are_wanted():
    batch = UserDict({"input_ids": torch.zeros(2, 5), "flag": True})
    assert size_of((batch,), {"logits_to_keep": 3, "layers": 4}) == (("0.input_ids", (2, 5)), ("logits_to_keep", (3,)))
    # A tensor says which logits; how many is in its shape.
    assert size_of((), {"logits_to_keep": torch.arange(3)}) == (("logits_to_keep", (3,)),)


def test_a_size_is_plain_numbers():
    found = size_of((torch.zeros(2, 5),), {})
    assert hash(found) == hash((("0", (2, 5)),))
    assert type(found[0][1]) is tuple
    assert size_of((), {}) == ()


def test_a_call_with_keywords_in_another_order_is_of_another_size():
    one, other = torch.zeros(1), torch.zeros(2)
    assert not is_like(size_of((), {"a": one, "b": other}), size_of((), {"b": other, "a": one}))


def test_description():
    size = (*ids(8, 512, "labels"), ("flag", ()), *ids(8, 512), ("pixels", (8, 3, 224, 224)), ("grid", (8, 3)))
    assert describe(size) == "pixels 8x3x224x224, labels 8x512"
    assert describe(()) == "no tensors"
    assert describe(ids(2, 3)) == "input_ids 2x3"
