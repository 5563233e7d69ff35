"""What each block of a model does to memory in one step: the step, cut where blocks begin and end.

A `WatchedStep` tells, of each block that ran in it, what was there before it, the most that was there in its forward and in
its backward, and what ran. It knows nothing of actions or of what the numbers are for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from ckpt_trainer.blocks import Block
from ckpt_trainer.hooks import Hook
from ckpt_trainer.memory import AllocatorBytes, LiveBytes
from ckpt_trainer.modes import leave
from ckpt_trainer.roofline import Work, WorkCounter

Meter = LiveBytes | AllocatorBytes

# Names of spans that are not of a block, in the order in which they come.
BEFORE, HEAD, HEAD_BACKWARD, BEFORE_BACKWARD = "before", "head", "head backward", "before backward"


@dataclass
class Span:
    """A part of a step.

    Args:
        name: Of its block, or one of those above.
        backward: Whether it is one of backward.
        start: Bytes alive when it began.
        peak: The most in it.
        grown: Gradients that came into being in it and stay.
        work: The ops that ran in it.
    """

    name: str
    backward: bool
    start: int
    peak: int = 0
    grown: int = 0
    work: Work = field(default_factory=Counter)


class _Cutter(WorkCounter):  # type: ignore[no-untyped-call]
    """Cuts a step into spans.

    Args:
        live: Counts the bytes.
        parameters: Those whose gradients are looked for.
    """

    def __init__(self, live: Meter, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.spans: list[Span] = []
        self._live = live
        self._waiting: Span | None = None
        self._is_over = False
        self._without = [parameter for parameter in parameters if parameter.requires_grad and parameter.grad is None]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim" or self._is_over:
            return func(*args, **(kwargs or {}))
        self._begin_waiting()
        return super().__torch_dispatch__(func, types, args, kwargs)

    def begin(self, name: str, backward: bool = False, *, soon: bool = False) -> None:
        """End a span and begin another; with `soon`, at the next op, when what the caller held until then is gone."""
        if self._is_over:
            return  # hooks on tensors stay: a graph may be kept, and run again
        self._begin_waiting()
        span = Span(name, backward, 0)
        if soon:
            self._waiting = span
        else:
            self._begin(span)

    def end(self) -> None:
        """End the last span; none begins any more."""
        if not self._is_over:
            self._begin_waiting()
            self._end_last()
            self._is_over = True

    def _end_last(self) -> None:
        if not self.spans:
            return
        last = self.spans[-1]
        last.peak, last.work = max(last.start, self._live.peak), self.work
        if last.backward:
            new = [parameter.grad for parameter in self._without if parameter.grad is not None]
            last.grown = sum(grad.untyped_storage().nbytes() for grad in new)
            self._without = [parameter for parameter in self._without if parameter.grad is None]

    def _begin_waiting(self) -> None:
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self._begin(waiting)

    def _begin(self, span: Span) -> None:
        if self.spans:
            self._end_last()
        span.start = self._live.current
        self._live.reset_peak()
        self.work = Counter()
        self.spans.append(span)


class WatchedStep:
    """Cuts the forward and the backward that run while it is entered.

    What runs between two blocks is part of the first of them, in forward; in backward, of the later.

    Args:
        model: The model; its gradients are followed.
        blocks: The blocks at which to cut.
        meter: Counts the bytes; entered and left with this.
        when_backward_begins: Called once, within backward.

    Attributes:
        spans: In the order in which they ran.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        meter: Meter,
        when_backward_begins: Callable[[], None] = lambda: None,
    ) -> None:
        self._blocks = blocks
        self._meter = meter
        self._cutter = _Cutter(meter, list(model.parameters()))
        self._when_backward_begins: Callable[[], None] | None = when_backward_begins
        self._has_begun = False
        self._stack = ExitStack()

    @property
    def spans(self) -> list[Span]:
        return self._cutter.spans

    def __enter__(self) -> WatchedStep:
        self._meter.__enter__()
        self._cutter.__enter__()  # type: ignore[no-untyped-call]
        self._stack.callback(leave, self._cutter, self._meter)
        for block in self._blocks:
            entering, leaving = Hook(partial(self._enter, block.name)), Hook(partial(self._leave, block.name))
            self._stack.callback(block.module.register_forward_pre_hook(entering, with_kwargs=True).remove)
            self._stack.callback(block.module.register_forward_hook(leaving).remove)
        self._cutter.begin(BEFORE)
        return self

    def end_forward(self) -> None:
        """The forward of the model is over."""
        self._cutter.begin(HEAD_BACKWARD, backward=True)

    def end(self) -> None:
        """What runs from here on is no part of the step."""
        self._cutter.end()

    def __exit__(self, *error: object) -> None:
        try:
            self.end()
        finally:
            self._stack.close()

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        self._cutter.begin(name)
        if not self._has_begun:
            self._has_begun = True
            self._cut_at_gradient((args, kwargs), BEFORE_BACKWARD)

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self._cut_at_gradient(output, name)
            self._cutter.begin(HEAD, soon=True)

    def _cut_at_gradient(self, values: Any, name: str) -> None:
        """Begin a span of backward where the gradient of the first of these tensors is there."""
        tensors = (leaf for leaf in tree_iter(values) if isinstance(leaf, Tensor) and leaf.requires_grad)
        tensor = next(tensors, None)
        if tensor is not None:
            tensor.register_hook(partial(self._begin_backward, name))  # type: ignore[no-untyped-call]

    def _begin_backward(self, name: str, grad: Tensor) -> None:
        if self._when_backward_begins is not None:
            begins, self._when_backward_begins = self._when_backward_begins, None
            begins()
        self._cutter.begin(name, backward=True)


def measure_step(model: nn.Module, blocks: Sequence[Block], loss_of: Callable[[], Tensor]) -> list[Span]:
    """Run `loss_of().backward()` and tell its spans in the order in which they ran.

    Args:
        model: The model; its gradients are followed.
        blocks: The blocks at which to cut.
        loss_of: Runs the forward.
    """
    with WatchedStep(model, blocks, LiveBytes()) as watched:
        loss = loss_of()
        watched.end_forward()
        loss.backward()  # type: ignore[no-untyped-call]
        # What the caller holds of it is no part of the step.
        del loss
    return watched.spans
