"""What several processes change: DDP's search for unused parameters, FSDP's own switch, what the reentrant variant breaks.

NOTE on reentrant. Its replays run a backward of their own, which wrappers take for a whole one. DDP then takes the
parameters of a block for ready after the replay: one that searches for unused parameters counts them twice and fails,
and a second forward before the backward is averaged without its part, in LoRA without an error. FSDP reduces the
gradients of a block once for each replay instead of once for each backward. The non-reentrant variant is one backward
for all of them, so nothing of this concerns it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import str_to_bool
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from ckpt_trainer.plan import Settings

logger = logging.get_logger(__name__)

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
    if not is_on:
        return None
    on, offload = _read_fsdp(config, _FSDP_SWITCH), _read_fsdp(config, f"{_FSDP_SWITCH}_offload")
    if on is None:
        if offload is not None:
            logger.warning_once(f"No effect without {_FSDP_SWITCH} of FSDP: {offload}. Remove it or set that, too.")
        return None
    if other is not None:
        raise ValueError(
            f"{on} and {other} both say what is done to each block. Remove the first to follow the second, or the "
            "second to recompute every block, which is what the first means."
        )
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


def may_replay_reentrant(settings: Settings, has_policy: bool) -> bool:
    """Whether the reentrant variant may replay a block, as far as that is known before there is a plan."""
    if settings.plan is not None:
        replays = settings.plan.count("recompute") > 0
    else:
        replays = has_policy or settings.mode != "none" or any(part.mode != "none" for part in settings.modules)
    return settings.use_reentrant and replays


@contextmanager
def unused_parameters_decided(arguments: MutableMapping[str, Any], reentrant: bool) -> Iterator[None]:
    """While entered, `ddp_find_unused_parameters` is set where the user left it to transformers.

    To what transformers takes without checkpointing; with it, it takes False always, so that a model with unused
    parameters fails for no reason. Only the reentrant variant needs that.

    Args:
        arguments: The fields of the training arguments.
        reentrant: The reentrant variant may replay a block.
    """
    name = "ddp_find_unused_parameters"
    decides = arguments.get(name) is None
    if decides:
        arguments[name] = not reentrant
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


def is_under_fsdp1(model: nn.Module) -> bool:
    """Whether parts of a model are wrapped by FSDP of version 1, whose weights are whole only while they run."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def wrapper_notes(model: nn.Module) -> list[str]:
    """What is to be said of the wrappers of a model."""
    if not is_under_fsdp1(model):
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


class Turns:
    """Which forwards of a model backward replays, so that two before one backward are told from one that was dropped.

    Attributes:
        begun: How many forwards with gradients were begun, where that matters.
    """

    def __init__(self) -> None:
        self.begun = 0
        self._last = 0, 0  # the forward replayed last, and how many were begun then

    def replay(self, forward: int) -> None:
        """To be called before each replay of a call of a block.

        Args:
            forward: What `begun` was in that call.

        Raises:
            ValueError: Another forward was replayed since this one began.
        """
        last, begun = self._last
        if last != forward and begun >= forward:
            raise ValueError(
                "checkpointing_use_reentrant=True gives wrong gradients under DDP for two forwards before a backward: "
                f"those of one process are averaged before all are there. {_ADVICE} Without gradient accumulation, "
                "ddp_static_graph=True helps too."
            )
        self._last = forward, self.begun


@contextmanager
def one_forward_checked(model: nn.Module, turns: Turns) -> Iterator[None]:
    """While entered, the reentrant variant under DDP is refused two forwards before a backward, and unused parameters.

    Args:
        model: As it is called.
        turns: Is told of each replay by others.

    Raises:
        RuntimeError: That of DDP for unused parameters, with what helps here.
    """
    if not isinstance(model, DistributedDataParallel) or model.static_graph:
        yield
        return

    def begin(module: nn.Module, args: Any) -> None:
        turns.begun += torch.is_grad_enabled()

    handle = model.register_forward_pre_hook(begin)
    try:
        yield
    except RuntimeError as error:
        if "find_unused_parameters=True" not in str(error):
            raise
        raise RuntimeError(
            f"Parameters got no gradient, which checkpointing_use_reentrant=True does not go with under DDP. {_ADVICE} "
            f"DDP's own advice, find_unused_parameters=True, needs that, too. It says: {error}"
        ) from error
    finally:
        handle.remove()
