"""Optimizers by name, in the variant that runs on a device: what they hold and what they need for a moment differs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]

# How transformers calls them.
_THEIR_WORD = "torch"
_NO_OPTIMIZER = "none"


def optimizer_named(name: str) -> MakeOptimizer | None:
    """What makes an optimizer of parameters.

    Args:
        name: A class of `torch.optim` in any spelling (`adamw`, `sgd`), with `_fused` for its fused variant, or as
            transformers calls it (`adamw_torch_fused`); `none`: there is none. A name without `_fused` is the variant
            that torch takes on a device, which steps all weights at once and needs room for that.

    Raises:
        ValueError: torch has none of that name, or no fused variant of it.
    """
    words = [word for word in name.lower().split("_") if word != _THEIR_WORD]
    if words == [_NO_OPTIMIZER]:
        return None
    is_fused = "fused" in words
    known = _known()
    plain = "".join(word for word in words if word != "fused")
    kind = known.get(plain)
    if kind is None:
        near = difflib.get_close_matches(plain, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"optimizer {name!r} is not one of {', '.join(sorted(known))}, {_NO_OPTIMIZER}.{hint}")
    options = inspect.signature(kind).parameters
    if is_fused and "fused" not in options:
        raise ValueError(f"optimizer {name!r}: torch has no fused variant of {kind.__name__}. Write {plain!r}.")
    chosen: dict[str, Any] = {"fused": True} if is_fused else {"foreach": True} if "foreach" in options else {}
    return partial(kind, lr=1e-3, **chosen)


def _known() -> dict[str, Any]:
    # Those that need something else than shapes: a closure, sparse gradients, matrices only, values.
    special = {"lbfgs", "sparseadam", "muon", "adafactor"}
    found = {name.lower(): kind for name, kind in vars(torch.optim).items() if inspect.isclass(kind)}
    return {
        name: kind
        for name, kind in found.items()
        if issubclass(kind, Optimizer) and kind is not Optimizer and name not in special
    }
