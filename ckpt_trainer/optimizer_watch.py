"""What optimizers take: the state that they keep, and temporaries of their step. All of torch have hooks that show it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_iter

from ckpt_trainer.memory import bytes_of, meter_of
from ckpt_trainer.modes import leave

# Steps of each optimizer that are measured: the first makes its state, the second shows what it takes besides.
_STEPS = 2


@dataclass
class _Known:
    """What is known of one optimizer.

    Args:
        is_ours: Whether it has any of the parameters.
        num_steps: How many of its steps were measured.
        num_weights: How many weights it has state of.
    """

    is_ours: bool
    num_steps: int = 0
    num_weights: int = 0


class OptimizerWatch:
    """Watches the optimizers of some parameters from `open` to `close`.

    Args:
        device: Whose bytes count.
        parameters: An optimizer of any of them is watched.
        before: Called before each step of one.
        learn: Called after steps that were measured, with the bytes of all state and the most of temporaries.
    """

    def __init__(
        self,
        device: torch.device,
        parameters: Iterable[nn.Parameter],
        before: Callable[[], None],
        learn: Callable[[int, int], None],
    ) -> None:
        self._device, self._before, self._learn = device, before, learn
        self._ids = {id(parameter) for parameter in parameters}
        self._optimizers: WeakKeyDictionary[torch.optim.Optimizer, _Known] = WeakKeyDictionary()
        self._hooks: list[Any] = []
        self._meter: Any = None
        self._peak = 0

    def open(self) -> None:
        """Begin, if that was not done."""
        if not self._hooks:
            self._hooks = [
                register_optimizer_step_pre_hook(self._begin),
                register_optimizer_step_post_hook(self._end),
            ]

    def close(self) -> None:
        """No hook is left."""
        self.drop()
        while self._hooks:
            self._hooks.pop().remove()

    def drop(self) -> None:
        """End what is being measured of a step that failed."""
        if self._meter is not None:
            meter, self._meter = self._meter, None
            leave(meter)

    def state(self) -> Iterator[Tensor]:
        """The tensors that the optimizers keep."""
        for optimizer in [optimizer for optimizer, known in self._optimizers.items() if known.is_ours]:
            yield from (leaf for leaf in tree_iter(list(optimizer.state.values())) if isinstance(leaf, Tensor))

    @property
    def state_bytes(self) -> int:
        """Bytes of them on the device."""
        return bytes_of(self.state(), self._device)

    def _begin(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        known = self._known(optimizer)
        if not known.is_ours:
            return
        self._before()
        if known.num_steps < _STEPS and self._meter is None:
            self._meter = meter_of(self._device)
            self._meter.__enter__()
            self._level, self._state_then = self._meter.current, self.state_bytes

    def _end(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        known = self._known(optimizer)
        if not known.is_ours:
            return
        is_new, known.num_weights = len(optimizer.state) != known.num_weights, len(optimizer.state)
        if self._meter is None:
            if is_new:  # weights that had no gradients until now: blocks that are left out at random, unused experts
                self._learn(self.state_bytes, self._peak)
            return
        peak = self._meter.peak
        self.drop()
        new = self.state_bytes - self._state_then
        self._peak = max(self._peak, peak - self._level - new, 0)
        known.num_steps += 1
        self._learn(self.state_bytes, self._peak)

    def _known(self, optimizer: torch.optim.Optimizer) -> _Known:
        known = self._optimizers.get(optimizer)
        if known is None:
            is_ours = any(id(p) in self._ids for group in optimizer.param_groups for p in group["params"])
            known = self._optimizers[optimizer] = _Known(is_ours)
        return known
