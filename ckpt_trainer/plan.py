"""What happens to the activations of each block, as plain data.

Policies make a `Plan`, `install` carries it out, `report` prints it. Nothing here touches a tensor: this file imports
the standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = ("keep", "recompute")
MODES = ("none", "full")
PLANNED_MODES = ("selective", "offload", "auto")
INPUT_GRADS = ("auto", "always", "never")


@dataclass(frozen=True)
class Action:
    """What happens to the activations of one block.

    Args:
        kind: `keep` stores everything autograd asks for; `recompute` stores the inputs of the block and rebuilds the
            rest in backward.
        reason: Why this differs from what the mode asks for, for the table and the log; empty where it does not.

    Raises:
        ValueError: `kind` is not one of `KINDS`.
    """

    kind: str
    reason: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"action {self.kind!r} is not one of {', '.join(KINDS)}.")

    def __str__(self) -> str:
        return f"{self.kind} ({self.reason})" if self.reason else self.kind


KEEP = Action("keep")
RECOMPUTE = Action("recompute")


@dataclass(frozen=True)
class Settings:
    """What the flags become: typed, validated values, and all that code below the trainer sees of them.

    Args:
        mode: One of `MODES`.
        modules: Pairs (glob or component, mode), in the order given; the first that matches a block decides.
        every_n: Only every n-th block of each stack is recomputed, counted from the stack's first.
        skip_frozen: Frozen blocks below the first trainable parameter run without graph, recompute or backward.
        use_reentrant: The reentrant variant of torch's checkpoint.
        input_grads: One of `INPUT_GRADS`: whether embeddings are made to require grad.
        self_check: Check after the first backward that no gradient was lost.
        preserve_rng_state: None restores the generators that a block draws from; True all; False none.
        use_cache: Whether the key/value cache is on while training. None: off where blocks are recomputed, else as it is.
        named: The user asked for this mode by name, so that a model on which it can do nothing is an error.
        checkpoint_options: Passed to `torch.utils.checkpoint.checkpoint` as they are: `context_fn`,
            `determinism_check`, `debug`, `early_stop`.
    """

    mode: str = "full"
    modules: tuple[tuple[str, str], ...] = ()
    every_n: int = 1
    skip_frozen: bool = True
    use_reentrant: bool = False
    input_grads: str = "auto"
    self_check: bool = True
    preserve_rng_state: bool | None = None
    use_cache: bool | None = None
    named: bool = field(default=False, compare=False)
    checkpoint_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Block name -> action, in forward order. Prints as a table, goes to JSON and back.

    Args:
        actions: One entry for each block.
    """

    actions: Mapping[str, Action]

    def __getitem__(self, name: str) -> Action:
        return self.actions[name]

    def __len__(self) -> int:
        return len(self.actions)

    def count(self, kind: str) -> int:
        """Number of blocks whose action is `kind`."""
        return sum(action.kind == kind for action in self.actions.values())

    def to_json(self) -> str:
        """The plan as a JSON object; `Plan.from_json` gives an equal plan back."""
        entries = {
            name: {"kind": a.kind, "reason": a.reason} if a.reason else a.kind for name, a in self.actions.items()
        }
        return json.dumps({"blocks": entries}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The text is not JSON, has no `blocks`, or names an unknown action.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a plan is a JSON object; this text is not JSON: {error}") from None
        if not isinstance(data, dict) or not isinstance(data.get("blocks"), dict):
            raise ValueError('a plan is a JSON object {"blocks": {block name: action}}; found none.')
        return cls({name: _read_action(name, entry) for name, entry in data["blocks"].items()})

    def __str__(self) -> str:
        rows = [(fold_names(names), str(len(names)), str(action)) for names, action in self._runs()]
        return format_table(("blocks", "number", "action"), rows)

    def _runs(self) -> list[tuple[list[str], Action]]:
        runs: list[tuple[list[str], Action]] = []
        previous = None
        for name, action in self.actions.items():
            key = (_NUMBER.sub("*", name), action)
            if key != previous:
                runs.append(([], action))
            runs[-1][0].append(name)
            previous = key
        return runs


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def _read_action(name: str, entry: Any) -> Action:
    try:
        return Action(**entry) if isinstance(entry, dict) else Action(entry)
    except (TypeError, ValueError) as error:
        raise ValueError(f"plan entry for block {name!r} is {entry!r}: {error}") from None


def fold_names(names: list[str]) -> str:
    """Names that differ in one number as one: `layers.0`, `layers.1`, `layers.2` become `layers.0-2`."""
    first, last = names[0], names[-1]
    if len(names) == 1:
        return first
    pairs = zip(_NUMBER.finditer(first), _NUMBER.finditer(last), strict=False)
    differing = [(a, b) for a, b in pairs if a.group() != b.group()]
    if len(differing) != 1:
        return f"{first} .. {last}"
    a, b = differing[0]
    return f"{first[: a.start()]}{a.group()}-{b.group()}{first[a.end() :]}"


def format_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Lay out rows of text in columns, padded with spaces, a rule under the header."""
    table = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
