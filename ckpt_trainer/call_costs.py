"""What a step costs that is about to run in a compiled model: its call, on shapes alone and without the compiler.

The call is made on the host, with copies of its inputs, so that nothing of the real step is touched: no weight, no
gradient, no random number.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from ckpt_trainer.fake_costs import Batch, Conditions, fake_costs
from ckpt_trainer.plan import Action, Settings
from ckpt_trainer.roofline import Device
from ckpt_trainer.step_costs import StepCosts


def costs_of_call(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    actions: Sequence[Action],
    device: Device,
    settings: Settings,
    gradients_are_there: bool,
) -> StepCosts:
    """Costs of `model(*args, **kwargs)` and its backward.

    Args:
        model: Compiled or not, and not wrapped for several processes.
        args: Its arguments.
        kwargs: Its keyword arguments.
        actions: What is offered beside `keep`.
        device: Whose time.
        settings: How actions are carried out.
        gradients_are_there: As in `Conditions`.

    Raises:
        NeedsValues: The step cannot be followed without data.
    """
    devices = {leaf.device.type for leaf in tree_iter((args, dict(kwargs))) if isinstance(leaf, Tensor)}
    autocast = next((torch.get_autocast_dtype(kind) for kind in devices if torch.is_autocast_enabled(kind)), None)
    batch = {"args": tree_map(_on_host, args), "kwargs": tree_map(_on_host, dict(kwargs))}
    conditions = Conditions(
        _loss_of_call, autocast=autocast, settings=settings, gradients_are_there=gradients_are_there
    )
    with _random_numbers_kept(), torch.compiler.set_stance("force_eager"):
        return fake_costs(model, batch, actions, device, conditions)


def _on_host(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.device.type == "cpu":
        return value
    return value.detach().to("cpu").requires_grad_(value.requires_grad)


def _loss_of_call(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that the model gives; where it gives none, one that takes as much as a cross-entropy of what it gives."""
    output = model(*batch["args"], **batch["kwargs"])
    given = output.get("loss") if isinstance(output, Mapping) else None
    if isinstance(given, Tensor):
        return given
    floats = [leaf for leaf in tree_iter(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    losses = [leaf.float().log_softmax(-1).sum() if leaf.dim() else leaf for leaf in floats]
    return torch.stack(losses).sum()


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
