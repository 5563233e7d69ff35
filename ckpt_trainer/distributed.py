"""What several processes change: DDP's search for unused parameters, FSDP's own switch, what the reentrant variant breaks.

NOTE on reentrant. Its replays run a backward of their own, which wrappers take for a whole one. DDP then takes the
parameters of a block for ready after the replay: one that searches for unused parameters counts them twice and fails,
and a second forward before the backward is averaged without its part, in LoRA without an error. FSDP reduces the
gradients of a block once for each replay instead of once for each backward. The non-reentrant variant is one backward
for all of them, so nothing of this concerns it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import str_to_bool
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

_FSDP_SWITCH = "activation_checkpointing"
_ADVICE = "Set checkpointing_use_reentrant=False."


def fsdp_mode(arguments: Mapping[str, Any], other: str | None) -> tuple[str, str, bool] | None:
    """The mode that FSDP's own switch asks for, where FSDP is on.

    `fsdp_config` goes before what `accelerate launch` left in the environment.

    Args:
        arguments: The fields of the training arguments. Without those of FSDP, as for a loop of one's own, it is off.
        other: What else the user said of the mode, as it reads.

    Returns:
        How the switch reads, the mode, True for the user's word. None where it is off.

    Raises:
        ValueError: The switch is on and something else was said.
    """
    is_on = "fsdp" in arguments and (arguments["fsdp"] or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")))
    config: Any = arguments.get("fsdp_config")
    config = config if isinstance(config, Mapping) else {}
    on = _read_fsdp(config, _FSDP_SWITCH) if is_on else None
    if on is None:
        return None
    if other is not None:
        raise ValueError(
            f"{on} and {other} both say what is done to each block. Remove the first to follow the second, or the "
            "second to recompute every block, which is what the first means."
        )
    offload = _read_fsdp(config, f"{_FSDP_SWITCH}_offload")
    return (on, "full", True) if offload is None else (f"{on} with {offload}", "offload", True)


def _read_fsdp(config: Mapping[str, Any], key: str) -> str | None:
    """How a switch of FSDP reads, if it is on."""
    for name in (key, f"fsdp_{key}"):
        if name in config:
            return f"fsdp_config[{name!r}]={config[name]!r}" if str_to_bool(str(config[name])) else None
    name = f"FSDP_{key.upper()}"
    value = os.environ.get(name, "false")
    return f"{name}={value} of accelerate" if str_to_bool(value) else None


def take_over(plugin: Any) -> bool:
    """Turn off accelerate's own checkpointing under FSDP, and say whether it was on.

    Its replays draw other dropout masks than their forward, and it changes the names of parameters.

    Args:
        plugin: accelerate's, None without FSDP.
    """
    was_on = bool(str_to_bool(str(getattr(plugin, _FSDP_SWITCH, False))))  # transformers 4 hands texts on
    for name in (_FSDP_SWITCH, f"{_FSDP_SWITCH}_offload"):
        if hasattr(plugin, name):
            setattr(plugin, name, False)
    return was_on


@contextmanager
def unused_parameters_decided(arguments: MutableMapping[str, Any], use_reentrant: bool) -> Iterator[None]:
    """While entered, `ddp_find_unused_parameters` is set where the user left it to transformers.

    To what transformers takes without checkpointing; with it, it takes False always, so that a model with unused
    parameters fails for no reason. Only the reentrant variant needs that.

    Args:
        arguments: The fields of the training arguments.
        use_reentrant: The reentrant variant was asked for.
    """
    name = "ddp_find_unused_parameters"
    decides = arguments.get(name) is None
    if decides:
        arguments[name] = not use_reentrant
    try:
        yield
    finally:
        if decides:
            arguments[name] = None


def refuse_reentrant_wrapped(model: nn.Module) -> None:
    """Refuse the reentrant variant under wrappers that it does not work with.

    Raises:
        ValueError: The model is under FSDP, or under DDP that searches for unused parameters.
    """
    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()):
        raise ValueError(
            "checkpointing_use_reentrant=True does not work under FSDP, which would reduce the gradients of a block once "
            f"for each replay instead of once for each backward, and give others. {_ADVICE}"
        )
    if isinstance(model, DistributedDataParallel) and model.find_unused_parameters and not model.static_graph:
        raise ValueError(
            "checkpointing_use_reentrant=True does not work under DDP with find_unused_parameters=True, which would count "
            f"the parameters of a block twice. {_ADVICE} Or do not set ddp_find_unused_parameters."
        )


def wrapper_notes(model: nn.Module) -> list[str]:
    """What is to be said of the wrappers of a model."""
    if not any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return []
    return [
        "this model is under FSDP1, which runs on accelerators only and is covered by no test here. FSDP2 is: set "
        "fsdp_version 2."
    ]


def refuse_wrapped_blocks(model: nn.Module) -> None:
    """Refuse a model of which blocks are recomputed already, outside of what this package does to them.

    Raises:
        ValueError: Modules of it are in torch's `checkpoint_wrapper`.
    """
    number = sum(isinstance(module, CheckpointWrapper) for module in model.modules())
    if number:
        raise ValueError(
            f"{number} modules of {type(model).__name__} are wrapped in torch's checkpoint_wrapper, so that they would be "
            "recomputed twice. Do not wrap them (with accelerate: turn off fsdp_activation_checkpointing), or set "
            "checkpointing_mode='none'."
        )


@contextmanager
def one_forward_checked(model: nn.Module, checkpointed: Counter[str], replays: Counter[str]) -> Iterator[None]:
    """While entered, the reentrant variant under DDP is refused a second forward before the backward of the first.

    Args:
        model: As it is called.
        checkpointed: Calls of blocks that backward will replay, counted by others.
        replays: Likewise their replays.
    """
    if not isinstance(model, DistributedDataParallel) or model.static_graph:
        yield
        return
    before = checkpointed.total() - replays.total()

    def check(module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and checkpointed.total() - replays.total() > before:
            raise ValueError(
                "checkpointing_use_reentrant=True gives wrong gradients under DDP for two forwards before a backward: "
                f"those of one process are averaged before the second is there. {_ADVICE} Without gradient "
                "accumulation, ddp_static_graph=True helps too."
            )

    handle = model.register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()
