"""Which results of a block's ops are stored: the entries of a list, turned into a rule for each op.

How they are stored is not decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ckpt_trainer.ops import WORDS, Place, is_weight, kind_of, matches_op, name_of, writes, written_arguments

# What a result is known by: the number of its site, which is an op at a place in the block, and its turn there.
Key = tuple[int, int]


class ChosenOps:
    """The rules for the ops of one block.

    Args:
        save: What to store: `attention`, `matmul`, `half_matmul`, names of ops, globs over names of ops.

    Attributes:
        matched: The entries of `save` that meant an op so far.
        plain: Ops so far that have no rule: nothing is to be done about them.
    """

    def __init__(self, save: Sequence[str]) -> None:
        self.matched: set[str] = set()
        self.plain: set[Any] = set()
        self._words = frozenset(entry for entry in save if entry in WORDS)
        self._named = tuple(entry for entry in save if entry not in WORDS)
        self._rules: dict[Any, Rule] = {}
        self._sites: list[tuple[Any, Place]] = []
        self._numbers: dict[tuple[Any, Place], int] = {}
        self._halves: dict[Key, bool] = {}

    def rule(self, op: Any) -> Rule | None:
        """The rule for an op; None, and `plain` from then on, if there is none."""
        rule = self._rules.get(op)
        if rule is not None or op in self.plain:
            return rule
        rule = self._find_rule(op)
        if rule is None:
            self.plain.add(op)
        else:
            self._rules[op] = rule
        return rule

    def _find_rule(self, op: Any) -> Rule | None:
        kind = kind_of(op)
        named = [entry for entry in self._named if matches_op(entry, op)]
        self.matched.update(named)
        self.matched.update(word for word in self._words if kind != "batched" and matches_op(word, op))
        if kind == "unsafe view":
            return never
        if not (written_arguments(op) and op.namespace == "aten"):
            if named or kind in ("choice", "collective") or (self._words and kind == "attention"):
                return always
            if kind == "copy":
                return between_devices
            if kind == "batched" and self._words:
                return of_batched
            if kind == "matmul" and self._words - {"attention"}:
                return of_matmul
        return never if writes(op) else None

    def number(self, op: Any, place: Place) -> int:
        """The number of a site."""
        site = (op, place)
        number = self._numbers.get(site)
        if number is None:
            number = self._numbers[site] = len(self._sites)
            self._sites.append(site)
        return number

    def describe(self, key: Key) -> str:
        """A result in words: its op, and the innermost line of the block's code that asks for it."""
        op, place = self._sites[key[0]]
        return name_of(op) + (f" ({place[1]}:{place[2]})" if len(place) > 2 else "")

    def match(self, words: Sequence[str]) -> None:
        """Note which of these words are in the list: the arguments of an op tell that it is meant."""
        self.matched |= self._words.intersection(words)

    def wants_matmul(self, key: Key) -> bool:
        """Whether the result of a matmul with a weight is stored: of all, of every second place, or of none."""
        if "matmul" in self._words:
            return True
        if "half_matmul" not in self._words:
            return False
        number, turn = key
        turn_matters = self._sites[number][1][0]
        role = (number, turn if turn_matters else 0)
        return self._halves.setdefault(role, len(self._halves) % 2 == 0)


# Given a call of an op and its result, whether the result is stored.
Rule = Callable[["ChosenOps", Key, Any, Any], bool]


def always(chosen: ChosenOps, key: Key, args: Any, out: Any) -> bool:
    return True


def never(chosen: ChosenOps, key: Key, args: Any, out: Any) -> bool:
    return False


def between_devices(chosen: ChosenOps, key: Key, args: Any, out: Any) -> bool:
    # A copy in a replay would make the device wait once more.
    return isinstance(out, Tensor) and out.device.type != args[0].device.type


def of_matmul(chosen: ChosenOps, key: Key, args: Any, out: Any) -> bool:
    return chosen.wants_matmul(key)


def of_batched(chosen: ChosenOps, key: Key, args: Any, out: Any) -> bool:
    operands = args[-2:]
    if any(is_weight(operand) for operand in operands):
        chosen.match(("matmul", "half_matmul"))
        return chosen.wants_matmul(key)
    chosen.match(WORDS)
    # Attention made of matmuls: what it gives, and not the scores, which grow with the square of the length.
    return bool(out.numel() <= max(operand.numel() for operand in operands))
