"""What happens to the activations of each block, as plain data.

Policies make a `Plan`, `install` carries it out, `report` prints it. Nothing here touches a tensor: this file imports
the standard library only.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = ("keep", "selective", "recompute")
# Where the tensors are that a block stores between its forward and its backward.
PLACES = ("device", "host", "disk")
MODES = ("none", "selective", "full", "offload", "auto")
INPUT_GRADS = ("auto", "always", "never")
# What of a model with quantised weights is cast to fp32 while it trains.
KBIT_UPCASTS = ("none", "norms", "all")

# What `selective` stores besides the inputs of a block, from cheapest (most is stored) to leanest.
TIERS = ("expensive", "matmul", "half_matmul", "attention")
# Those that choose by op, so that they may stand in a list beside names of ops and modules.
LISTED_TIERS = ("matmul", "attention")
DEFAULT_SAVE = ("expensive",)

# What `offload` stores away from the device: the inputs of a block, what `selective` stores, or all that autograd stores.
OFFLOAD_SAVES = ("inputs", *TIERS, "all")
# What it is stored in: pinned host memory, host memory that is not pinned, or a file that host memory spills to.
OFFLOAD_TARGETS = ("host", "pageable", "disk")

# The reason of an action that a frozen block has, which comes to nothing where no gradient passes.
FROZEN = "frozen, if a gradient passes"


@dataclass(frozen=True)
class Action:
    """What happens to the activations of one block.

    Args:
        kind: `keep` stores everything autograd asks for; `selective` stores the inputs of the block and what `save`
            names; `recompute` stores the inputs. What is not stored is rebuilt in backward.
        reason: Why this differs from what the mode asks for, for the table and the log; empty where it does not.
        save: For `selective`: one of `TIERS`, or names of ops, module globs and `LISTED_TIERS`; see `read_save`. Not
            given: `DEFAULT_SAVE`.
        place: One of `PLACES`: where that is kept until backward needs it. `keep` on the host is everything on the host.

    Raises:
        ValueError: `kind` is not one of `KINDS`, `place` is not one of `PLACES`, or `save` does not fit.
    """

    kind: str
    reason: str = ""
    save: tuple[str, ...] = ()
    place: str = "device"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"action {self.kind!r} is not one of {', '.join(KINDS)}.{_hint(self.kind, _KINDS_ELSEWHERE)}"
            )
        if self.place not in PLACES:
            raise ValueError(
                f"place {self.place!r} is not one of {', '.join(PLACES)}.{_hint(self.place, _PLACES_ELSEWHERE)}"
            )
        if self.kind == "selective":
            object.__setattr__(self, "save", read_save(self.save) if self.save else DEFAULT_SAVE)
        elif self.save:
            raise ValueError(f"action {self.kind!r} cannot have save={self.save!r}: only 'selective' stores by name.")

    @classmethod
    def from_text(cls, text: str) -> Action:
        """Read `keep`, `recompute`, `selective`, or `selective:` and what is stored, as in `selective:mm,attention`.

        After an @ may stand the place: `recompute@host`, `selective:attention@disk`.

        Raises:
            ValueError: The text is not one of these.
        """
        what, at, place = text.partition("@")
        kind, colon, save = what.partition(":")
        return cls(kind, save=read_save(save) if colon else (), place=place if at else "device")

    @property
    def short(self) -> str:
        """The action without its reason; `from_text` reads it."""
        what = f"{self.kind}:{','.join(self.save)}" if self.save else self.kind
        return what if self.place == "device" else f"{what}@{self.place}"

    @property
    def does_nothing(self) -> bool:
        """Whether the block runs as it does without us: autograd stores what it asks for, on the device."""
        return self.kind == "keep" and self.place == "device"

    def __str__(self) -> str:
        return f"{self.short} ({self.reason})" if self.reason else self.short


# Names of modes, which are not those of actions, and what places are called elsewhere.
_KINDS_ELSEWHERE = {"none": "keep", "full": "recompute", "offload": "recompute@host"}
_PLACES_ELSEWHERE = {"cpu": "host", "ram": "host", "pageable": "host", "nvme": "disk"}


def _hint(value: Any, elsewhere: Mapping[str, str]) -> str:
    near = elsewhere.get(value) if isinstance(value, str) else None
    return f" Did you mean {near!r}?" if near else ""


def read_save(value: Any) -> tuple[str, ...]:
    """What `selective` stores, from a tier, names separated by commas, or a list of names.

    Whether a name is one of an op or a module shows in the first step only; here it is refused only where it is close
    to the name of a tier.

    Raises:
        ValueError: There is no name, a tier that stands alone is one of several, or one seems to be misspelled.
    """
    found = value.split(",") if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(x, str) and x.strip() for x in found):
        raise ValueError(f"{value!r} is not one of {', '.join(TIERS)}, or a list of op names and module globs.")
    names = tuple(dict.fromkeys(name.strip() for name in found))
    for name in names:
        if name in TIERS and name not in LISTED_TIERS and len(names) > 1:
            raise ValueError(
                f"{name!r} stands alone, and {', '.join(names)} are {len(names)}. A list holds names of ops, module "
                f"globs, {' and '.join(map(repr, LISTED_TIERS))}."
            )
        near = difflib.get_close_matches(name.lower().replace("-", "_"), TIERS, n=1, cutoff=0.8)
        if near and name not in TIERS and _WORD.fullmatch(name):
            raise ValueError(f"{name!r} is not a tier. Did you mean {near[0]!r}? A module so named is '*{name}'.")
    return names


_WORD = re.compile(r"[A-Za-z_-]+")

KEEP = Action("keep")
SELECTIVE = Action("selective")
RECOMPUTE = Action("recompute")


def offload_action(save: str, place: str) -> Action:
    """What mode `offload` does to a block.

    Args:
        save: One of `OFFLOAD_SAVES`.
        place: `host` or `disk`.
    """
    if save in ("inputs", "all"):
        return Action("recompute" if save == "inputs" else "keep", place=place)
    return Action("selective", save=(save,), place=place)


@dataclass(frozen=True)
class Part:
    """A part of a model that has a mode of its own.

    Args:
        name: A glob over names of blocks, or `text`, `vision`, `audio`.
        mode: One of `MODES`.
        save: What mode `selective` stores in this part.
        offload_save: What mode `offload` stores away from the device in this part, one of `OFFLOAD_SAVES`.
    """

    name: str
    mode: str
    save: tuple[str, ...] = DEFAULT_SAVE
    offload_save: str = "inputs"


@dataclass(frozen=True)
class Settings:
    """What the flags become: typed, validated values, and all that code below the trainer sees of them.

    Args:
        mode: One of `MODES`.
        modules: Parts with a mode of their own, in the order given; the first that matches a block decides.
        every_n: Only every n-th block of each stack is recomputed, counted from the stack's first.
        save: What mode `selective` stores, as in `Action`.
        segment: Of fully recomputed blocks in a row, the input of every k-th only is stored; `sqrt`: k from their number.
        plan: Carried out instead of what a mode asks for.
        offload_save: What mode `offload` stores away from the device, one of `OFFLOAD_SAVES`.
        offload_to: One of `OFFLOAD_TARGETS`. Mode `offload` makes actions of it; `pageable` concerns every action whose
            place is not the device.
        offload_dir: An existing folder, as an absolute path, for actions whose place is `disk`.
        host_budget: How much host memory offload may take: a share of what is available (float), or bytes (int).
        prefetch: How many blocks ahead of backward are brought back to the device.
        budget: Mode `auto`: memory of the device that a step may use: a share of all of it (float), or bytes (int).
        oom_retries: Mode `auto`: how often a micro-batch that ran out of memory is redone.
        compile_budget: Share of what the compiler would store that it may, for compiled blocks in mode `selective`.
            None: no budget, ops are marked.
        skip_frozen: Frozen blocks below the first trainable parameter run without graph, recompute or backward.
        use_reentrant: The reentrant variant of torch's checkpoint.
        input_grads: One of `INPUT_GRADS`: whether embeddings are made to require grad.
        kbit_upcast: One of `KBIT_UPCASTS`: what of a model with quantised weights is cast to fp32 while it trains.
        self_check: Check after the first backward that no gradient was lost.
        preserve_rng_state: None restores the generators that a block draws from; True all; False none.
        use_cache: Whether the key/value cache is on while training. None: off where blocks are recomputed, else as it is.
        named: The user asked for this mode by name, so that a model on which it can do nothing is an error.
        checkpoint_options: Passed to `torch.utils.checkpoint.checkpoint` as they are: `context_fn`,
            `determinism_check`, `debug`, `early_stop`.
    """

    mode: str = "auto"
    modules: tuple[Part, ...] = ()
    every_n: int = 1
    save: tuple[str, ...] = DEFAULT_SAVE
    segment: int | str = 1
    plan: Plan | None = None
    offload_save: str = "inputs"
    offload_to: str = "host"
    offload_dir: str | None = None
    host_budget: float | int = 0.8
    prefetch: int = 1
    budget: float | int = 0.9
    oom_retries: int = 3
    compile_budget: float | None = None
    skip_frozen: bool = True
    use_reentrant: bool = False
    input_grads: str = "auto"
    kbit_upcast: str = "none"
    self_check: bool = True
    preserve_rng_state: bool | None = None
    use_cache: bool | None = None
    named: bool = field(default=False, compare=False)
    checkpoint_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def offload_place(self) -> str:
        """The place of the actions that mode `offload` gives."""
        return "disk" if self.offload_to == "disk" else "host"


@dataclass(frozen=True)
class SizePlan:
    """What is done in micro-batches up to a size.

    Args:
        inputs: (name, dimensions) of each input, in the order of the call.
        gradients_are_there: Whether it is for micro-batches that are not the first of their step.
        actions: One entry for each block.
    """

    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    gradients_are_there: bool
    actions: Mapping[str, Action]


@dataclass(frozen=True)
class Plan:
    """Block name -> action, in forward order. Prints as a table, goes to JSON and back.

    Args:
        actions: One entry for each block.
        sizes: Of mode `auto`: what is done instead to micro-batches of which the size is known.
    """

    actions: Mapping[str, Action]
    sizes: tuple[SizePlan, ...] = ()

    def __getitem__(self, name: str) -> Action:
        return self.actions[name]

    def __len__(self) -> int:
        return len(self.actions)

    def count(self, kind: str) -> int:
        """Number of blocks whose action is `kind`."""
        return sum(action.kind == kind for action in self.actions.values())

    @property
    def is_active(self) -> bool:
        """Whether anything is done to any block."""
        return not all(action.does_nothing for action in self.actions.values())

    def as_data(self) -> dict[str, Any]:
        """The plan as what JSON can hold: `{"blocks": {name: action}}`, an action as text where it has no reason.

        Where there are plans for sizes: `"sizes"` too, a list of `{"inputs", "gradients_are_there", "blocks"}`.
        """
        data: dict[str, Any] = {"blocks": _entries(self.actions)}
        if self.sizes:
            data["sizes"] = [
                {
                    "inputs": {name: list(dims) for name, dims in size.inputs},
                    "gradients_are_there": size.gradients_are_there,
                    "blocks": _entries(size.actions),
                }
                for size in self.sizes
            ]
        return data

    def to_json(self) -> str:
        """The plan as a JSON object; `Plan.from_json` gives an equal plan back."""
        return json.dumps(self.as_data(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The text is not JSON, has no `blocks`, names an unknown action, or has `sizes` of another form.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a plan is a JSON object; this text is not JSON: {error}") from None
        if not isinstance(data, dict) or not isinstance(data.get("blocks"), dict):
            raise ValueError('a plan is a JSON object {"blocks": {block name: action}}; found none.')
        return cls(_read_actions(data["blocks"]), tuple(_read_size(entry) for entry in data.get("sizes", ())))

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


def _entries(actions: Mapping[str, Action]) -> dict[str, Any]:
    return {name: _entry(action) for name, action in actions.items()}


def _read_actions(entries: Mapping[str, Any]) -> dict[str, Action]:
    return {name: _read_action(name, entry) for name, entry in entries.items()}


def _read_size(entry: Any) -> SizePlan:
    try:
        inputs = tuple((str(name), tuple(map(int, dims))) for name, dims in entry["inputs"].items())
        return SizePlan(inputs, bool(entry["gradients_are_there"]), _read_actions(entry["blocks"]))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f'an entry of "sizes" in a plan is {{"inputs": {{name: [dimensions]}}, "gradients_are_there": false, '
            f'"blocks": {{block name: action}}}}; found {str(entry)[:80]!r} ({error!r}).'
        ) from None


def _entry(action: Action) -> str | dict[str, Any]:
    if not action.reason:
        return action.short
    save = {"save": list(action.save)} if action.save else {}
    place = {"place": action.place} if action.place != "device" else {}
    return {"kind": action.kind, **save, **place, "reason": action.reason}


def _read_action(name: str, entry: Any) -> Action:
    try:
        if isinstance(entry, dict):
            return Action(**entry)
        return Action.from_text(entry) if isinstance(entry, str) else Action(entry)
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
