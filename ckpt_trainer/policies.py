"""Which action each block gets: plain functions from blocks and settings to a plan.

Every mode is one of them; `POLICIES` lists them by name. `make_plan` adds what is common to all: parts of the model that
follow a mode of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from ckpt_trainer.blocks import Block
from ckpt_trainer.plan import KEEP, RECOMPUTE, Action, Plan, Settings

COMPONENTS = ("text", "vision", "audio")

Policy = Callable[[Sequence[Block], Settings], Plan]


def keep_all(blocks: Sequence[Block], settings: Settings) -> Plan:
    """Mode `none`: autograd stores what it asks for."""
    return Plan({block.name: KEEP for block in blocks})


def recompute_all(blocks: Sequence[Block], settings: Settings) -> Plan:
    """Mode `full`: every `settings.every_n`-th block of each stack is recomputed (Chen et al. 2016, arXiv 1604.06174)."""
    seen: Counter[str] = Counter()
    actions = {}
    for block in blocks:
        chosen = seen[block.stack] % settings.every_n == 0
        seen[block.stack] += 1
        actions[block.name] = _recompute(block) if chosen else Action("keep", f"every_n={settings.every_n}")
    return Plan(actions)


POLICIES: dict[str, Policy] = {"none": keep_all, "full": recompute_all}


def make_plan(blocks: Sequence[Block], settings: Settings) -> Plan:
    """The plan that the settings ask for.

    Args:
        blocks: In forward order.
        settings: `mode` decides, and `modules` before it for the blocks that one of its keys names.

    Raises:
        ValueError: A key of `modules` names no block.
    """
    plans = {mode: POLICIES[mode](blocks, settings) for mode in {settings.mode, *dict(settings.modules).values()}}
    modes = _modes_by_block(blocks, settings)
    return Plan({block.name: plans[modes[block.name]][block.name] for block in blocks})


def _modes_by_block(blocks: Sequence[Block], settings: Settings) -> dict[str, str]:
    modes = {block.name: settings.mode for block in blocks}
    # The first key that names a block decides, so the last is written first.
    for key, mode in reversed(settings.modules):
        named = [block.name for block in blocks if _names(key, block)]
        if not named:
            stacks = Counter((block.stack, block.component) for block in blocks)
            found = ", ".join(f"{stack} ({num} x {component})" for (stack, component), num in stacks.items())
            near = get_close_matches(key, [*COMPONENTS, *(block.stack for block in blocks)], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"checkpointing_modules names {key!r}, which matches no block. "
                f"Blocks of this model: {found or 'none'}.{hint}"
            )
        modes |= dict.fromkeys(named, mode)
    return modes


def _names(key: str, block: Block) -> bool:
    if key in COMPONENTS:
        return key == block.component
    return fnmatchcase(block.name, key) or fnmatchcase(block.name, f"{key}.*")


def _recompute(block: Block) -> Action:
    return RECOMPUTE if block.trainable else Action("recompute", "frozen, if a gradient passes")
