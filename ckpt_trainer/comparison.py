"""Modes side by side: what a step under each of them needs and how long it takes, as a table, as data and as a picture.

It holds and shows figures; where they come from, a prediction or a measurement, is for `estimate` and `bench`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckpt_trainer.memory import format_bytes
from ckpt_trainer.plan import Plan, format_table

# What a peak consists of, in the order in which it is shown, and the colour of each in a picture.
PARTS = {
    "weights": "#4c5b7a",
    "gradients": "#8a9bbf",
    "optimizer": "#c9b458",
    "activations": "#3f9c8f",
    "logits and loss": "#c8553d",
}
_BUDGET = "#222222"
# Room for the text beside a bar, as a share of the longest.
_MARGIN = 0.28


@dataclass(frozen=True)
class Row:
    """One mode or plan, and what a step under it comes to. What is not known or was not asked for is None or empty.

    Args:
        label: How it is called: `none`, `full`, `auto`, `selective:matmul`.
        peak_bytes: The most that a step has on the device; None: it could not be found, and `note` says why.
        where: Where in the step that is, as a phase (`backward`) or with its block (`backward of model.layers.3`).
        phase_bytes: Phase -> the most in it, in the order in which they come.
        part_bytes: One of `PARTS` -> how much of the peak it is.
        slowdown: Time of a step / time of one in which all is kept.
        largest_batch: The most rows that fit.
        longest_sequence: The most tokens in a row that fit.
        plan: What is done to each block.
        note: What else there is to say.
    """

    label: str
    peak_bytes: int | None = None
    where: str = ""
    phase_bytes: Mapping[str, int] = field(default_factory=dict)
    part_bytes: Mapping[str, int] = field(default_factory=dict)
    slowdown: float | None = None
    largest_batch: int | None = None
    longest_sequence: int | None = None
    plan: Plan | None = None
    note: str = ""


def format_rows(rows: Sequence[Row]) -> str:
    """The rows as a table; columns of which nothing is known are left out."""
    columns = [("mode", [row.label for row in rows])]
    columns += [("peak", [_or_dash(row.peak_bytes, format_bytes) for row in rows])]
    columns += [("in", [row.where for row in rows])]
    columns += [(part, [_or_dash(row.part_bytes.get(part), format_bytes) for row in rows]) for part in PARTS]
    columns += [
        ("slowdown", [_or_dash(row.slowdown, _times) for row in rows]),
        ("largest batch", [_or_dash(row.largest_batch, str) for row in rows]),
        ("longest sequence", [_or_dash(row.longest_sequence, str) for row in rows]),
        ("note", [row.note for row in rows]),
    ]
    shown = [
        (title, cells) for title, cells in columns if title == "mode" or any(cell not in ("", "-") for cell in cells)
    ]
    return format_table([title for title, _ in shown], zip(*(cells for _, cells in shown), strict=True))


def as_data(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as what JSON can hold; each has the names of `Row` for its keys, and a plan as `Plan.as_data` gives it."""
    return [{**vars(row), "plan": row.plan.as_data()["blocks"] if row.plan else None} | _copies(row) for row in rows]


def plot(rows: Sequence[Row], path: str | Path, budget_bytes: int | None = None, title: str = "") -> None:
    """Draw a bar for each row, made of what its peak consists of, with the slowdown beside it and the budget as a line.

    Args:
        rows: Those without a peak are drawn as a label with their note.
        path: Where the picture goes; its ending tells the format.
        budget_bytes: Where the line is; None: there is none.
        title: Above the picture.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The ending is none that matplotlib can write.
    """
    figure_of = _matplotlib_figure()
    figure = figure_of(figsize=(9, 1.5 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    longest = max([budget_bytes or 0, *(row.peak_bytes or 0 for row in rows)]) / 2**30
    for place, row in enumerate(rows):
        _draw_bar(axes, place, row, longest)
    if budget_bytes is not None:
        axes.axvline(budget_bytes / 2**30, color=_BUDGET, linewidth=1.2, linestyle="--")
        said = f" budget {format_bytes(budget_bytes)}"
        axes.text(budget_bytes / 2**30, -0.75, said, color=_BUDGET, fontsize=8, ha="center", va="bottom")
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set(xlabel="peak of a step, GiB", xlim=(0, (longest or 1) * (1 + _MARGIN)), ylim=(len(rows) - 0.4, -0.8))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [axes.barh(0, 0, color=colour) for colour in PARTS.values()]
    figure.legend(handles, PARTS, loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=160)


def _draw_bar(axes: Any, place: int, row: Row, longest: float) -> None:
    left = 0.0
    parts = row.part_bytes or {"activations": row.peak_bytes or 0}
    for part, colour in PARTS.items():
        width = parts.get(part, 0) / 2**30
        axes.barh(place, width, left=left, height=0.68, color=colour)
        left += width
    said = [format_bytes(row.peak_bytes)] if row.peak_bytes is not None else []
    said += [_times(row.slowdown)] if row.slowdown is not None else []
    said += [row.note] if row.peak_bytes is None and row.note else []
    background = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.text(left + 0.012 * longest, place, "  ".join(said), va="center", fontsize=8, bbox=background)


def _matplotlib_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture was asked for, and matplotlib is missing. Run: pip install matplotlib") from error
    return Figure


def _copies(row: Row) -> dict[str, Any]:
    return {"phase_bytes": dict(row.phase_bytes), "part_bytes": dict(row.part_bytes)}


def _or_dash(value: Any, shown: Any) -> str:
    return "-" if value is None else shown(value)


def _times(ratio: float) -> str:
    return f"x{ratio:.2f}"
