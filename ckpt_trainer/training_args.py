"""The flags: fields, help, and `settings_of`, their only reader.

Single values are checked by `flag_values`, what they mean together by `flag_rules`.

Below the trainer there is no `TrainingArguments`, only the `Settings` made here. HF has its own spelling of some of
these flags (`gradient_checkpointing`, in 5.x `activation_checkpointing`, and their kwargs); a script that uses it gets
what it asks for. Their key `offload` set to True asks for mode `offload`, with or without the flag; False is no word.

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
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.utils import logging

from ckpt_trainer.flag_rules import refuse_combinations, says_full, without_effect
from ckpt_trainer.flag_values import (
    FLAG_CHECKS,
    HF_OPTIONS,
    TORCH_OPTIONS,
    from_json_list,
    nearest,
    read_budget,
    read_dict,
    read_folder,
    read_modules,
    read_plan,
    read_save,
    read_segment,
)
from ckpt_trainer.hf_flags import HF_FLAG, HF_KWARGS, default_of, read_hf_kwargs, read_hf_mode
from ckpt_trainer.plan import Settings

logger = logging.get_logger(__name__)


_TWIN = {one: other for pair in (HF_FLAG, HF_KWARGS) for one, other in (pair, pair[::-1])}


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
            "the block and rebuilds the rest in backward, `selective` stores what checkpointing_save names besides, "
            "`offload` stores what checkpointing_offload_save names off the device, `auto` chooses among all of this for "
            "each shape of batch, so that a step fits checkpointing_budget at the least cost in time. Not set: `full` "
            "where the switch of transformers is on or a flag of mode full is set, else `auto`."
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
    checkpointing_offload_save: str = field(
        default="inputs",
        metadata={
            "help": "offload: what is stored of a block, off the device. `inputs`: the rest is rebuilt in backward, as by "
            "`full`; a tier of checkpointing_save, such as `attention`: as by `selective`; `all`: nothing is rebuilt."
        },
    )
    checkpointing_offload_to: str = field(
        default="host",
        metadata={
            "help": "offload: where to. `host`: pinned host memory; `pageable`: host memory that is not pinned, which is "
            "slow; `disk`: a file in checkpointing_offload_dir, by way of host memory."
        },
    )
    checkpointing_offload_dir: str | None = field(
        default=None,
        metadata={"help": "offload to `disk`: an existing folder, on a fast local disk. Nothing is left in it."},
    )
    # None comes last here, too. An int is a float to type checkers, and a size in bytes.
    checkpointing_host_budget: float | str | None = field(
        default=0.8,
        metadata={
            "help": "offload: host memory to be used at most, by each process: a share of what is available, divided by "
            "the processes of the machine, or a size such as '64GiB'. What does not fit stays on the device."
        },
    )
    checkpointing_prefetch: int = field(
        default=1,
        metadata={"help": "offload: how many blocks ahead of backward are brought back to the device, from 0 up."},
    )
    checkpointing_budget: float | str | None = field(
        default=0.9,
        metadata={
            "help": "auto: memory of the device that a step may use: a share of all of it, or a size such as '20GiB'. What "
            "other processes use is taken off. Where there is no accelerator: live bytes of training, of host memory."
        },
    )
    checkpointing_oom_retries: int = field(
        default=3,
        metadata={
            "help": "auto: how often a micro-batch that ran out of memory is redone with a leaner plan, from 0 up."
        },
    )
    checkpointing_compile_budget: float | None = field(
        default=None,
        metadata={"help": "selective, compiled: share, 0 to 1, of what the compiler stores. Not set: ops are marked."},
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
    checkpointing_kbit_upcast: str | None = field(
        default="none",
        metadata={
            "help": "Models with quantised weights: which of the others are cast to fp32 while training. `none`; `norms`, "
            "whose results keep their dtype; `all`, embeddings and head included, which doubles them."
        },
    )
    checkpointing_self_check: bool = field(
        default=True,
        metadata={"help": "After the first backward: has a recomputed block lost a gradient? An error if it has."},
    )

    _constructed = False  # Not annotated, so not a field.

    def __post_init__(self) -> None:
        for name in ("checkpointing_modules", *HF_KWARGS):
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
        for name in ("checkpointing_plan", "checkpointing_offload_dir"):
            if isinstance(getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(getattr(self, name)))
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
class CheckpointSeq2SeqTrainingArguments(CheckpointTrainingArguments, Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with the flags of `CheckpointingArguments`."""


_DEFAULTS: dict[str, Any] = {flag.name: flag.default for flag in fields(CheckpointingArguments)}


def settings_of(args: TrainingArguments) -> Settings:
    """What the flags of `args` ask for, HF's spelling included; validated, whenever they were set.

    Warns once where flags were given that nothing can follow from.

    Args:
        args: Ours or any `TrainingArguments`; where it has no flags of ours, they have their defaults.

    Raises:
        ValueError: A value is not valid, or a flag and HF's spelling of it ask for different things.
    """
    label, options, options_said = read_hf_kwargs(args)
    own = {flag: getattr(args, flag, default) for flag, default in _DEFAULTS.items()}
    for flag, check in FLAG_CHECKS.items():
        check(flag, own[flag])

    def settle(flag: str, key: str) -> Any:
        theirs = (f"{label}[{key!r}]={options[key]!r}", options[key], options_said) if key in options else None
        return _settle(args, flag, own[flag], theirs)

    hf_mode = read_hf_mode(args, label, options, options_said)
    save, offload_save = read_save("checkpointing_save", own["checkpointing_save"]), own["checkpointing_offload_save"]
    settings = Settings(
        mode=_settle(args, "checkpointing_mode", own["checkpointing_mode"], hf_mode) or "auto",
        modules=read_modules("checkpointing_modules", own["checkpointing_modules"], save, offload_save),
        every_n=settle("checkpointing_every_n", "every_n_layers"),
        save=save,
        segment=read_segment("checkpointing_segment", own["checkpointing_segment"]),
        plan=read_plan("checkpointing_plan", own["checkpointing_plan"], only_files=isinstance(args, TrainingArguments)),
        offload_save=offload_save,
        offload_to=own["checkpointing_offload_to"],
        offload_dir=read_folder("checkpointing_offload_dir", own["checkpointing_offload_dir"]),
        host_budget=read_budget("checkpointing_host_budget", own["checkpointing_host_budget"], Settings.host_budget),
        prefetch=own["checkpointing_prefetch"],
        budget=read_budget("checkpointing_budget", own["checkpointing_budget"], Settings.budget),
        oom_retries=own["checkpointing_oom_retries"],
        compile_budget=own["checkpointing_compile_budget"],
        skip_frozen=own["checkpointing_skip_frozen"],
        use_reentrant=settle("checkpointing_use_reentrant", "use_reentrant"),
        input_grads=own["checkpointing_input_grads"],
        kbit_upcast=own["checkpointing_kbit_upcast"] or "none",
        self_check=own["checkpointing_self_check"],
        preserve_rng_state=options.get("preserve_rng_state"),
        use_cache=getattr(args, "use_cache", None),
        named=own["checkpointing_mode"] is not None or (hf_mode is not None and hf_mode[2]),
        checkpoint_options={key: options[key] for key in TORCH_OPTIONS if key in options},
    )
    if not settings.named and settings.plan is None and says_full(settings):
        settings = replace(settings, mode="full")
    _check_together(args, settings, hf_mode, label, options if options_said else {})
    return settings


def _check_together(
    args: TrainingArguments,
    settings: Settings,
    hf_mode: tuple[str, str, bool] | None,
    label: str,
    options_said: Mapping[str, Any],
) -> None:
    """Refuse settings that exclude each other, and warn of those that nothing follows from."""
    if settings.plan is not None:
        every_n = [f"{label}['every_n_layers']"] if "every_n_layers" in options_said else []
        _refuse_beside_plan(args, ([hf_mode[0]] if hf_mode and hf_mode[2] else []) + every_n)
    refuse_combinations(settings, label)
    _warn_without_effect(args, settings, label if options_said else "")


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
            near = "mode='offload'" if flag == "offload" else repr(nearest(flag.removeprefix("checkpointing_"), valid))
            raise TypeError(f"{flag!r} is not one of {', '.join(valid)}. Did you mean {near}?")
    arguments = CheckpointingArguments(**{f"checkpointing_{name}": flags[name] for name in names if name in flags})
    arguments.gradient_checkpointing_kwargs = {name: flags[name] for name in options if name in flags}
    return arguments.settings()


def _name_of_function(value: Any) -> str:
    if not callable(value):
        raise TypeError(f"{value!r} in the training arguments has no JSON form.")
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _warn_without_effect(args: TrainingArguments, settings: Settings, kwargs: str) -> None:
    said = [flag for flag in _DEFAULTS if _is_said(args, flag, settings)]
    idle = without_effect(settings, said, kwargs)
    if idle:
        where = f"checkpointing_mode={settings.mode!r}" if settings.plan is None else "this checkpointing_plan"
        logger.warning_once(f"No effect in {where}: {', '.join(idle)}. Remove it or set a mode.")


def _is_said(args: TrainingArguments, flag: str, settings: Settings) -> bool:
    """Whether a flag is neither what it is by default nor a default of the args class."""
    name = flag.removeprefix("checkpointing_")
    differs: bool = getattr(settings, name) != getattr(Settings(), name)
    return differs and getattr(args, flag, None) != _default_of(args, flag)


def _default_of(args: TrainingArguments, name: str) -> Any:
    return default_of(args, name, _DEFAULTS.get(name))


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


# What else than a plan says what is done to each block.
_PLANNING = (
    "checkpointing_mode",
    "checkpointing_modules",
    "checkpointing_every_n",
    "checkpointing_save",
    "checkpointing_offload_save",
)
