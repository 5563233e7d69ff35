"""DeepSpeed beside activation checkpointing: versions under which no replay works, and its own checkpointing.

NOTE on ZeRO-3. It gathers the parameters of a module before its forward and empties them after it, also in a replay.
torch compares the tensors of a replay with those of its forward, and of a frozen parameter it holds the parameter
itself: emptied by then, of shape [0]. Versions of DeepSpeed that keep such parameters until backward is over have a list
of them on each module. Under the others the non-reentrant variant fails in the first backward, so it is refused before.
"""

from __future__ import annotations

import sys

from torch import nn

from ckpt_trainer.plan import Plan, Settings

_SECTION = "activation_checkpointing"
_KEPT_IN_REPLAYS = "ds_recompute_parameters"


def refuse_emptied(model: nn.Module, plan: Plan, settings: Settings) -> None:
    """Refuse replays under a DeepSpeed that empties frozen parameters in them.

    Args:
        model: As it is called in a step; also one that DeepSpeed has nothing to do with.
        settings: Where the user chose a `determinism_check`, it is theirs to say what is compared.

    Raises:
        ValueError: It does; the message says what else there is.
    """
    if settings.use_reentrant or "determinism_check" in settings.checkpoint_options:
        return
    if _replays(plan) and _empties_frozen(model):
        raise ValueError(
            "this version of DeepSpeed empties frozen parameters while ZeRO-3 replays a block, which torch takes for "
            "another result than that of the forward. Install DeepSpeed 0.19.3 or newer. Or use ZeRO-2, "
            "checkpointing_mode='selective' with checkpointing_save='expensive', which replays nothing, or "
            "checkpointing_use_reentrant=True."
        )


def deepspeed_notes(model: nn.Module, plan: Plan) -> list[str]:
    """What to know where DeepSpeed's own activation checkpointing and this plan meet; empty where they do not."""
    if not plan.is_active:
        return []
    found = []
    config = vars(model).get("config")
    if _is_configured():
        found.append(
            "deepspeed.checkpointing.configure() was called. What this model hands to deepspeed.checkpointing is replayed "
            "by DeepSpeed, and to recompute the block around it gains nothing: use one of them. For DeepSpeed's, set "
            "checkpointing_mode='none'."
        )
    elif isinstance(config, dict) and config.get(_SECTION):
        found.append(
            f"the section {_SECTION!r} of the DeepSpeed config does nothing: DeepSpeed follows it only in models that call "
            "deepspeed.checkpointing. What is recomputed here follows the checkpointing_* arguments; remove it."
        )
    return found


def _empties_frozen(model: nn.Module) -> bool:
    return any(
        hasattr(parameter, "ds_id") and not parameter.requires_grad and not hasattr(module, _KEPT_IN_REPLAYS)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )


def _replays(plan: Plan) -> bool:
    return any(
        action.kind == "recompute" or action.save not in ((), ("expensive",)) for action in plan.actions.values()
    )


def _is_configured() -> bool:
    """Whether the user set up DeepSpeed's own activation checkpointing; it is not imported for that."""
    own = getattr(sys.modules.get("deepspeed"), "checkpointing", None)
    return own is not None and bool(own.is_configured())
