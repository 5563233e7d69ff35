"""What Hugging Face's own spelling of a flag says: its switches, its kwargs, and whether that is the user's word.

See NOTE [whose word counts] in `training_args`, which alone calls these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

from ckpt_trainer.distributed import fsdp_mode
from ckpt_trainer.flag_values import HF_OPTIONS, check_bool, nearest, read_dict

# Newest name first. 4.57 has the second name only.
HF_FLAG = ("activation_checkpointing", "gradient_checkpointing")
HF_KWARGS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")


def _spelled(args: Any, names: tuple[str, str]) -> dict[str, Any]:
    """What was given under HF's two names for one thing; under `new/old` where both hold the same."""
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    same = len(given) == 2 and given[names[0]] == given[names[1]]
    return {"/".join(names): given[names[0]]} if same else given


def _read_hf_flag(args: Any) -> tuple[str, str, bool] | None:
    given = _spelled(args, HF_FLAG)
    for name, value in given.items():
        check_bool(name, value)
    asked = [name for name, value in given.items() if value]
    said = not any(default_of(args, name) for name in HF_FLAG)
    return (f"{asked[0]}=True", "full", said) if asked else None


def read_hf_mode(args: Any, label: str, options: Mapping[str, Any], options_said: bool) -> tuple[str, str, bool] | None:
    """The mode that HF's flag asks for, the key `offload` of its kwargs in its place, or FSDP's own switch."""
    flag, mode = _read_hf_flag(args), getattr(args, "checkpointing_mode", None)
    own_said = mode not in (None, default_of(args, "checkpointing_mode"))
    # Kwargs that are a default of the args class do not make what the user said of the mode twice a conflict.
    if options.get("offload") and (options_said or not own_said):
        text = f"{label}['offload']=True"
        named, said = (f"{flag[0]} with {text}", flag[2]) if flag else (text, False)
        flag = named, "offload", options_said or said
    other = f"checkpointing_mode={mode!r}" if own_said else flag[0] if flag and flag[2] else None
    return fsdp_mode(vars(args), other) or flag


def read_hf_kwargs(args: Any) -> tuple[str, dict[str, Any], bool]:
    """How the user may have called it, its checked content, and whether it is the user's word."""
    given = {name: kwargs for name, value in _spelled(args, HF_KWARGS).items() if (kwargs := read_dict(name, value))}
    if len(given) == 2:
        # Not from a constructor (HF's prefers the newer name): one was set later, on args that are not ours.
        texts = " and ".join(f"{name}={kwargs!r}" for name, kwargs in given.items())
        raise ValueError(f"{texts} are two names of one setting. Set both to the same.")
    label, options = next(iter(given.items()), ("", {}))
    for key, value in options.items():
        if key not in HF_OPTIONS:
            raise ValueError(
                f"{label} has the key {key!r}, which is not one of {', '.join(HF_OPTIONS)}. "
                f"Did you mean {nearest(key, HF_OPTIONS)!r}?"
            )
        HF_OPTIONS[key](f"{label}[{key!r}]", value)
    defaults = [default_of(args, name) for name in HF_KWARGS]
    return label, options, options not in defaults


def default_of(args: Any, name: str, otherwise: Any = None) -> Any:
    """What the args class has as the default of a field; `otherwise` where it has no such field."""
    declared = type(args).__dataclass_fields__.get(name)
    if declared is None:
        return otherwise
    return declared.default if declared.default_factory is MISSING else declared.default_factory()
