"""What this package takes from torch 2.13 and a benchmark can do without, for a machine that has an older one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils import flop_counter

from ckpt_trainer import flops


def make_up_for_older_torch() -> list[str]:
    """Let this package run on torch 2.11 and 2.12; returns what was changed, for the report."""
    notes = [] if _is_current() else [f"torch {torch.__version__} is older than 2.13, which this package asks for"]
    try:
        flop_counter.sdpa_flop_count((1, 2, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1))
    except AssertionError:
        for name in ("sdpa_flop_count", "sdpa_backward_flop_count"):
            counting = _with_all_heads(getattr(flop_counter, name))
            for module in (flop_counter, flops):
                setattr(module, name, counting)
        notes.append("its FLOP formulas refuse attention with fewer key heads than query heads; they were replaced")
    return notes


def _is_current() -> bool:
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def _with_all_heads(count: Callable[..., int]) -> Callable[..., int]:
    """A formula of attention for key and value with fewer heads than the query; these are the last three shapes."""

    def counting(*shapes: Sequence[int]) -> int:
        *others, query, key, value = shapes
        return count(*others, query, *((shape[0], query[1], *shape[2:]) for shape in (key, value)))

    return counting
