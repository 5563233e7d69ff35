"""What a block reads or changes besides its inputs: random numbers and buffers.

A replay gives the same tensors as the forward only if both are as they were. `BlockState` looks at each forward from
outside, remembers what it took, and puts that in place for a replay. It knows nothing of checkpoints.

NOTE on looking. No name of a module or rate tells for sure that a block draws random numbers or writes a buffer, nor
does its first forward: rates are raised, statistics begin later. So each forward is looked at. The state of a generator
before and after tells whether it drew; only then it is kept, and only then a replay restores anything. Reading a state
copies 5 KB on the host and 16 bytes of a device's generator; the device does not wait. Buffers that were written are
known by object and version; before a forward those are copied that are small, or known to change.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

# Buffers up to this size are copied before every forward, larger ones only if they are known to change.
_SMALL_BYTES = 2**16

Buffers = dict[str, Tensor | None]


@dataclass
class Before:
    """What a replay has to find as it was before the forward.

    Args:
        random: (device, state) of each generator that the forward drew from; None stands for Python's `random`.
        buffers: (module, its buffers), for the modules of which a buffer was written, replaced or added.
        training: Which of the block's modules were in training mode.
        unrestored: It drew from a generator, and this is why that is not restored; empty if it is, or did not draw.
    """

    random: list[tuple[torch.device | None, Any]] = field(default_factory=list)
    buffers: list[tuple[nn.Module, Buffers]] = field(default_factory=list)
    training: list[tuple[nn.Module, bool]] = field(default_factory=list)
    unrestored: str = ""


class BlockState:
    """The random numbers and buffers of one block.

    Args:
        module: The block.
        restore_random: None keeps the state of the generators that a forward draws from; True of all; False of none.

    Attributes:
        modules: The block and all modules below it.
        watched: Whether a forward has been looked at.
    """

    def __init__(self, module: nn.Module, restore_random: bool | None = None) -> None:
        self.modules = list(module.modules())
        self._restore_random = restore_random
        self._changing: set[tuple[nn.Module, str]] = set()
        self._uses_python_random = False
        self.watched = False

    @contextmanager
    def remember(self, devices: Sequence[torch.device]) -> Iterator[Before]:
        """Around a forward: what is yielded holds, when the forward is over, all that a replay needs.

        Args:
            devices: Devices on which the block may draw random numbers, the host's always included.

        Raises:
            RuntimeError: The forward wrote a large buffer in place that no forward before it wrote.
        """
        before = Before(training=[(module, module.training) for module in self.modules])
        buffers = [(module, _Seen(dict(module._buffers), self._copies(module))) for module in self.modules]
        states = self._random_states(devices)
        yield before
        after = self._random_states(devices)
        drew = [not same_state(old, new) for (_, old), (_, new) in zip(states, after, strict=True)]
        drawn = [state for state, has_drawn in zip(states, drew, strict=True) if has_drawn]
        before.unrestored = self._why_unrestored([device for device, _ in drawn])
        if self._restore_random is not False:
            before.random = states if self._restore_random else drawn
        self._uses_python_random |= any(device is None for device, _ in before.random)
        before.buffers = [(module, seen.as_found()) for module, seen in buffers if self._note_changes(module, seen)]
        self.watched = True

    def _why_unrestored(self, drawn: Sequence[torch.device | None]) -> str:
        """Why a replay will not see the numbers that were drawn from the generators of these devices."""
        if drawn and self._restore_random is False:
            return "preserve_rng_state=False"
        lost = next((device for device in drawn if device is not None and not _restores(device)), None)
        return f"the generator of {lost} does not give the same numbers again" if lost is not None else ""

    def _random_states(self, devices: Sequence[torch.device]) -> list[tuple[torch.device | None, Any]]:
        states: list[tuple[torch.device | None, Any]] = [(device, random_state(device)) for device in devices]
        # Rare and slow to read, so only where the first forward used it.
        if self._uses_python_random or not self.watched:
            states.append((None, random.getstate()))
        return states

    def _copies(self, module: nn.Module) -> dict[str, Tensor]:
        """Copies of the buffers of one module that its forward may write in place."""
        return {
            key: buffer.clone()
            for key, buffer in module._buffers.items()
            if buffer is not None and ((module, key) in self._changing or self._may_change(module, buffer))
        }

    def _may_change(self, module: nn.Module, buffer: Tensor) -> bool:
        if buffer.nbytes <= _SMALL_BYTES or _keeps_statistics(module):
            return True
        # At first all that may: large integers are the weights of a quantized model (GPTQ, AWQ), constant.
        return not self.watched and buffer.is_floating_point()

    def _note_changes(self, module: nn.Module, seen: _Seen) -> bool:
        """Whether a forward changed a buffer of this module."""
        changed = module._buffers.keys() != seen.found.keys()
        for key, buffer in seen.found.items():
            now = module._buffers.get(key)
            if now is not buffer:
                changed = True
            elif now is not None and self._was_written(module, key, now, seen):
                self._changing.add((module, key))
                changed = True
        return changed

    def _was_written(self, module: nn.Module, key: str, buffer: Tensor, seen: _Seen) -> bool:
        raised = buffer._version != seen.versions[key]
        if key in seen.copies:
            # Kernels of batch norm write without raising the version; others that do are looked for once.
            return raised or _keeps_statistics(module) or not (self.watched or _same_values(buffer, seen.copies[key]))
        if raised:
            raise RuntimeError(
                f"buffer {key!r} of {type(module).__name__} ({buffer.nbytes} bytes) was written in place by a forward, "
                "and by none before it, so that its replay cannot be exact. Keep what this block stores: "
                'checkpointing_modules={"<its name>": "none"}.'
            )
        return False


class _Seen:
    """The buffers of one module as they were found before a forward."""

    def __init__(self, found: Buffers, copies: dict[str, Tensor]) -> None:
        self.found = found
        self.copies = copies
        self.versions = {key: buffer._version for key, buffer in found.items() if buffer is not None}

    def as_found(self) -> Buffers:
        return {key: self.copies.get(key, buffer) for key, buffer in self.found.items()}


def devices_of(tensors: Sequence[Tensor]) -> list[torch.device]:
    """The host, and the devices that the tensors are on."""
    devices = [torch.device("cpu")]
    for tensor in tensors:
        if tensor.device not in devices and tensor.device.type != "meta":
            devices.append(tensor.device)
    return devices


@contextmanager
def as_before(before: Before) -> Iterator[None]:
    """Modes, generators and buffers as they were before a forward; what a replay draws and writes is undone."""
    switched = [module for module, training in before.training if module.training != training]
    current = [(module, dict(module._buffers)) for module, _ in before.buffers]
    states = [(device, random.getstate() if device is None else random_state(device)) for device, _ in before.random]
    try:
        _toggle_training(switched)
        for device, state in before.random:
            set_random_state(device, state)
        for module, buffers in before.buffers:
            # Cloned again for each replay: a graph that is kept may be replayed more than once.
            _set_buffers(module, {key: None if b is None else b.clone() for key, b in buffers.items()})
        yield
    finally:
        for module, buffers in current:
            _set_buffers(module, buffers)
        for device, state in states:
            set_random_state(device, state)
        _toggle_training(switched)


def _toggle_training(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        module.training = not module.training


def _set_buffers(module: nn.Module, buffers: Buffers) -> None:
    module._buffers.clear()
    module._buffers.update(buffers)


def _same_values(buffer: Tensor, copy: Tensor) -> bool:
    # Fake ones have none to compare.
    return isinstance(buffer, FakeTensor) or torch.equal(buffer, copy)


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase)


def random_state(device: torch.device) -> Tensor:
    """State of the generator of a device."""
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


@cache
def _restores(device: torch.device) -> bool:
    """Whether a generator gives the same numbers again when it is put back; not so on every device that torch has."""
    if device.type == "cpu":
        return True
    state = random_state(device)
    first = _drop(device)
    set_random_state(device, state)
    second = _drop(device)
    set_random_state(device, state)
    return torch.equal(first, second)


def _drop(device: torch.device) -> Tensor:
    return torch.nn.functional.dropout(torch.ones(1024, device=device))


def set_random_state(device: torch.device | None, state: Any) -> None:
    """Put the generator of a device, or Python's `random` (None), into a state."""
    if device is None:
        random.setstate(state)
    elif device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def same_state(old: Any, new: Any) -> bool:
    """Whether nothing was drawn between two states of one generator."""
    return torch.equal(old, new) if isinstance(old, Tensor) else bool(old == new)
