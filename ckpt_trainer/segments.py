"""Segments of a chain of replayed blocks: the input of every k-th block is stored, the others are rebuilt in backward.

How one block is replayed is not its business, nor which blocks are. After Chen et al. 2016 (arXiv 1604.06174).

NOTE on exactness. Gradients are equal to the last bit, if a rebuilt input is what the block got:
  1. An input is dropped only where it *is* the output of the block before, the same tensor object at the same version:
     not where code or a hook in between replaced or changed it, and not after a block that is kept. Everything else
     begins a new segment. (A write through `.data`, that autograd does not see either, is not seen here.)
  2. Blocks run once more as they ran, gradients on, random numbers and buffers of then. Without gradients a matmul of
     tensors that are not contiguous, fused kernels of an encoder in evaluation mode and compiled code choose another
     way. What the extra forward stores for backward is dropped with its output's graph, before the next block runs.
  3. All other tensors are stored as autograd stores them, hooks of the user and checks against changes in place
     included. A dropped input is checked too: a tensor without data that counts versions with it stands in for it.

NOTE on lifetime. A link is owned by what autograd holds for its block and owns the link before. A rebuilt input is
given up when the replay of its block takes it, so backward through a graph that is kept rebuilds it again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ckpt_trainer.block_state import devices_of


class Call(Protocol):
    """One call of one block: the first time it is called is the forward, every later time a replay."""

    def __call__(self, *tensors: Tensor) -> Any:
        """The forward, or a replay."""

    def again(self, *tensors: Tensor) -> Any:
        """The forward once more, as it was, and not counted as a replay."""


def segment_length(setting: int | str, number: int) -> int:
    """How many blocks share one stored input.

    Args:
        setting: `checkpointing_segment`: a number, or `sqrt`, which makes inputs stored and inputs rebuilt about equal.
        number: Number of replayed blocks in the stack.

    Raises:
        ValueError: Neither a number from 1 on nor `sqrt`.
    """
    if setting == "sqrt":
        return max(1, round(sqrt(number)))
    if isinstance(setting, int) and not isinstance(setting, bool) and setting >= 1:
        return setting
    raise ValueError(f"checkpointing_segment={setting!r} is neither a number from 1 on nor 'sqrt'.")


class Segments:
    """Where the chain of one stack's calls stands. Owns nothing of a graph; serves any number of passes.

    Args:
        length: Blocks per segment; 1 stores every input.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._last: _Output | None = None

    def run(self, checkpoint: Callable[..., Any], call: Call, tensors: Sequence[Tensor]) -> Any:
        """Run one block so that backward replays it, from an input that is stored or rebuilt.

        Args:
            checkpoint: Calls its first argument with the others, now and when backward asks: torch's, non-reentrant.
            call: The call of the block.
            tensors: Its tensor arguments.

        Returns:
            What the block returns.

        Raises:
            RuntimeError: In backward, where an input was changed in place since, as autograd itself does.
        """
        autocast = _autocast_state(tensors)
        link = _Link(call, tensors, autocast, self._previous(tensors, autocast))
        output = checkpoint(link, *_one_on_each_device(tensors))
        hidden = _hidden_state(output)
        self._last = None if hidden is None else _Output(weakref.ref(hidden), hidden._version, weakref.ref(link))
        return output

    def _previous(self, tensors: Sequence[Tensor], autocast: Any) -> tuple[_Link, Tensor] | None:
        """The call whose output one of the tensors is, and that tensor; None begins a new segment."""
        hidden, link = self._last.unchanged() if self._last else (None, None)
        if hidden is None or link is None or not any(tensor is hidden for tensor in tensors):
            return None
        return (link, hidden) if link.place + 1 < self._length and link.autocast == autocast else None


@dataclass(frozen=True)
class _Output:
    """The hidden state that a block returned, its version then, and the call that gave it; keeps neither alive."""

    tensor: weakref.ref[Tensor]
    version: int
    link: weakref.ref[_Link]

    def unchanged(self) -> tuple[Tensor | None, _Link | None]:
        """Both, as far as they are alive; no tensor if it was written in place."""
        tensor = self.tensor()
        return (tensor if tensor is not None and tensor._version == self.version else None), self.link()


class _Link:
    """One call in a segment, with what it takes to run it again.

    Args:
        call: The call.
        tensors: Its tensor arguments.
        autocast: What precision was in force.
        previous: The call before it in the segment and its output, which is not stored; None for the first.
    """

    def __init__(
        self, call: Call, tensors: Sequence[Tensor], autocast: Any, previous: tuple[_Link, Tensor] | None
    ) -> None:
        self._call = call
        self._fresh: Sequence[Tensor] | None = tensors
        self._previous: _Link | None = previous[0] if previous else None
        hidden = previous[1] if previous else None
        self._holes = [index for index, tensor in enumerate(tensors) if tensor is hidden]
        self._requires_grad = hidden is not None and hidden.requires_grad
        self._input: Tensor | None = None
        self._stored = _store([_without_data(tensor) if tensor is hidden else tensor for tensor in tensors])
        self.autocast = autocast
        self.place: int = 0 if self._previous is None else self._previous.place + 1

    def __call__(self, *marks: Tensor) -> Any:
        if self._fresh is not None:
            tensors, self._fresh = self._fresh, None
            return self._call(*tensors)
        self._rebuild_input()
        return self._call(*self._recall(keep_input=False))

    def _rebuild_input(self) -> None:
        """Run the blocks before this one, from the last input that is there, and leave each its input."""
        links = [self]
        while links[-1]._input is None and links[-1]._previous is not None:
            links.append(links[-1]._previous)
        while len(links) > 1:
            hidden = links.pop()._run_again()
            links[-1]._input = hidden.requires_grad_(links[-1]._requires_grad)

    def _run_again(self) -> Tensor:
        # The hooks keep what is stored here from those around, which belong to the replay that asked.
        with torch.autograd.graph.saved_tensors_hooks(_detached, _as_it_is):
            hidden = _hidden_state(self._call.again(*self._recall(keep_input=True)))
        assert hidden is not None
        if torch.is_autocast_enabled(hidden.device.type):
            # Else the weights of a whole segment would stay in half precision until the replay is over.
            torch.clear_autocast_cache()
        return hidden.detach()

    def _recall(self, keep_input: bool) -> list[Tensor]:
        """The tensor arguments, as they were."""
        tensors = list(self._stored.saved_tensors)
        if self._input is not None:
            for index in self._holes:
                tensors[index] = self._input
        if not keep_input:
            self._input = None
        return tensors


class _Store(torch.autograd.Function):
    """Stores tensors as a step of autograd does."""

    @staticmethod
    def forward(ctx: FunctionCtx, key: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return key.detach()


def _store(tensors: Sequence[Tensor]) -> Any:
    """An object whose `saved_tensors` are the tensors; raises there if one was changed in place."""
    # Autograd stores only where a gradient is due, and maybe none of the tensors wants one.
    key = torch.empty(0, requires_grad=True)
    return _Store.apply(key, *tensors).grad_fn  # type: ignore[no-untyped-call]


def _without_data(tensor: Tensor) -> Tensor:
    """A tensor without elements that shares the version of another one, and not its memory."""
    mark = tensor.detach()
    mark.data = tensor.detach().new_empty(0)
    return mark


def _one_on_each_device(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What torch's checkpoint tells the device by, to restore autocast for it."""
    return [torch.empty(0, device=device) for device in devices_of(tensors)[1:]]


def _autocast_state(tensors: Sequence[Tensor]) -> Any:
    kinds = {device.type for device in devices_of(tensors)}
    kinds = {kind for kind in kinds if torch.amp.is_autocast_available(kind)}
    states = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}
    return states, torch.is_autocast_cache_enabled()


def _hidden_state(output: Any) -> Tensor | None:
    """The first tensor of what a block returns, which is what it hands to the next one."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) else None


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
