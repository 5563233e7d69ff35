"""What a block reads or changes besides its inputs: random numbers and buffers.

A replay gives the same tensors as the forward only if both are as they were. `BlockState` finds out what a block
touches, remembers it before a forward and puts it in place for a replay. It knows nothing of checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Names under which modules and configs keep the rate of something random: attention_dropout, drop_prob, layerdrop,
# router_jitter_noise, dropout_rate, attn_pdrop, ...
_RANDOM_NAME = re.compile(r"drop|noise|jitter", re.IGNORECASE)

Slot = tuple[nn.Module, str]
Snapshot = list[tuple[nn.Module, str, Tensor]]


class BlockState:
    """The random sites and buffers of one block.

    Both are told in two ways, because neither suffices: by reading the modules (a rate may be raised later, batch norm
    does not mark its buffers as changed), and by watching the first forward (a module may draw random numbers or
    write a buffer in a way that no name tells).

    Args:
        module: The block.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._sites = list(_random_sites(module))
        self._slots: list[Slot] = [
            (m, key) for m in module.modules() for key, buffer in m._buffers.items() if buffer is not None
        ]
        self._changing = {slot for slot in self._slots if _is_running_statistic(slot)}
        self._draws = False
        self._watched_in: set[bool] = set()

    @property
    def watched(self) -> bool:
        """Whether a forward in the present mode (training or evaluation) has been watched."""
        return self._module.training in self._watched_in

    def draws_random_numbers(self) -> bool:
        """Whether a forward now may draw random numbers: a rate above zero in a module in training mode."""
        return self._draws or any(
            module.training and isinstance(rate := getattr(owner, name, 0), (int, float)) and rate > 0
            for module, owner, name in self._sites
        )

    def snapshot(self) -> Snapshot:
        """Copies of the buffers that a forward changes, taken before it; before the first, of all that it may change."""
        wanted = self._changing if self.watched else self._changing | set(filter(_may_change, self._slots))
        slots = [slot for slot in self._slots if slot in wanted]
        return [(module, key, _buffer(module, key).clone()) for module, key in slots]

    @contextmanager
    def watch(self, snapshot: Snapshot, device: torch.device) -> Iterator[None]:
        """Around the first forward in a mode: note whether it drew random numbers and which buffers it changed."""
        before = _random_state(device)
        yield
        self._draws |= any(not torch.equal(a, b) for a, b in zip(before, _random_state(device), strict=True))
        self._changing |= {(module, key) for module, key, copy in snapshot if not _same(_buffer(module, key), copy)}
        self._watched_in.add(self._module.training)

    def needed(self, snapshot: Snapshot) -> Snapshot:
        """The part of a snapshot that a replay needs."""
        return [entry for entry in snapshot if (entry[0], entry[1]) in self._changing]


@contextmanager
def buffers_as(snapshot: Snapshot) -> Iterator[None]:
    """Let modules see the buffers of a snapshot, and write to copies of them; theirs come back untouched."""
    current = [(module, key, module._buffers[key]) for module, key, _ in snapshot]
    try:
        for module, key, copy in snapshot:
            # Cloned again for each replay: a graph that is kept may be replayed more than once.
            module._buffers[key] = copy.clone()
        yield
    finally:
        for module, key, buffer in current:
            module._buffers[key] = buffer


def _random_sites(block: nn.Module) -> Iterator[tuple[nn.Module, Any, str]]:
    """(module whose training mode counts, object that holds the rate, name of the rate)."""
    for module in block.modules():
        named = [name for name, value in vars(module).items() if _RANDOM_NAME.search(name) and _is_rate(value)]
        if "p" in vars(module) and _RANDOM_NAME.search(type(module).__name__):
            named.append("p")
        if isinstance(module, nn.RReLU):
            named.append("upper")
        yield from ((module, module, name) for name in named)
        config = vars(module).get("config")
        if config is not None:
            # A forward may pass config.attention_dropout straight to a function.
            names = [name for name, value in vars(config).items() if _RANDOM_NAME.search(name) and _is_rate(value)]
            yield from ((module, config, name) for name in names)


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_running_statistic(slot: Slot) -> bool:
    # Its kernel writes the buffers without raising their version.
    return isinstance(slot[0], nn.modules.batchnorm._NormBase)


def _may_change(slot: Slot) -> bool:
    # Large buffers of integers are weights of a quantized model (GPTQ, AWQ): constant, and too much to copy.
    buffer = _buffer(*slot)
    return buffer.is_floating_point() or buffer.nbytes < 2**20


def _buffer(module: nn.Module, key: str) -> Tensor:
    buffer = module._buffers[key]
    assert buffer is not None
    return buffer


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states
