"""`ckpt-trainer run`: a script that knows nothing of this package, with its names in place of those of transformers.

While it runs, transformers gives our trainers and training arguments under its own names, to the script and to every
library that the script loads. What was asked for before the script's name becomes a default of those arguments, so that
the script's own word counts, as it does against any default of a class of arguments (TRL's).

NOTE [as python does]
The script is `__main__`, reads its own `sys.argv`, finds modules beside it, and an error in it ends with the traceback
that python would print. Processes that it starts afresh (`spawn`) have transformers as it is.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field, fields, make_dataclass
from functools import cache, partial, wraps
from types import ModuleType, TracebackType
from typing import Any, get_type_hints

from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from ckpt_trainer.log import logger
from ckpt_trainer.trainer import CheckpointedSeq2SeqTrainer, CheckpointedTrainer, CheckpointingMixin
from ckpt_trainer.training_args import (
    CheckpointingArguments,
    CheckpointSeq2SeqTrainingArguments,
    CheckpointTrainingArguments,
)

_PREFIX = "checkpointing_"

# Flags with their values as text, as they came from the command line.
Words = tuple[tuple[str, str], ...]


def add_parser(subparsers: Any) -> None:
    """Add the command to those of `ckpt-trainer`."""
    parser = subparsers.add_parser(
        "run",
        help="run a training script as it is, with the trainers of this package",
        description="Run a training script as it is, with the trainers of this package in place of those of transformers.",
        usage="%(prog)s [FLAGS] SCRIPT [ARGUMENTS ...]   or   %(prog)s [FLAGS] -m MODULE [ARGUMENTS ...]",
        # The script's arguments are not ours to complete.
        allow_abbrev=False,
    )
    parser.add_argument("-m", action="store_true", dest="is_module", help="the script is the name of a module")
    parser.add_argument("script", metavar="SCRIPT", help="a file, or with -m a module")
    parser.add_argument("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="what the script gets")
    flags = parser.add_argument_group("flags", "Defaults of the training arguments; what the script says goes before.")
    for flag in fields(CheckpointingArguments):
        name = flag.name.removeprefix(_PREFIX)
        spelled = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        told = str(flag.metadata["help"]).replace("%", "%%")
        flags.add_argument(*spelled, dest=flag.name, metavar="VALUE", default=argparse.SUPPRESS, help=told)
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Run the script that the command line names.

    Returns:
        The script's exit code, which is 1 after an error in it, whose traceback was printed.

    Raises:
        SystemExit: The script ended with a text.
        ValueError: A flag has no such value.
        OSError: There is no such file.
    """
    said = [flag.name for flag in fields(CheckpointingArguments) if flag.name in chosen]
    words = tuple((name, getattr(chosen, name)) for name in said)
    main = _read_module if chosen.is_module else _read_file(chosen.script)
    command = [chosen.script, *chosen.arguments]
    with swapped(words) as built, _as_started(command, "" if chosen.is_module else _folder_of(chosen.script)):
        _say_swapped(chosen.script, words)
        code = _ended(main, chosen.script)
    if not built and not code and not {"-h", "--help"} & set(chosen.arguments):
        logger.warning(
            f"run: {chosen.script} built no trainer of this package, so the run was as without it. Names are swapped for "
            "what takes Trainer or Seq2SeqTrainer from transformers while the script runs, not in processes that it starts."
        )
    if isinstance(code, int):
        return code
    raise SystemExit(code)


def _say_swapped(script: str, words: Words) -> None:
    if os.environ.get("RANK", "0") == "0":
        names = ", ".join(theirs.__name__ for theirs in _classes(words))
        said = ", ".join(f"{flag.removeprefix(_PREFIX)}={value}" for flag, value in words)
        by_default = f"; by default {said}" if said else ""
        logger.info(f"run: {script} gets {names} of ckpt_trainer in place of those of transformers{by_default}")


def _ended(main: Callable[[str], None], script: str) -> Any:
    """The exit code, or text, with which the script ended."""
    try:
        main(script)
    except SystemExit as end:
        return 0 if end.code is None else end.code
    except Exception as error:
        shown = _without_ours(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(shown), shown)
        return 1
    return 0


def _without_ours(traceback: TracebackType | None) -> TracebackType | None:
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
        traceback = traceback.tb_next
    return traceback


# The script as python starts it.


def _read_module(name: str) -> None:
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _read_file(path: str) -> Callable[[str], None]:
    # Not by runpy.run_path, which makes sys.argv[0] of the path: python leaves that as it was typed, and this absolute.
    with open(path, "rb") as file:
        return partial(_execute, file.read())


def _execute(source: bytes, path: str) -> None:
    module = ModuleType("__main__")
    vars(module).update(__file__=os.path.abspath(path), __builtins__=__builtins__, __spec__=None)
    previous = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        exec(compile(source, os.path.abspath(path), "exec", dont_inherit=True), vars(module))
    finally:
        sys.modules["__main__"] = previous


def _folder_of(path: str) -> str:
    return os.path.dirname(os.path.realpath(path))


@contextmanager
def _as_started(command: Sequence[str], folder: str) -> Iterator[None]:
    argv, path = sys.argv[:], sys.path[:]
    sys.argv[:] = command
    # Ours is there, of `ckpt-trainer` or `python -m`, unless python was told to put none.
    if not getattr(sys.flags, "safe_path", False):
        sys.path[:1] = [folder or os.getcwd()]
    try:
        yield
    finally:
        sys.argv[:], sys.path[:] = argv, path


# The names.


@contextmanager
def swapped(words: Words = ()) -> Iterator[list[str]]:
    """While entered, transformers gives our trainers and training arguments under its names.

    Libraries that took a name before keep what they have.

    Args:
        words: Flags, and as text what their default is.

    Yields:
        The class names of the trainers of ours that were built so far.

    Raises:
        ValueError: A flag has no such value.
    """
    classes = _classes(words)
    _exchange(classes)
    try:
        with _noting_built() as built:
            yield built
    finally:
        _exchange({ours: theirs for theirs, ours in classes.items()})


def _exchange(classes: Mapping[type, type]) -> None:
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "transformers"]:
        for name, value in list(vars(module).items()):
            for old, new in classes.items():
                if value is old:
                    setattr(module, name, new)


@contextmanager
def _noting_built() -> Iterator[list[str]]:
    built: list[str] = []
    begin = CheckpointingMixin.__init__

    @wraps(begin)
    def note(self: CheckpointingMixin, *args: Any, **kwargs: Any) -> None:
        built.append(type(self).__name__)
        begin(self, *args, **kwargs)

    CheckpointingMixin.__init__ = note  # type: ignore[method-assign]
    try:
        yield built
    finally:
        CheckpointingMixin.__init__ = begin  # type: ignore[method-assign]


def _classes(words: Words) -> dict[type, type]:
    """Class of transformers -> ours."""
    arguments, for_seq2seq = _arguments_with(words)
    return {
        Trainer: CheckpointedTrainer,
        TrainingArguments: arguments,
        Seq2SeqTrainer: CheckpointedSeq2SeqTrainer,
        Seq2SeqTrainingArguments: for_seq2seq,
    }


@cache
def _arguments_with(words: Words) -> tuple[type, type]:
    """`CheckpointTrainingArguments`, and that for Seq2Seq, with other defaults."""
    plain, for_seq2seq = CheckpointTrainingArguments, CheckpointSeq2SeqTrainingArguments
    if not words:
        return plain, for_seq2seq
    written = [part for flag, text in words for part in (f"--{flag}", text)]
    parser = HfArgumentParser(CheckpointingArguments, prog="ckpt-trainer run")  # type: ignore[arg-type]
    (values,) = parser.parse_args_into_dataclasses(written)
    types = get_type_hints(CheckpointingArguments)
    told = {flag.name: flag.metadata for flag in fields(CheckpointingArguments)}
    changed = [(flag, types[flag], _default(getattr(values, flag), told[flag])) for flag, _ in words]
    shared = {"__reduce_ex__": _reduce, "__module__": plain.__module__}
    first, second = ({**shared, "_made_of": (words, which)} for which in range(2))
    one = make_dataclass(plain.__name__, changed, bases=(plain,), namespace=first)
    other = make_dataclass(for_seq2seq.__name__, [], bases=(one, for_seq2seq), namespace=second)
    return one, other


def _default(value: Any, metadata: Mapping[str, Any]) -> Any:
    if isinstance(value, (list, dict)):
        return field(default_factory=partial(type(value), value), metadata=metadata)
    return field(default=value, metadata=metadata)


def _reduce(arguments: Any, protocol: Any) -> Any:
    # Such a class has no name by which pickle would find it; it can be made again, here and in any other process.
    made_of = vars(type(arguments)).get("_made_of")
    return (_blank, made_of, vars(arguments)) if made_of else object.__reduce_ex__(arguments, protocol)


def _blank(words: Words, which: int) -> Any:
    made: Any = _arguments_with(words)[which]
    return made.__new__(made)
