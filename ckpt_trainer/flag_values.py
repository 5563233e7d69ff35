"""The value of one flag: read from text where it came as text, and checked.

Each function raises ValueError with the flag as the user typed it, the value, and what is valid or the nearest of it.
How flags decide together is for `training_args`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ckpt_trainer import plan as plans
from ckpt_trainer.memory import parse_bytes
from ckpt_trainer.plan import (
    DEFAULT_SAVE,
    INPUT_GRADS,
    KBIT_UPCASTS,
    MODES,
    OFFLOAD_SAVES,
    OFFLOAD_TARGETS,
    Part,
    Plan,
)

Check = Callable[[str, Any], None]
_T = TypeVar("_T")


def check_mode(name: str, value: Any) -> None:
    if isinstance(value, str) and value in MODES:
        return
    valid = ", ".join(sorted(MODES))
    if isinstance(value, bool):  # YAML reads on, off, yes and no as these.
        raise invalid(name, value, f"one of {valid}", "full" if value else "none")
    mode, colon, save = value.partition(":") if isinstance(value, str) else ("", "", "")
    if colon and mode in _SAVE_FLAGS:
        raise ValueError(
            f"{name}={value!r} is not one of {valid}. Set it to {mode!r}, {_SAVE_FLAGS[mode]} to {save!r}."
        )
    raise invalid(name, value, f"one of {valid}", nearest(value, MODES))


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        near = nearest(value, (*_FALSE, *_TRUE)) in _TRUE if isinstance(value, str) else bool(value)
        raise invalid(name, value, "True or False", near)


def check_count(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise invalid(name, value, f"a whole number from {least} up", _nearest_count(value, least))


def check_share(name: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1):
        found = _number(value)
        is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
        near = found / 100 if is_number and 2 <= found <= 100 else min(max(found, 0.0), 1.0) if is_number else 0.5
        raise invalid(name, value, "a number from 0 to 1", near)


def read_dict(name: str, value: Any) -> dict[Any, Any]:
    """A dict from itself, from JSON, or from None."""
    example = '{"vision": "full"}' if name == "checkpointing_modules" else '{"every_n_layers": 2}'
    try:
        found = json.loads(value) if isinstance(value, str) else {} if value is None else value
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}={value!r} is not JSON: {error}. Write it like '{example}'.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name}={value!r} is not a dict. Write it like {example}.")
    return found


def read_modules(name: str, value: Any, save: tuple[str, ...], offload_save: str) -> tuple[Part, ...]:
    """Parts from a dict of module glob to mode.

    Args:
        save: What `selective` stores where its value does not say.
        offload_save: What `offload` stores away from the device where its value does not say.
    """
    parts = []
    for module, mode in read_dict(name, value).items():
        if not isinstance(module, str) or not module:
            raise invalid(f"a name in {name}", module, "a module glob or one of text, vision, audio", "*")
        parts.append(_read_part(module, f"{name}[{module!r}]", mode, save, offload_save))
    return tuple(parts)


def _read_part(module: str, name: str, mode: Any, save: tuple[str, ...], offload_save: str) -> Part:
    kind, colon, named = mode.partition(":") if isinstance(mode, str) else (mode, "", "")
    if "@" in str(mode):
        what = mode.partition("@")[0]
        near = {"recompute": "offload", "keep": "offload:all"}.get(what, what.replace("selective", "offload"))
        said = "a mode; places are for plans and policies, here checkpointing_offload_to says where"
        raise invalid(name, mode, said, near)
    if colon and kind == "selective":
        return Part(module, kind, _of(name, mode, plans.read_save, named))
    if colon and kind == "offload":
        if named not in OFFLOAD_SAVES:
            wanted = f"'offload:' and one of {', '.join(OFFLOAD_SAVES)}"
            raise invalid(name, mode, wanted, f"offload:{nearest(named, OFFLOAD_SAVES)}")
        return Part(module, kind, offload_save=named)
    if colon:
        near = (*difflib.get_close_matches(_plain(kind), _SAVE_FLAGS), "offload" if named == "all" else "selective")[0]
        said = "a mode; only 'selective' and 'offload' are followed by what they store"
        raise invalid(name, mode, said, f"{near}:{named}")
    check_mode(name, mode)
    if mode == "offload":
        return Part(module, mode, offload_save=offload_save)
    return Part(module, mode, save if mode == "selective" else DEFAULT_SAVE)


def read_save(name: str, value: Any) -> tuple[str, ...]:
    """What `selective` stores, from a list, a list in JSON, names separated by commas, or None for the default."""
    return DEFAULT_SAVE if value is None else _of(name, value, plans.read_save, from_json_list(value))


def from_json_list(value: Any) -> Any:
    """A list from its JSON text; what is no such text as it is."""
    try:
        return json.loads(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    except json.JSONDecodeError:
        return value


def read_segment(name: str, value: Any) -> int | str:
    """A whole number from 1 up, from itself or its digits, or `sqrt`; None is 1."""
    found = 1 if value is None else int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if found == "sqrt":
        return "sqrt"
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        near = "sqrt" if difflib.get_close_matches(_plain(value), ["sqrt"]) else _nearest_count(value)
        raise invalid(name, value, "a whole number from 1 up or 'sqrt'", near)
    return found


def read_plan(name: str, value: Any, only_files: bool) -> Plan | None:
    """A plan from a file that holds one as JSON; a `Plan` as it is, unless it stands where all must go into JSON."""
    if value is None or (isinstance(value, Plan) and not only_files):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{name}={value!r} is not the path of a JSON file. Write one with plan.to_json().")
    path = Path(value).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{name}={value!r}: there is no file {path.absolute()}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}={value!r} cannot be read: {error}.") from None
    return _of(name, value, Plan.from_json, text)


def read_folder(name: str, value: Any) -> str | None:
    """The absolute path of a folder that files can be made in; None as it is."""
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ValueError(f"{name}={value!r} is not the path of a folder. Set it to one that exists.")
    path = Path(value).expanduser().absolute()
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise ValueError(f"{name}={value!r}: {path} {what}. Make it, or set {name} to a folder that exists.")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(
            f"{name}={value!r}: this process may not write in {path}. Set {name} to a folder where it may."
        )
    return str(path)


def read_budget(name: str, value: Any, default: float | int) -> float | int:
    """A share as a float, bytes as an int: from itself, from its text, from a size in text; None is the default.

    1 is the share, not a byte. Other numbers without a unit are bytes from `_LEAST_BARE` up, so that 64 is not taken
    for 64 bytes where 64 GiB were meant.
    """
    found = default if value is None else _number(value)
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        if found == 1 or (isinstance(found, float) and 0 < found < 1):
            return float(found)
        if isinstance(found, int) and (found == 0 or found >= _LEAST_BARE):
            return found
    elif isinstance(found, str):
        try:
            return parse_bytes(found)
        except ValueError:
            pass  # said below, with shares among what is valid
    wanted = "a share of memory, above 0 and at most 1, or a size such as '64GiB'"
    raise invalid(name, value, wanted, _nearest_budget(found, default))


_LEAST_BARE = 4096


def _number(value: Any) -> Any:
    """The number that a text is; all else as it is."""
    for kind in (int, float) if isinstance(value, str) else ():
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _nearest_budget(found: Any, default: float | int) -> float | str:
    match = re.match(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([%kmgt]?)", str(found), re.IGNORECASE)
    if match is None or match[2] == "%":
        share = float(match[1]) / 100 if match else 0.0
        return share if 0 < share <= 1 else "0B" if str(found).strip().startswith("-") else default
    if float(match[1]) == 0:
        return "0B"
    unit = f"{match[2].upper()}iB" if match[2] else "GiB" if float(match[1]) < _LEAST_BARE else "B"
    return f"{match[1].removesuffix('.0')}{unit}"


def _of(name: str, value: Any, read: Callable[[Any], _T], raw: Any) -> _T:
    try:
        return read(raw)
    except ValueError as error:
        raise ValueError(f"{name}={value!r}: {error}") from None


def nearest(value: Any, valid: Iterable[str]) -> str:
    """The one that is most like `value`."""
    return difflib.get_close_matches(_plain(value), list(valid), n=1, cutoff=0.0)[0]


def invalid(name: str, value: Any, wanted: str, near: Any) -> ValueError:
    return ValueError(f"{name}={value!r} is not {wanted}. Did you mean {near!r}?")


def _nearest_count(value: Any, least: int = 1) -> int:
    try:
        return max(least, round(float(value)))
    except (TypeError, ValueError, OverflowError):  # no number, nan, infinity
        return 1


def _check_function(name: str, value: Any) -> None:
    if not callable(value):
        raise ValueError(
            f"{name}={value!r} is not a function. Pass one from Python; it has no form in JSON or on the CLI."
        )


def _one_of(*valid: str, **elsewhere: str) -> Check:
    """`elsewhere`: what values are called elsewhere."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in valid:
            near = elsewhere.get(_plain(value)) or nearest(value, valid)
            raise invalid(name, value, f"one of {', '.join(valid)}", near)

    return check


def _plain(value: Any) -> str:
    return str(value).strip().lower().replace("-", "_")


# What a mode stores where it can be said after a colon, by the mode.
_SAVE_FLAGS = {"selective": "checkpointing_save", "offload": "checkpointing_offload_save"}

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0", "none", "null")

_check_upcast = _one_of(*KBIT_UPCASTS, norm="norms", false="none", true="all", fp32="all")

# The flags whose value is used as it is. For the others there is a function that reads them.
FLAG_CHECKS: Mapping[str, Check] = {
    "checkpointing_mode": lambda name, value: None if value is None else check_mode(name, value),
    "checkpointing_every_n": check_count,
    "checkpointing_offload_save": _one_of(*OFFLOAD_SAVES),
    "checkpointing_offload_to": _one_of(
        *OFFLOAD_TARGETS, cpu="host", ram="host", pinned="host", nvme="disk", ssd="disk"
    ),
    "checkpointing_prefetch": lambda name, value: check_count(name, value, least=0),
    "checkpointing_oom_retries": lambda name, value: check_count(name, value, least=0),
    "checkpointing_compile_budget": check_share,
    "checkpointing_skip_frozen": check_bool,
    "checkpointing_use_reentrant": check_bool,
    "checkpointing_input_grads": _one_of(*INPUT_GRADS),
    "checkpointing_kbit_upcast": lambda name, value: None if value is None else _check_upcast(name, value),
    "checkpointing_self_check": check_bool,
}

# Handed to torch's checkpoint as they are.
TORCH_OPTIONS: Mapping[str, Check] = {
    "context_fn": _check_function,
    "determinism_check": _one_of("default", "none"),
    "debug": check_bool,
    "early_stop": check_bool,
}

# The keys of `activation_checkpointing_kwargs`.
HF_OPTIONS: Mapping[str, Check] = {
    "every_n_layers": check_count,
    "use_reentrant": check_bool,
    "preserve_rng_state": check_bool,
    "offload": check_bool,
    **TORCH_OPTIONS,
}
