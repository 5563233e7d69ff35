"""Which action each block gets: plain functions from blocks and settings to a plan.

Every mode is one of them; `POLICIES` lists them by name. `make_plan` adds what is common to all: parts of the model that
follow a mode of their own, a plan that is given, and a user's own policy, which is asked block by block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from ckpt_trainer.blocks import Block
from ckpt_trainer.plan import FROZEN, KEEP, RECOMPUTE, Action, Part, Plan, Settings, offload_action

COMPONENTS = ("text", "vision", "audio")

Policy = Callable[[Sequence[Block], Settings], Plan]

# A user's own: an action, its text (`selective:attention`, `recompute@host`), or None for what the mode says.
BlockPolicy = Callable[[Block], Action | str | None]


def keep_all(blocks: Sequence[Block], settings: Settings) -> Plan:
    """Mode `none`: autograd stores what it asks for."""
    return Plan({block.name: KEEP for block in blocks})


def recompute_all(blocks: Sequence[Block], settings: Settings) -> Plan:
    """Mode `full`: every `settings.every_n`-th block of each stack is recomputed (Chen et al. 2016, arXiv 1604.06174)."""
    return _every_n(blocks, settings.every_n, RECOMPUTE)


def select_all(blocks: Sequence[Block], settings: Settings) -> Plan:
    """Mode `selective`: of every `settings.every_n`-th block of each stack, what `settings.save` names is stored."""
    return _every_n(blocks, settings.every_n, Action("selective", save=settings.save))


def offload_all(blocks: Sequence[Block], settings: Settings) -> Plan:
    """Mode `offload`: of every `settings.every_n`-th block of each stack, what `settings.offload_save` names moves off
    the device until backward needs it."""
    return _every_n(blocks, settings.every_n, offload_action(settings.offload_save, settings.offload_place))


def leanest(blocks: Sequence[Block], settings: Settings) -> Plan:
    """Mode `auto` where nothing is known yet: every block is recomputed. What is chosen later is for `auto`."""
    return Plan({block.name: RECOMPUTE for block in blocks})


def free_blocks(blocks: Sequence[Block], settings: Settings, policy: BlockPolicy | None = None) -> set[str]:
    """Names of the blocks whose action is for mode `auto` to choose: no other mode, plan or policy gives them one."""
    if settings.plan is not None:
        return set()
    parts = _parts_by_block(blocks, settings, Part("*", settings.mode))
    return {block.name for block in blocks if parts[block.name].mode == "auto" and not (policy and policy(block))}


POLICIES: dict[str, Policy] = {
    "none": keep_all,
    "selective": select_all,
    "full": recompute_all,
    "offload": offload_all,
    "auto": leanest,
}


def make_plan(blocks: Sequence[Block], settings: Settings, policy: BlockPolicy | None = None) -> Plan:
    """The plan that the settings ask for.

    Args:
        blocks: In forward order.
        settings: `plan` decides where there is one. Else `mode` does, and `modules` before it for the blocks that one of
            its keys names.
        policy: Asked once for each block, in this order; where it returns None, the settings decide.

    Raises:
        ValueError: A key of `modules` names no block, the given plan names blocks that are not there, there are a plan
            and a policy, or a text that the policy returned is no action.
        TypeError: The policy is not callable, or returned something else.
    """
    check_policy(policy, settings)
    plan = _plan_of_modes(blocks, settings) if settings.plan is None else plan_from(settings.plan, blocks)
    if policy is None:
        return plan
    plan = Plan({block.name: _ask(policy, block, plan[block.name]) for block in blocks})
    _refuse_answers(plan, settings)
    return plan


def plan_from(plan: Plan, blocks: Sequence[Block]) -> Plan:
    """A plan that was given, for all blocks of this model; those it does not name are kept.

    Raises:
        ValueError: It names a block that this model has not.
    """
    there = [block.name for block in blocks]
    named = [plan.actions, *(size.actions for size in plan.sizes)]
    strange = [name for actions in named for name in actions if name not in set(there)]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ValueError(
            f"checkpointing_plan names {strange[0]!r}{more}, which this model has no block of. "
            f"Blocks of this model: {_found(blocks)}.{_nearest(strange[0], there)}"
        )
    left = Action("keep", "not in the plan")
    full, *of_sizes = ({name: actions.get(name, left) for name in there} for actions in named)
    return Plan(full, tuple(replace(size, actions=own) for size, own in zip(plan.sizes, of_sizes, strict=True)))


def check_policy(policy: Any, settings: Settings) -> None:
    """Raise what `make_plan` raises of a policy, without asking it."""
    if policy is not None and not callable(policy):
        raise TypeError(f"checkpointing_policy={policy!r} is not a function of a block that returns its action.")
    if policy is not None and settings.plan is not None:
        raise ValueError("checkpointing_plan and checkpointing_policy both say what is done to each block. Remove one.")


def remembering(policy: BlockPolicy | None) -> BlockPolicy | None:
    """A policy that asks another once for each block; what is no policy as it is."""
    if policy is None or not callable(policy):
        return policy
    answers: dict[str, Action | str | None] = {}

    def ask(block: Block) -> Action | str | None:
        if block.name not in answers:
            answers[block.name] = policy(block)
        return answers[block.name]

    return ask


def _plan_of_modes(blocks: Sequence[Block], settings: Settings) -> Plan:
    everywhere = Part("*", settings.mode, settings.save, settings.offload_save)
    parts = _parts_by_block(blocks, settings, everywhere)
    plans = {
        part: POLICIES[part.mode](blocks, replace(settings, save=part.save, offload_save=part.offload_save))
        for part in (everywhere, *settings.modules)
    }
    return Plan({name: plans[part][name] for name, part in parts.items()})


def _parts_by_block(blocks: Sequence[Block], settings: Settings, everywhere: Part) -> dict[str, Part]:
    parts = {block.name: everywhere for block in blocks}
    # The first key that names a block decides, so the last is written first.
    for part in reversed(settings.modules):
        named = [block.name for block in blocks if _names(part.name, block)]
        if not named:
            raise ValueError(
                f"checkpointing_modules names {part.name!r}, which matches no block. Blocks of this model: "
                f"{_found(blocks)}.{_nearest(part.name, [*COMPONENTS, *(block.stack for block in blocks)])}"
            )
        parts |= dict.fromkeys(named, part)
    return parts


def _names(key: str, block: Block) -> bool:
    if key in COMPONENTS:
        return key == block.component
    return fnmatchcase(block.name, key) or fnmatchcase(block.name, f"{key}.*")


def _every_n(blocks: Sequence[Block], every_n: int, action: Action) -> Plan:
    seen: Counter[str] = Counter()
    actions = {}
    for block in blocks:
        chosen = seen[block.stack] % every_n == 0
        seen[block.stack] += 1
        done = action if block.trainable else replace(action, reason=FROZEN)
        actions[block.name] = done if chosen else Action("keep", f"every_n={every_n}")
    return Plan(actions)


def _ask(policy: BlockPolicy, block: Block, otherwise: Action) -> Action:
    answer: Any = policy(block)
    if answer is None:
        return otherwise
    if isinstance(answer, Action):
        return answer
    said = f"checkpointing_policy returned {answer!r} for block {block.name!r}"
    if not isinstance(answer, str):
        raise TypeError(
            f"{said}. Return an Action, its text ('keep', 'recompute', 'selective:attention', 'recompute@host'), or "
            "None for what the mode says."
        )
    try:
        return Action.from_text(answer)
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from None


def _refuse_answers(plan: Plan, settings: Settings) -> None:
    """What settings exclude is refused when they are made; here, what they exclude of a policy's answers."""
    for name, action in plan.actions.items():
        said = f"checkpointing_policy returned {action.short!r} for block {name!r}"
        if action.kind == "selective" and settings.use_reentrant:
            raise ValueError(
                f"{said}, which needs the non-reentrant variant. Remove checkpointing_use_reentrant=True, or return "
                "'keep' or 'recompute'."
            )
        if action.kind == "selective" and settings.checkpoint_options.get("context_fn"):
            raise ValueError(
                f"{said}, and context_fn is a selection of its own. Remove context_fn, or return 'keep' or 'recompute'."
            )
        if action.place == "disk" and settings.offload_dir is None:
            raise ValueError(f"{said}, which needs a folder. Set checkpointing_offload_dir, or return '...@host'.")


def _found(blocks: Sequence[Block]) -> str:
    stacks = Counter((block.stack, block.component) for block in blocks)
    return ", ".join(f"{stack} ({number} x {component})" for (stack, component), number in stacks.items()) or "none"


def _nearest(name: str, there: Sequence[str]) -> str:
    near = get_close_matches(name, [other for other in there if other != name], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
