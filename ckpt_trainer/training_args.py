"""The flags: fields, help, validation, and `settings_of`, their only reader.

Below the trainer there is no `TrainingArguments`, only the `Settings` made here. HF has its own spelling of some of
these flags (`gradient_checkpointing`, in 5.x `activation_checkpointing`, and their kwargs); a script that uses it gets
what it asks for.

NOTE [whose word counts]
Nobody records which fields a user passed, so a value that equals the default of the args class is taken as not said
(TRL's configs have `gradient_checkpointing=True` there). Said on one side only: that side decides. Said on both sides:
they must agree, else ValueError. Said on neither: our flag where a subclass changed its default, else HF's. HF's flag
set to False is never a word: 5.x writes False wherever nothing was given.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, cast

from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.utils import logging

from ckpt_trainer.plan import INPUT_GRADS, MODES, PLANNED_MODES, Settings

logger = logging.get_logger(__name__)

# Newest name first. 4.57 has the second name only.
_HF_FLAG = ("activation_checkpointing", "gradient_checkpointing")
_HF_KWARGS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
_TWIN = {one: other for pair in (_HF_FLAG, _HF_KWARGS) for one, other in (pair, pair[::-1])}


@dataclass
class CheckpointingArguments:
    """The flags alone, to be put before any args class: `class MyArgs(CheckpointingArguments, SFTConfig)`.

    HF's two names for one thing (`activation_checkpointing`, `gradient_checkpointing`, and their kwargs) stay equal
    when one of them is set on the object later.

    Raises:
        ValueError: A value is not valid, or a flag and HF's spelling of it ask for different things.
    """

    checkpointing_mode: str | None = field(
        default=None,
        metadata={
            "help": "What happens to the activations of each block: `none` stores them all, `full` stores the inputs of "
            "the block and rebuilds the rest in backward. Not set: `full`."
        },
    )
    checkpointing_modules: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Modes for parts of the model, a dict of module glob to mode; `text`, `vision`, `audio` name whole "
            'towers: \'{"vision": "full", "text": "none"}\'. The first name that matches a block decides; blocks '
            "without one follow checkpointing_mode."
        },
    )
    checkpointing_every_n: int = field(
        default=1,
        metadata={"help": "Rebuild only every n-th block of each stack, counted from the first block of the stack."},
    )
    checkpointing_skip_frozen: bool = field(
        default=True,
        metadata={"help": "Run frozen blocks below the first trainable parameter without graph, recompute, backward."},
    )
    checkpointing_use_reentrant: bool = field(
        default=False,
        metadata={"help": "The reentrant variant of torch's checkpoint; refused where it gives wrong gradients."},
    )
    checkpointing_input_grads: str = field(
        default="auto",
        metadata={"help": "Make inputs require grad: `auto` (of blocks, where reentrant needs it), `always`, `never`."},
    )
    checkpointing_self_check: bool = field(
        default=True,
        metadata={"help": "After the first backward: has a recomputed block lost a gradient? An error if it has."},
    )

    _constructed = False  # Not annotated, so not a field.

    def __post_init__(self) -> None:
        for name in ("checkpointing_modules", *_HF_KWARGS):
            if isinstance(getattr(self, name, None), str):
                _read_dict(name, getattr(self, name))  # Before super, whose parser fails without naming the flag.
        # Alone they are flags for a loop of one's own.
        if isinstance(self, TrainingArguments):
            super().__post_init__()  # type: ignore[misc]
        # Not by _VALID_DICT_FIELDS: a list on this mixin would hide the longer one of the class it is mixed with.
        if isinstance(self.checkpointing_modules, str):
            self.checkpointing_modules = _read_dict("checkpointing_modules", self.checkpointing_modules)
        self.settings()
        self._constructed = True

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # Not during __init__, which sets every field in turn: the default of one name would overwrite the other.
        if self._constructed and name in _TWIN:
            super().__setattr__(_TWIN[name], value)

    def settings(self) -> Settings:
        """The flags as they stand now. Raises what `settings_of` raises."""
        return settings_of(cast(TrainingArguments, self))

    def to_json_string(self) -> str:
        """As HF's, with a `context_fn` by its name instead of a TypeError; `to_dict` keeps it, to rebuild from."""
        return json.dumps(self.to_dict(), indent=2, default=_name_of_function)  # type: ignore[attr-defined]


@dataclass
class CheckpointTrainingArguments(CheckpointingArguments, TrainingArguments):
    """`transformers.TrainingArguments` with the flags of `CheckpointingArguments`."""


@dataclass
class CheckpointSeq2SeqTrainingArguments(CheckpointingArguments, Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with the flags of `CheckpointingArguments`."""


_DEFAULTS: dict[str, Any] = {flag.name: flag.default for flag in fields(CheckpointingArguments)}


def settings_of(args: TrainingArguments) -> Settings:
    """What the flags of `args` ask for, HF's spelling included; validated, whenever they were set.

    Warns once where flags were given that nothing can follow from, because no block is checkpointed.

    Args:
        args: Ours or any `TrainingArguments`; where it has no flags of ours, they have their defaults.

    Raises:
        ValueError: A value is not valid, or a flag and HF's spelling of it ask for different things.
    """
    label, options, options_said = _read_hf_kwargs(args)
    own = {flag: getattr(args, flag, _DEFAULTS[flag]) for flag in _CHECKS}
    for flag, check in _CHECKS.items():
        check(flag, own[flag])

    def settle(flag: str, key: str) -> Any:
        theirs = (f"{label}[{key!r}]={options[key]!r}", options[key], options_said) if key in options else None
        return _settle(args, flag, own[flag], theirs)

    hf_flag = _read_hf_flag(args)
    settings = Settings(
        mode=_settle(args, "checkpointing_mode", own["checkpointing_mode"], hf_flag) or "full",
        modules=_read_modules(getattr(args, "checkpointing_modules", None)),
        every_n=settle("checkpointing_every_n", "every_n_layers"),
        skip_frozen=own["checkpointing_skip_frozen"],
        use_reentrant=settle("checkpointing_use_reentrant", "use_reentrant"),
        input_grads=own["checkpointing_input_grads"],
        self_check=own["checkpointing_self_check"],
        preserve_rng_state=options.get("preserve_rng_state"),
        use_cache=getattr(args, "use_cache", None),
        named=own["checkpointing_mode"] is not None or (hf_flag is not None and hf_flag[2]),
        checkpoint_options={key: options[key] for key in _TORCH_OPTIONS if key in options},
    )
    _refuse_reentrant_options(settings, label)
    idle = {label: options and options_said, "checkpointing_every_n": own["checkpointing_every_n"] != 1}
    _warn_without_effect(settings, [name for name, given in idle.items() if given])
    return settings


def settings_of_flags(flags: Mapping[str, Any]) -> Settings:
    """Settings from flags without their prefix, and options of torch's checkpoint, for a loop of one's own.

    Raises:
        TypeError: There is no such flag or option; names the nearest.
        ValueError: A value is not valid.
    """
    names = [name.removeprefix("checkpointing_") for name in _DEFAULTS]
    options = [name for name in _HF_OPTIONS if name not in ("every_n_layers", "offload", "use_reentrant")]
    for flag in flags:
        if flag not in names and flag not in options:
            valid = [*names, *options]
            raise TypeError(f"{flag!r} is not one of {', '.join(valid)}. Did you mean {_nearest(flag, valid)!r}?")
    arguments = CheckpointingArguments(**{f"checkpointing_{name}": flags[name] for name in names if name in flags})
    arguments.gradient_checkpointing_kwargs = {name: flags[name] for name in options if name in flags}
    return arguments.settings()


def _read_modules(value: Any) -> tuple[tuple[str, str], ...]:
    modules = _read_dict("checkpointing_modules", value)
    for name, mode in modules.items():
        if not isinstance(name, str) or not name:
            raise _invalid("a name in checkpointing_modules", name, "a module glob or one of text, vision, audio", "*")
        _check_mode(f"checkpointing_modules[{name!r}]", mode)
    return tuple(modules.items())


def _read_dict(name: str, value: Any) -> dict[Any, Any]:
    example = '{"vision": "full"}' if name == "checkpointing_modules" else '{"every_n_layers": 2}'
    try:
        found = json.loads(value) if isinstance(value, str) else {} if value is None else value
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}={value!r} is not JSON: {error}. Write it like '{example}'.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name}={value!r} is not a dict. Write it like {example}.")
    return found


def _name_of_function(value: Any) -> str:
    if not callable(value):
        raise TypeError(f"{value!r} in the training arguments has no JSON form.")
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


# What HF's spelling says: the flag, and the keys of its kwargs.


def _spelled(args: TrainingArguments, names: tuple[str, str]) -> dict[str, Any]:
    """What was given under HF's two names for one thing; under `new/old` where both hold the same."""
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    same = len(given) == 2 and given[names[0]] == given[names[1]]
    return {"/".join(names): given[names[0]]} if same else given


def _read_hf_flag(args: TrainingArguments) -> tuple[str, str, bool] | None:
    given = _spelled(args, _HF_FLAG)
    for name, value in given.items():
        _check_bool(name, value)
    asked = [name for name, value in given.items() if value]
    said = not any(_default_of(args, name) for name in _HF_FLAG)
    return (f"{asked[0]}=True", "full", said) if asked else None


def _read_hf_kwargs(args: TrainingArguments) -> tuple[str, dict[str, Any], bool]:
    """How the user may have called it, its checked content, and whether it is the user's word."""
    given = {name: kwargs for name, value in _spelled(args, _HF_KWARGS).items() if (kwargs := _read_dict(name, value))}
    if len(given) == 2:
        # Not from a constructor (HF's prefers the newer name): one was set later, on args that are not ours.
        texts = " and ".join(f"{name}={kwargs!r}" for name, kwargs in given.items())
        raise ValueError(f"{texts} are two names of one setting. Set both to the same.")
    label, options = next(iter(given.items()), ("", {}))
    for key, value in options.items():
        if key not in _HF_OPTIONS:
            raise ValueError(
                f"{label} has the key {key!r}, which is not one of {', '.join(_HF_OPTIONS)}. "
                f"Did you mean {_nearest(key, _HF_OPTIONS)!r}?"
            )
        _HF_OPTIONS[key](f"{label}[{key!r}]", value)
    defaults = [_default_of(args, name) for name in _HF_KWARGS]
    return label, options, options not in defaults


def _default_of(args: TrainingArguments, name: str) -> Any:
    declared = type(args).__dataclass_fields__.get(name)
    if declared is None:
        return _DEFAULTS.get(name)
    return declared.default if declared.default_factory is MISSING else declared.default_factory()


def _settle(args: TrainingArguments, flag: str, value: Any, theirs: tuple[str, Any, bool] | None) -> Any:
    """The value that counts, see NOTE [whose word counts]. `theirs`: how HF's spelling reads, its value, was it said."""
    if theirs is None:
        return value
    text, their_value, their_said = theirs
    if not their_said:
        return their_value if value == _DEFAULTS[flag] else value
    if value not in (their_value, _default_of(args, flag)):
        raise ValueError(f"{flag}={value!r} and {text} ask for different things. Remove one of them.")
    return their_value


def _refuse_reentrant_options(settings: Settings, label: str) -> None:
    refused = [key for key in ("context_fn", "debug") if settings.checkpoint_options.get(key)]
    if settings.use_reentrant and refused:
        raise ValueError(
            f"{label}: use_reentrant=True cannot be combined with {', '.join(refused)}. Remove one of them."
        )


def _warn_without_effect(settings: Settings, given: list[str]) -> None:
    given += ["checkpointing_modules"] if settings.modules else []
    if given and "full" not in (settings.mode, *dict(settings.modules).values()):
        logger.warning_once(f"No effect in checkpointing_mode='none': {', '.join(given)}. Remove it or set a mode.")


# Checks of one value. Each raises ValueError with the flag as the user typed it, the value and the nearest valid one.


def _check_mode(name: str, value: Any) -> None:
    if isinstance(value, str) and value in MODES:
        return
    valid = ", ".join(sorted(MODES))
    if isinstance(value, str) and value in PLANNED_MODES:
        raise ValueError(f"{name}={value!r} is not in this version; the modes of this version are {valid}.")
    if isinstance(value, bool):  # YAML reads on, off, yes and no as these.
        raise _invalid(name, value, f"one of {valid}", "full" if value else "none")
    planned = difflib.get_close_matches(_plain(value), [*MODES, *PLANNED_MODES], n=1)
    if planned and planned[0] in PLANNED_MODES:
        raise ValueError(f"{name}={value!r} is not one of {valid}, and {planned[0]!r} is not in this version.")
    raise _invalid(name, value, f"one of {valid}", _nearest(value, MODES))


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        nearest = _nearest(value, (*_FALSE, *_TRUE)) in _TRUE if isinstance(value, str) else bool(value)
        raise _invalid(name, value, "True or False", nearest)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        try:
            nearest = max(1, round(float(value)))
        except (TypeError, ValueError, OverflowError):  # no number, nan, infinity
            nearest = 1
        raise _invalid(name, value, "a whole number from 1 up", nearest)


def _check_function(name: str, value: Any) -> None:
    if not callable(value):
        raise ValueError(
            f"{name}={value!r} is not a function. Pass one from Python; it has no form in JSON or on the CLI."
        )


def _check_offload(name: str, value: Any) -> None:
    _check_bool(name, value)
    if value:
        raise ValueError(f"{name}=True is not in this version. Set it to False or remove it.")


def _one_of(*valid: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in valid:
            raise _invalid(name, value, f"one of {', '.join(valid)}", _nearest(value, valid))

    return check


def _invalid(name: str, value: Any, wanted: str, nearest: Any) -> ValueError:
    return ValueError(f"{name}={value!r} is not {wanted}. Did you mean {nearest!r}?")


def _nearest(value: Any, valid: Iterable[str]) -> str:
    return difflib.get_close_matches(_plain(value), list(valid), n=1, cutoff=0.0)[0]


def _plain(value: Any) -> str:
    return str(value).strip().lower().replace("-", "_")


_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0", "none", "null")

_CHECKS: Mapping[str, Callable[[str, Any], None]] = {
    "checkpointing_mode": lambda name, value: None if value is None else _check_mode(name, value),
    "checkpointing_every_n": _check_count,
    "checkpointing_skip_frozen": _check_bool,
    "checkpointing_use_reentrant": _check_bool,
    "checkpointing_input_grads": _one_of(*INPUT_GRADS),
    "checkpointing_self_check": _check_bool,
}

# Handed to torch's checkpoint as they are.
_TORCH_OPTIONS: Mapping[str, Callable[[str, Any], None]] = {
    "context_fn": _check_function,
    "determinism_check": _one_of("default", "none"),
    "debug": _check_bool,
    "early_stop": _check_bool,
}

_HF_OPTIONS: Mapping[str, Callable[[str, Any], None]] = {
    "every_n_layers": _check_count,
    "use_reentrant": _check_bool,
    "preserve_rng_state": _check_bool,
    "offload": _check_offload,
    **_TORCH_OPTIONS,
}
