"""The examples: what they compute from what they measured, and that small ones run."""

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture(autouse=True, scope="module")
def _path():
    added = [str(BENCHMARKS), str(BENCHMARKS.parent)]
    sys.path[:0] = added
    yield
    for path in added:
        sys.path.remove(path)


def point(name, side, stored, times, is_exact=True):
    from frontier import Point

    return Point(name, side, stored, peak=stored, recomputed=0.0, is_exact=is_exact, seconds=times, ratios=times)


def frontier_points(**changed):
    """Plain at (100, 1.0), HF at (50, 1.1) and (10, 1.2), ours where no claim fails."""
    ours = {"expensive": (60, 1.0), "matmul": (50, 1.05), "half_matmul": (30, 1.1), "attention": (5, 1.3)} | changed
    return [
        point("plain", "plain", 100, [1.0] * 4),
        *(point(name, "ours", stored, [time] * 4) for name, (stored, time) in ours.items()),
        point("HF full", "HF", 10, [1.2] * 4),
        point("HF every_n_layers=2", "HF", 50, [1.1] * 4),
    ]


class TestClaims:
    def failing(self, points):
        from frontier import claims

        return [claim for claim, holds in claims(points).items() if not holds]

    def test_hold(self):
        assert self.failing(frontier_points()) == []

    def test_bytes_and_time_of_expensive(self):
        (stored,) = self.failing(frontier_points(expensive=(63, 1.0)))
        assert stored.startswith("expensive stores 0.630")
        (time,) = self.failing(frontier_points(expensive=(60, 1.04)))
        assert time == "expensive takes 1.040 of the time, at most 1.03"

    def test_exact(self):
        points = frontier_points()
        points[2] = replace(points[2], is_exact=False)
        assert len(self.failing(points)) == 1

    def test_above_the_line(self):
        # Half way between (10, 1.2) and (50, 1.1).
        assert self.failing(frontier_points(half_matmul=(30, 1.16))) == [
            "half_matmul takes 1.160: HF's line is at 1.150"
        ]

    def test_dominated(self):
        line, hf = self.failing(frontier_points(matmul=(51, 1.11)))
        assert line.startswith("matmul takes 1.110")
        assert hf.startswith("HF every_n_layers=2 does not dominate matmul")


class TestFrontier:
    def test_line(self):
        from frontier import time_on_line

        points = frontier_points()
        assert [time_on_line(points, stored) for stored in (9, 10, 100, 200)] == [None, 1.2, 1.0, 1.0]
        assert time_on_line(points, 75) == pytest.approx(1.05)

    @pytest.mark.parametrize(("mine", "expected"), [((50, 1.1), 0), ((50, 1.11), 1), ((51, 1.1), 1), ((49, 1.19), 0)])
    def test_dominated_needs_no_more_of_both_and_less_of_one(self, mine, expected):
        from frontier import dominated

        assert len(dominated(frontier_points(matmul=mine))) == expected

    def test_noise(self):
        from frontier import slower_in_most_rounds

        other = point("HF full", "HF", 1, [1.0, 1.0, 1.0, 1.0])
        assert slower_in_most_rounds(point("full", "ours", 1, [1.1, 1.1, 1.1, 0.9]), other)
        assert not slower_in_most_rounds(point("full", "ours", 1, [1.1, 1.1, 0.9, 0.9]), other)


@pytest.mark.parametrize("model", ["Llama", "ViT", "T5", "Bert"])
def test_a_small_frontier(model, capsys):
    from frontier import all_variants, claims, measure, points_table, read_options
    from models import build

    sizes = f"--model {model} --layers 3 --hidden 64 --tokens 16 --config vocab_size=64 image_size=32 num_labels=2"
    net, batch = build(read_options(sizes.split()), torch.float32)
    points = measure(net, batch, all_variants(net), rounds=2)
    assert all(point.is_exact for point in points)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in net.modules())
    assert points_table(points).count("\n") == len(points) + 1
    assert len(claims(points)) > 6
    by_name = {point.name: point for point in points}
    plain, full, hf = (by_name[name] for name in ("plain", "full", "HF full"))
    assert plain.recomputed == 0 < full.recomputed <= 1
    assert by_name["expensive"].recomputed == 0
    assert full.stored < by_name["attention"].stored < by_name["half_matmul"].stored < plain.stored
    assert by_name["expensive"].stored < plain.stored
    assert full.stored <= hf.stored
    assert by_name["full, every_n=2"].stored <= by_name.get("HF every_n_layers=2", plain).stored


class TestLayerBytes:
    SIZES = "--hidden 64 --tokens 32 --dtype float32 --config vocab_size=64 num_attention_heads=4 num_key_value_heads=2"

    @pytest.fixture(autouse=True)
    def _few(self, monkeypatch):
        import layer_bytes

        for name in ("selective: matmul", "selective: attention"):
            monkeypatch.delitem(layer_bytes.VARIANTS, name)

    def test_without_data_as_with(self):
        from layer_bytes import VARIANTS, attend_without_mask, layer_bytes, read_options, stored_bytes
        from models import build

        options = read_options(self.SIZES.split())
        found = layer_bytes(options)
        sizes = [Namespace(**vars(options), layers=number) for number in (2, 3)]
        few, many = (build(size, torch.float32, torch.device("cpu")) for size in sizes)
        for model, _ in (few, many):
            attend_without_mask(model)
        for name, flags in VARIANTS.items():
            assert found[name] == stored_bytes(*many, flags) - stored_bytes(*few, flags), name

    def test_of_llama(self):
        from layer_bytes import layer_bytes, read_options

        found = layer_bytes(read_options([]))
        rows, hidden, inner, keys = 8192, 2 * 4096, 2 * 14336, 2 * 1024
        logsumexp, root = 4 * 32, 4
        # The inputs of two norms, query, key, value, attention's result, gate and up.
        assert found["selective: expensive"] == rows * (4 * hidden + 2 * keys + 2 * inner + logsumexp + 2 * root)
        assert found["full"] == rows * hidden


def test_pairs():
    from models import read_pairs

    assert read_pairs(["a=1", "b=text", "c=x=y", "d=[1, 2]"]) == {"a": 1, "b": "text", "c": "x=y", "d": [1, 2]}
    with pytest.raises(SystemExit, match="key=value"):
        read_pairs(["a"])


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora(monkeypatch, capsys, bits):
    """All that it claims holds; else it ends with an error."""
    import qlora

    for name, value in {"LAYERS": 2, "LENGTH": 32}.items():
        monkeypatch.setattr(qlora, name, value)
    monkeypatch.setattr(sys, "argv", ["qlora.py", "--bits", str(bits), "--steps", "2", "--rounds", "1"])
    qlora.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("yes  ") for line in lines) == 9
    assert not any(line.startswith("NO") for line in lines)
