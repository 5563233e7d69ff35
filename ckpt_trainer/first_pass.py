"""Watch the first forward and backward of a model: what the forward costs, and which parameters get no gradient.

Once, and with hooks on all modules instead of on this model's: a copy that is made of it meanwhile shall not have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ckpt_trainer.blocks import Block
from ckpt_trainer.flops import FlopCounter
from ckpt_trainer.gradient_check import GradientCheck
from ckpt_trainer.recompute import Tally


class FirstPass:
    """Watches from enter to exit; the first forward is measured, gradients are noted all the time.

    Args:
        model: The model as it is called.
        blocks: Its blocks that are to be recomputed.
        tally: Where their calls are counted.
        when_over: Called when a second forward begins after a backward, for loops that do not tell when a step ends.

    Attributes:
        recomputable_share: FLOPs of those blocks / FLOPs of the forward; None until it is measured.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block], tally: Tally, when_over: Callable[[FirstPass], None]
    ) -> None:
        self.recomputable_share: float | None = None
        self._model = model
        self._tally = tally
        self._when_over = when_over
        self._check = GradientCheck(blocks)
        self._counting = ExitStack()
        self._watching = ExitStack()

    def __enter__(self) -> FirstPass:
        self._watching.enter_context(self._check)
        self._tally.counts_replays = True
        for hook in (
            register_module_forward_pre_hook(self._start),
            register_module_forward_hook(self._stop, always_call=True),
        ):
            self._watching.callback(hook.remove)
        # Also here, since torch calls no hook after a KeyboardInterrupt.
        self._watching.callback(self._stop_counting)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tally.counts_replays = False
        self._watching.close()

    def missing(self) -> list[str]:
        """Names of parameters that took part and got no gradient; see `GradientCheck.missing`."""
        return self._check.missing()

    def _start(self, module: nn.Module, args: Any) -> None:
        if module is not self._model or self._tally.counter is not None:
            return
        if self.recomputable_share is None:
            self._tally.counter = self._counting.enter_context(FlopCounter())
        elif self._tally.replays or self._check.has_gradients:
            self._when_over(self)

    def _stop(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self._model and self._tally.counter is not None:
            total = self._tally.counter.total
            blocks = sum(self._tally.block_flops.get(name, 0) * n for name, n in self._tally.checkpointed.items())
            self.recomputable_share = blocks / total if total else 0.0
            self._stop_counting()

    def _stop_counting(self) -> None:
        self._tally.counter = None
        self._counting.close()
