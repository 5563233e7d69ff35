"""Modes side by side: the table, the data, the picture."""

import builtins
import json

import pytest

from ckpt_trainer.comparison import PARTS, Row, as_data, format_rows, plot
from ckpt_trainer.plan import KEEP, RECOMPUTE, Plan

GIB = 2**30
FIRST = Row(
    "none",
    3 * GIB,
    "head and loss",
    {"forward": GIB, "head and loss": 3 * GIB},
    dict(zip(PARTS, (GIB, 0, GIB, GIB, 0), strict=True)),
    slowdown=1.0,
    plan=Plan({"layers.0": KEEP}),
)
SECOND = Row("full", 2 * GIB, "optimizer", slowdown=1.25, largest_batch=8, plan=Plan({"layers.0": RECOMPUTE}))
MISSING = Row("auto", note="nothing fits")


def test_the_table_has_the_columns_that_something_is_known_of():
    lines = format_rows([FIRST, SECOND, MISSING]).splitlines()
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    assert cells[0] == ["mode", "peak", "in", *PARTS, "slowdown", "largest batch", "note"]
    assert cells[2] == [
        "none",
        "3.00 GiB",
        "head and loss",
        "1.00 GiB",
        "0 B",
        "1.00 GiB",
        "1.00 GiB",
        "0 B",
        "x1.00",
        "-",
    ]
    assert cells[3] == ["full", "2.00 GiB", "optimizer", *["-"] * 5, "x1.25", "8"]
    assert cells[4][0] == "auto"
    assert cells[4][-1] == "nothing fits"
    assert "longest sequence" not in format_rows([FIRST, SECOND])
    assert format_rows([MISSING]).splitlines()[0].split() == ["mode", "note"]


def test_the_data_goes_through_json():
    data = json.loads(json.dumps(as_data([FIRST, MISSING])))
    assert data[0] == {
        "label": "none",
        "peak_bytes": 3 * GIB,
        "where": "head and loss",
        "phase_bytes": {"forward": GIB, "head and loss": 3 * GIB},
        "part_bytes": {"weights": GIB, "gradients": 0, "optimizer": GIB, "activations": GIB, "logits and loss": 0},
        "slowdown": 1.0,
        "largest_batch": None,
        "longest_sequence": None,
        "plan": {"layers.0": "keep"},
        "note": "",
    }
    assert data[1]["peak_bytes"] is None
    assert data[1]["plan"] is None


def bars_of(monkeypatch, *args):
    """The bars and texts of a picture, and where it is."""
    from matplotlib.figure import Figure

    made = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: made.append(self))
    plot(*args)
    axes = made[0].axes[0]
    bars = [(bar.get_y(), bar.get_x(), bar.get_width()) for bar in axes.patches if bar.get_width()]
    return bars, [text.get_text() for text in axes.texts], [line.get_xdata()[0] for line in axes.lines]


def test_bars_are_made_of_the_parts(monkeypatch):
    bars, texts, lines = bars_of(monkeypatch, [FIRST, SECOND, MISSING], "x.png", 5 * GIB // 2)
    assert [(left, width) for _, left, width in bars] == [(0, 1), (1, 1), (2, 1), (0, 2)]
    assert len({place for place, _, _ in bars}) == 2
    assert texts[:3] == ["3.00 GiB  x1.00", "2.00 GiB  x1.25", "nothing fits"]
    assert lines == [2.5]


@pytest.mark.parametrize("rows", [[FIRST, SECOND], [MISSING], []])
def test_a_picture_is_written(tmp_path, rows):
    path = tmp_path / "modes.png"
    plot(rows, path, title="a model")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_an_ending_that_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match="nope"):
        plot([FIRST], tmp_path / "modes.nope")


def test_without_matplotlib(monkeypatch, tmp_path):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError("none here")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot([FIRST], tmp_path / "modes.png")
