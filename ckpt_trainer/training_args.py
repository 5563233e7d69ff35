"""The flags: fields, help, and `settings_of`, their only reader; single values are checked by `flag_values`.

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

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, cast

from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.utils import logging

from ckpt_trainer.flag_values import (
    FLAG_CHECKS,
    HF_OPTIONS,
    TORCH_OPTIONS,
    check_bool,
    from_json_list,
    nearest,
    read_dict,
    read_modules,
    read_plan,
    read_save,
    read_segment,
)
from ckpt_trainer.plan import DEFAULT_SAVE, Settings

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
            "the block and rebuilds the rest in backward, `selective` stores what checkpointing_save names besides. Not "
            "set: `full`."
        },
    )
    checkpointing_modules: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Modes for parts of the model, a dict of module glob to mode; `text`, `vision`, `audio` name whole "
            'towers: \'{"vision": "full", "text": "selective:attention"}\'. The first name that matches a block '
            "decides; blocks without one follow checkpointing_mode."
        },
    )
    checkpointing_every_n: int = field(
        default=1,
        metadata={"help": "Rebuild only every n-th block of each stack, counted from the first block of the stack."},
    )
    # None comes last in the types of these two, so that HF's parser takes their text as it is.
    checkpointing_save: list[str] | str | None = field(
        default="expensive",
        metadata={
            "help": "selective: what is stored of a block besides its inputs. A tier: `expensive` (all but what is cheap "
            "to rebuild), `matmul`, `half_matmul`, `attention`; or a list of op names, module globs, `matmul` and "
            "`attention`, such as 'mm,mlp.*'."
        },
    )
    checkpointing_segment: int | str | None = field(
        default=1,
        metadata={
            "help": "full: of blocks in a row, store the input of every k-th only and rebuild the others' from it; `sqrt` "
            "takes k from their number. Costs up to one more forward."
        },
    )
    checkpointing_plan: str | None = field(
        default=None,
        metadata={
            "help": "A JSON file with an action for each block, to carry out instead of what a mode asks for; a report "
            "of a run has one."
        },
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
                read_dict(name, getattr(self, name))  # Before super, whose parser fails without naming the flag.
        # Alone they are flags for a loop of one's own.
        if isinstance(self, TrainingArguments):
            super().__post_init__()  # type: ignore[misc]
        # Not by _VALID_DICT_FIELDS: a list on this mixin would hide the longer one of the class it is mixed with.
        if isinstance(self.checkpointing_modules, str):
            self.checkpointing_modules = read_dict("checkpointing_modules", self.checkpointing_modules)
        self.checkpointing_save = from_json_list(self.checkpointing_save)
        self.checkpointing_segment = read_segment("checkpointing_segment", self.checkpointing_segment)
        if isinstance(self.checkpointing_plan, os.PathLike):
            self.checkpointing_plan = os.fspath(self.checkpointing_plan)
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
    own = {flag: getattr(args, flag, default) for flag, default in _DEFAULTS.items()}
    for flag, check in FLAG_CHECKS.items():
        check(flag, own[flag])

    def settle(flag: str, key: str) -> Any:
        theirs = (f"{label}[{key!r}]={options[key]!r}", options[key], options_said) if key in options else None
        return _settle(args, flag, own[flag], theirs)

    hf_flag = _read_hf_flag(args)
    save = read_save("checkpointing_save", own["checkpointing_save"])
    settings = Settings(
        mode=_settle(args, "checkpointing_mode", own["checkpointing_mode"], hf_flag) or "full",
        modules=read_modules("checkpointing_modules", own["checkpointing_modules"], save),
        every_n=settle("checkpointing_every_n", "every_n_layers"),
        save=save,
        segment=read_segment("checkpointing_segment", own["checkpointing_segment"]),
        plan=read_plan("checkpointing_plan", own["checkpointing_plan"], only_files=isinstance(args, TrainingArguments)),
        skip_frozen=own["checkpointing_skip_frozen"],
        use_reentrant=settle("checkpointing_use_reentrant", "use_reentrant"),
        input_grads=own["checkpointing_input_grads"],
        self_check=own["checkpointing_self_check"],
        preserve_rng_state=options.get("preserve_rng_state"),
        use_cache=getattr(args, "use_cache", None),
        named=own["checkpointing_mode"] is not None or (hf_flag is not None and hf_flag[2]),
        checkpoint_options={key: options[key] for key in TORCH_OPTIONS if key in options},
    )
    if settings.plan is not None:
        spelled = {hf_flag[0]: hf_flag[2]} if hf_flag else {}
        spelled[f"{label}['every_n_layers']"] = options_said and "every_n_layers" in options
        _refuse_beside_plan(args, [text for text, said in spelled.items() if said])
    _refuse_combinations(settings, label)
    _warn_without_effect(settings, own, label if options and options_said else "")
    return settings


def settings_of_flags(flags: Mapping[str, Any]) -> Settings:
    """Settings from flags without their prefix, and options of torch's checkpoint, for a loop of one's own.

    Raises:
        TypeError: There is no such flag or option; names the nearest.
        ValueError: A value is not valid.
    """
    names = [name.removeprefix("checkpointing_") for name in _DEFAULTS]
    options = [name for name in HF_OPTIONS if name not in ("every_n_layers", "offload", "use_reentrant")]
    for flag in flags:
        if flag not in names and flag not in options:
            valid = [*names, *options]
            raise TypeError(f"{flag!r} is not one of {', '.join(valid)}. Did you mean {nearest(flag, valid)!r}?")
    arguments = CheckpointingArguments(**{f"checkpointing_{name}": flags[name] for name in names if name in flags})
    arguments.gradient_checkpointing_kwargs = {name: flags[name] for name in options if name in flags}
    return arguments.settings()


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
        check_bool(name, value)
    asked = [name for name, value in given.items() if value]
    said = not any(_default_of(args, name) for name in _HF_FLAG)
    return (f"{asked[0]}=True", "full", said) if asked else None


def _read_hf_kwargs(args: TrainingArguments) -> tuple[str, dict[str, Any], bool]:
    """How the user may have called it, its checked content, and whether it is the user's word."""
    given = {name: kwargs for name, value in _spelled(args, _HF_KWARGS).items() if (kwargs := read_dict(name, value))}
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


def _refuse_beside_plan(args: TrainingArguments, said: Sequence[str]) -> None:
    """A plan is followed only where nothing else says what is done to each block. `said`: what HF's spelling says."""
    values = {flag: getattr(args, flag, None) for flag in _PLANNING}
    given = [f"{flag}={value!r}" for flag, value in values.items() if value and value != _default_of(args, flag)]
    if given or said:
        plan = getattr(args, "checkpointing_plan", None)
        named = f"checkpointing_plan={plan!r}" if isinstance(plan, str) else "checkpointing_plan"
        raise ValueError(f"{named} and {[*given, *said][0]} both say what is done to each block. Remove one of them.")


def _refuse_combinations(settings: Settings, label: str) -> None:
    refused = [key for key in ("context_fn", "debug") if settings.checkpoint_options.get(key)]
    if settings.use_reentrant and refused:
        raise ValueError(
            f"{label}: use_reentrant=True cannot be combined with {', '.join(refused)}. Remove one of them."
        )
    selective = _who_says_selective(settings)
    segment = f"checkpointing_segment={settings.segment!r}" if settings.segment != 1 else None
    needing = selective or segment
    if settings.use_reentrant and needing:
        raise ValueError(
            f"{needing} needs the non-reentrant variant of torch's checkpoint. Remove use_reentrant=True (in "
            f"checkpointing_use_reentrant or {label or _HF_KWARGS[0]}), or {needing}."
        )
    if selective and "context_fn" in refused:
        raise ValueError(f"{label}['context_fn'] and {selective} are two selections of what is stored. Remove one.")


def _who_says_selective(settings: Settings) -> str | None:
    if settings.plan is not None:
        return "a selective block in checkpointing_plan" if settings.plan.count("selective") else None
    if settings.mode == "selective":
        return "checkpointing_mode='selective'"
    parts = [part.name for part in settings.modules if part.mode == "selective"]
    return f"'selective' in checkpointing_modules[{parts[0]!r}]" if parts else None


def _warn_without_effect(settings: Settings, own: Mapping[str, Any], label: str) -> None:
    """Say once which flags nothing follows from. `label`: HF's kwargs, if they were given."""
    modes = [settings.mode, *(part.mode for part in settings.modules)]
    kinds = (
        [_KIND[mode] for mode in modes] if settings.plan is None else [a.kind for a in settings.plan.actions.values()]
    )
    idle = []
    if not {"selective", "recompute"} & set(kinds):
        every_n = settings.plan is None and own["checkpointing_every_n"] != 1
        given = {label: label, "checkpointing_every_n": every_n, "checkpointing_modules": settings.modules}
        idle += [flag for flag, value in given.items() if value]
    follows = settings.mode == "selective" or any(
        p.mode == "selective" and p.save == settings.save for p in settings.modules
    )
    if settings.plan is None and settings.save != DEFAULT_SAVE and not follows:
        idle.append("checkpointing_save (of mode 'selective')")
    if settings.segment != 1 and "recompute" not in kinds:
        idle.append("checkpointing_segment (of mode 'full')")
    elif settings.segment != 1 and settings.every_n != 1 and settings.plan is None:
        idle.append("checkpointing_segment (with every_n there are no recomputed blocks in a row)")
    if idle:
        where = f"checkpointing_mode={settings.mode!r}" if settings.plan is None else "this checkpointing_plan"
        logger.warning_once(f"No effect in {where}: {', '.join(idle)}. Remove it or set a mode.")


_KIND = {"none": "keep", "selective": "selective", "full": "recompute"}

# What else than a plan says what is done to each block.
_PLANNING = ("checkpointing_mode", "checkpointing_modules", "checkpointing_every_n", "checkpointing_save")
