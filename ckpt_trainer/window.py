"""The micro-batches since the last optimizer step, with what each of them found, so that they can be run again.

Gradients add up from micro-batch to micro-batch, so one that failed in the midst of its backward cannot be undone alone:
gradients are dropped and all of the window run again. For the same losses and gradients each must find what it found:
its inputs, random numbers, buffers of the model. And what it counts on the trainer is not to count twice.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Number
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ckpt_trainer.block_state import random_state, same_state, set_random_state
from ckpt_trainer.collectives import Collectives, alone

# Tensors up to this size, on the trainer and among its inputs, are copied: sums that are added to in place.
_TINY_BYTES = 2**10
# Of the trainer's own data so much is copied at most, counted in entries; a container larger than this is left out.
_MOST_ENTRIES = 2**12
# Buffers up to this size are copied before the first window, even where they hold no floats: counters.
_SMALL_BYTES = 2**16

_CONTAINERS = (dict, defaultdict, OrderedDict, Counter, list, deque, set)
_PLAIN = (Number, str, bytes, type(None), tuple, frozenset, Tensor, *_CONTAINERS)


class Contents:
    """What plain containers held, and the values of small tensors in them; other objects are left as they are.

    Args:
        roots: Containers and tensors to begin with.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self._held: list[tuple[Any, Any]] = []
        self._copies: list[tuple[Tensor, int, Tensor]] = []
        self._large: list[tuple[Tensor, int]] = []
        seen, queue, entries = set[int](), deque(roots), 0
        while queue:
            value = queue.popleft()
            value = value.data if isinstance(value, UserDict) else value
            if isinstance(value, Tensor):
                self._note(value)
            if type(value) not in (*_CONTAINERS, tuple) or id(value) in seen or len(value) + entries > _MOST_ENTRIES:
                continue
            seen.add(id(value))
            entries += len(value)
            if type(value) is not tuple:
                self._held.append((value, value.copy()))
            queue.extend(value.values() if isinstance(value, dict) else value)

    def _note(self, tensor: Tensor) -> None:
        if tensor.is_inference():
            return
        if tensor.nbytes <= _TINY_BYTES:
            self._copies.append((tensor, tensor._version, tensor.detach().clone()))
        else:
            self._large.append((tensor, tensor._version))

    def put_back(self) -> None:
        for value, copy in self._held:
            value.clear()
            value.extend(copy) if isinstance(value, (list, deque)) else value.update(copy)
        with torch.no_grad():
            for tensor, version, values in self._copies:
                if tensor._version != version:
                    tensor.copy_(values)

    def was_written(self) -> bool:
        """Whether a tensor was written in place of which there is no copy."""
        return any(tensor._version != version for tensor, version in self._large)


class Attributes:
    """The plain data of an object: numbers, texts, containers of them.

    Args:
        owner: Its attributes. Of data sets and of this package nothing is looked at.
    """

    def __init__(self, owner: dict[str, Any]) -> None:
        self._owner = owner
        self._names = set(owner)
        self._values = dict(_plain(owner))
        self._contents = Contents(self._values.values())

    def put_back(self) -> None:
        for name in [name for name, _ in _plain(self._owner) if name not in self._names]:
            del self._owner[name]
        self._owner.update(self._values)
        self._contents.put_back()


def _plain(owner: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in owner.items():
        if isinstance(value, _PLAIN) and not name.startswith("_checkpointing") and not name.endswith("_dataset"):
            yield name, value


class MicroBatch:
    """One call of `training_step`, and what it found.

    Args:
        model: As it is called.
        owner: The attributes of the trainer.
        accelerator: Of accelerate.
        devices: Those that it may draw random numbers on.
        synced: See `Collectives`.
        args: Of the call.
        kwargs: Likewise.

    Attributes:
        collectives: Those that ran since.
        ran_collectives: Whether there were any in the first run that a second would repeat, once that is over.
    """

    def __init__(
        self,
        model: nn.Module,
        owner: dict[str, Any],
        accelerator: Any,
        devices: Sequence[torch.device],
        synced: Callable[[], None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.args, self.kwargs = args, kwargs
        self._model, self._accelerator = model, accelerator
        self._inputs = Contents((args, kwargs))
        self._attributes = Attributes(owner)
        self._random = [(device, random_state(device)) for device in devices]
        self._python, self._numpy = random.getstate(), numpy.random.get_state()
        self._syncs = getattr(model, "require_backward_grad_sync", True), accelerator.gradient_state.sync_gradients
        self.collectives = Collectives(model, synced)
        self.ran_collectives = False

    @contextmanager
    def found_again(self) -> Iterator[None]:
        """Around another run: all is as the first one found it."""
        for device, state in self._random:
            set_random_state(device, state)
        set_random_state(None, self._python)
        numpy.random.set_state(self._numpy)
        self._attributes.put_back()
        self._inputs.put_back()
        averages, is_last = self._syncs
        gradient_state = self._accelerator.gradient_state
        now = gradient_state.sync_gradients
        gradient_state._set_sync_gradients(is_last)
        try:
            with alone(self._model, averages, self.collectives.has_begun), self.collectives:
                yield
        finally:
            gradient_state._set_sync_gradients(now)

    @property
    def lost_inputs(self) -> bool:
        """Whether its inputs are not to be had again."""
        return self._inputs.was_written()


class Buffers:
    """The buffers of a model at the start of a window.

    In the first window all are copied that may change, in later ones those that did. Kernels of batch norm write
    without raising the version of a buffer, so theirs are copied always.
    """

    def __init__(self) -> None:
        self._changing: set[tuple[nn.Module, str]] = set()
        self._found: list[tuple[nn.Module, dict[str, Tensor | None], dict[str, int], dict[str, Tensor]]] = []
        self._num_windows = 0

    def remember(self, model: nn.Module) -> None:
        self._learn()
        found = []
        for module in model.modules():
            if buffers := dict(module._buffers):
                versions = {name: b._version for name, b in buffers.items() if b is not None and not b.is_inference()}
                copies = {
                    name: buffer.detach().clone()
                    for name, buffer in buffers.items()
                    if buffer is not None and self._may_change(module, name, buffer)
                }
                found.append((module, buffers, versions, copies))
        # At the end, since memory may run out before it.
        self._found = found
        self._num_windows += 1

    def _may_change(self, module: nn.Module, name: str, buffer: Tensor) -> bool:
        if isinstance(module, nn.modules.batchnorm._NormBase) or (module, name) in self._changing:
            return True
        # Large integers are the weights of quantised models.
        return self._num_windows == 0 and (buffer.is_floating_point() or buffer.nbytes <= _SMALL_BYTES)

    def _learn(self) -> None:
        for module, buffers, versions, copies in self._found:
            for name, version in versions.items():
                buffer = buffers[name]
                assert buffer is not None
                # Values are compared once, since that waits for the device.
                looks = self._num_windows == 1 and name in copies
                if buffer._version != version or (looks and not same_state(buffer, copies[name])):
                    self._changing.add((module, name))

    def lost(self) -> str:
        """Name of a buffer that was written and of which there is no copy; empty if there is none."""
        for module, buffers, versions, copies in self._found:
            for name, version in versions.items():
                buffer = buffers[name]
                if buffer is not None and name not in copies and buffer._version != version:
                    return f"{type(module).__name__}.{name}"
        return ""

    def note_sync(self) -> None:
        """They were written from outside, and what is in them now is what the forward finds."""
        with torch.no_grad():
            for _, buffers, versions, copies in self._found:
                for name in versions:
                    buffer = buffers[name]
                    assert buffer is not None
                    versions[name] = buffer._version
                    if name in copies:
                        copies[name].copy_(buffer)

    def put_back(self) -> None:
        with torch.no_grad():
            for module, buffers, versions, copies in self._found:
                module._buffers.clear()
                module._buffers.update(buffers)
                for name, values in copies.items():
                    buffer = buffers[name]
                    assert buffer is not None
                    buffer.copy_(values)
                    versions[name] = buffer._version  # which this has raised


class Window:
    """All micro-batches since gradients were dropped.

    Attributes:
        batches: In order; the last is the one that runs.
    """

    def __init__(self) -> None:
        self.batches: list[MicroBatch] = []
        self._buffers = Buffers()
        self._versions: list[tuple[Tensor, int]] = []
        self._had_gradients = False

    def add(self, batch: MicroBatch, model: nn.Module, weights: Sequence[Tensor]) -> None:
        """Begin a micro-batch, and a window if there is no gradient.

        Args:
            batch: What it finds.
            model: As it is called.
            weights: All that may get a gradient.
        """
        has_gradients = any(weight.grad is not None for weight in weights)
        if not has_gradients or not self.batches or self._is_stepped():
            self.batches = []
            self._had_gradients = has_gradients
            self._buffers.remember(model)
            self._versions = [(weight, weight._version) for weight in weights if not weight.is_inference()]
        self.batches.append(batch)

    def why_lost(self) -> str:
        """Why it cannot be run again with the same result; empty if it can."""
        if self._had_gradients:
            return "there were gradients before its first micro-batch, which are not to be had again"
        if self._is_stepped():
            return "weights were changed since its first micro-batch, as by an optimizer that steps within backward"
        if buffer := self._buffers.lost():
            return f"buffer {buffer} was written for the first time, and there is no copy of it"
        if any(batch.lost_inputs for batch in self.batches):
            return "inputs of the model were written in place"
        return ""

    def _is_stepped(self) -> bool:
        return any(weight._version != version for weight, version in self._versions)

    def close(self) -> None:
        """The optimizer has stepped: nothing of this is needed any more."""
        self.batches, self._versions = [], []

    def drop_gradients(self, weights: Iterable[Tensor]) -> None:
        for weight in weights:
            weight.grad = None

    def note_sync(self) -> None:
        """Buffers were sent from another rank, just now."""
        if len(self.batches) == 1:
            self._buffers.note_sync()

    def put_buffers_back(self) -> None:
        self._buffers.put_back()
