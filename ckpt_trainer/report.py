"""Say what was planned and what happened: the line at the start, metrics, the report, and errors that lead to the fix.

Returns strings and plain data; never prints and never logs.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ckpt_trainer import memory
from ckpt_trainer.blocks import Block
from ckpt_trainer.install import Selection
from ckpt_trainer.kbit import Preparation
from ckpt_trainer.ops import nearest_names
from ckpt_trainer.plan import FROZEN, Action, Plan, Settings
from ckpt_trainer.rebuild import AVAILABLE, Rebuilding
from ckpt_trainer.recompute import Tally


def first_line(
    plan: Plan, blocks: Sequence[Block], settings: Settings, hooks_taken_off: bool = False, own_policy: bool = False
) -> str:
    """One line: what is done to how many blocks of which part, why not to the others, what else is done to the model.

    Args:
        hooks_taken_off: Others put input-gradient hooks on the model, which are off during each step.
        own_policy: The plan is that of a user's policy.
    """
    source = f"mode {settings.mode}" if settings.plan is None else "plan given"
    source += ", at first" if settings.mode == "auto" and settings.plan is None else ""
    source += ", own policy" if own_policy else ""
    parts = [
        _part_line(component, [plan[block.name] for block in blocks if block.component == component])
        for component in dict.fromkeys(block.component for block in blocks)
    ]
    variant = "reentrant" if settings.use_reentrant else "non-reentrant"
    if settings.segment != 1 and plan.count("recompute"):
        variant += f"; segments of {settings.segment}"
    off = settings.use_cache is False or (settings.use_cache is None and plan.is_active)
    cache = "off while training" if off else "on" if settings.use_cache else "as it was"
    hook = "on" if settings.input_grads == "always" else "off"
    hook += ", the one of others taken off in each step (checkpointing_skip_frozen)" if hooks_taken_off else ""
    return f"{source}: {'; '.join(parts) or 'no blocks'}; {variant}; use_cache {cache}; input-gradient hook {hook}"


def kbit_line(done: Preparation) -> str:
    """What was done to a quantised model for the time of its training."""
    size = memory.format_bytes(done.bytes_before)
    if done.upcast:
        size = f"{len(done.upcast)} parameters cast to fp32, weights {size} -> {memory.format_bytes(done.bytes_after)}"
    else:
        size = f"weights {size}, none cast"
    parts = [f"quantised ({done.method}): {size}"]
    if done.left:
        parts.append(done.left)
    if done.compute:
        parts.append(f"{done.compute} layers set to compute in float32 do so in what autocast has, where it is on")
    if done.trained:
        parts.append(f"trained in 16 bits, and not cast: {_some(done.trained)}")
    return "; ".join(parts)


def _part_line(component: str, actions: Sequence[Action]) -> str:
    """Such as `24/32 text blocks selective:expensive (8 kept)`."""
    done = Counter(_done(action) for action in actions if not _is_left(action))
    left = Counter(action.reason or "kept" for action in actions if _is_left(action))
    # Where nothing is done, the word is that of what would be.
    word = next((_done(action) for action in actions if not action.does_nothing), "recomputed")
    what = (
        f" {next(iter(done), word)}" if len(done) < 2 else f": {', '.join(f'{n} {what}' for what, n in done.items())}"
    )
    notes = [f"{number} {why}" for why, number in left.most_common(_SHOWN_REASONS)]
    if rest := left.total() - sum(number for _, number in left.most_common(_SHOWN_REASONS)):
        notes.append(f"{rest} for other reasons")
    return f"{done.total()}/{len(actions)} {component} blocks{what}" + (f" ({', '.join(notes)})" if notes else "")


def _is_left(action: Action) -> bool:
    return action.does_nothing or action.reason == FROZEN


def _done(action: Action) -> str:
    if action.place == "device":
        return "recomputed" if action.kind == "recompute" else action.short
    what = {"recompute": "recomputed with inputs", "keep": "stored"}
    return f"{what.get(action.kind, replace(action, place='device').short)} on the {action.place}"


_SHOWN_REASONS = 3


def memory_report(
    plan: Plan,
    blocks: Sequence[Block],
    tally: Tally,
    recomputable_share: float | None,
    offload: Mapping[str, Any] | None = None,
    compiled: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What was done so far.

    Returns:
        `blocks`: per component, number of blocks by action; `calls`: calls of blocks by what was done with them;
        `recomputed_blocks`: replays, all together, and `recomputed_by_block`; `rebuilt_inputs`: forwards run once more
        for the next block's input; `recomputed_flops_share`: FLOPs of both / FLOPs of forwards, None if not measured;
        `memory`: bytes, see `memory_bytes`; `offload`: what was moved off the device, see `Offloading.report`, None where
        nothing was to be; `compiled`: how many blocks a compiler runs, whose calls are not counted, `backends` and
        `memory_budget`, None where it runs none; `plan`: the plan as `Plan.as_data` gives it, which is what a file for
        `checkpointing_plan` holds. `auto` is added by the engine: see `auto_lines.as_data`, None where the plan is the same
        for all micro-batches.
    """
    kinds: dict[str, Counter[str]] = {}
    for block in blocks:
        kinds.setdefault(block.component, Counter())[plan[block.name].short] += 1
    # A replay of a selective block does part of what its forward did; which, is counted in the first one.
    counted = all(
        plan[name].kind != "selective" or name in tally.replay_flops for name in tally.replays if name in plan.actions
    )
    return {
        "blocks": {component: dict(counts) for component, counts in kinds.items()},
        "calls": dict(tally.calls),
        "recomputed_blocks": sum(tally.replays.values()),
        "recomputed_by_block": dict(tally.replays),
        "rebuilt_inputs": sum(tally.rebuilt_inputs.values()),
        "recomputed_flops_share": flops_share(tally, recomputable_share) if counted else None,
        "memory": memory_bytes(blocks[0].module if blocks else None),
        "offload": offload,
        "compiled": compiled,
        "plan": plan.as_data(),
    }


def flops_share(tally: Tally, recomputable_share: float | None) -> float | None:
    """FLOPs of what ran again / FLOPs of forwards, by what blocks and model took in the first step.

    A replay stops once it has what backward needs, mostly before its last matrix product. Of a block that is replayed
    as a whole it counts as a whole; of one that reuses results, what ran was counted.
    """
    if recomputable_share is None:
        return None
    flops = tally.block_flops
    forwards = sum(flops.get(name, 0) * number for name, number in tally.checkpointed.items())
    replays = sum(tally.replay_flops.get(name, flops.get(name, 0)) * n for name, n in tally.replays.items())
    replays += sum(flops.get(name, 0) * number for name, number in tally.rebuilt_inputs.items())
    return recomputable_share * replays / forwards if forwards else 0.0


def memory_bytes(module: nn.Module | None) -> dict[str, int]:
    """Peak bytes of the device that the module is on, as its allocator counts them, and of this process on the host."""
    device = device_of(module)
    entries = {"peak_device_bytes": memory.peak_bytes(device), "peak_host_bytes": memory.host_peak_bytes()}
    return {key: value for key, value in entries.items() if value is not None}


def device_of(module: nn.Module | None) -> torch.device:
    """The device of a module's first parameter; the host where it has none."""
    parameter = next(module.parameters(), None) if module is not None else None
    return parameter.device if parameter is not None else torch.device("cpu")


def explain_nowhere(why: str, plan: Plan) -> str:
    """Mode `offload` on a device that has no other place than the host: what it does there."""
    kinds = {action.kind for action in plan.actions.values() if action.place != "device"}
    words = {"keep": "kept", "recompute": "recomputed", "selective": "selective"}
    return (
        f"offload moves nothing, since {why}: blocks are {' or '.join(words[k] for k in sorted(kinds))} as without it"
    )


def explain_nothing_moved(offload: Mapping[str, Any]) -> str:
    """Mode `offload` in whose first step no byte was moved, although there is a place to go."""
    kept = [f"{held['tensors']} {why}" for why, held in offload["kept"].items()]
    return (
        f"0 bytes offloaded in the first step. Tensors that stayed on the device: {', '.join(kept) or 'none'}; those of "
        "the newest block always do."
    )


def explain_mismatch(error: Exception, tally: Tally, blocks: Sequence[Block]) -> str:
    """A `CheckpointError` of torch with the block's name, what may cause it, and what to set."""
    name = tally.last_replayed
    block = next((block for block in blocks if block.name == name), None)
    causes = ["it reads state that changed between forward and backward (an attribute, a list, a counter, a file)"]
    if block is not None:
        kinds = " ".join(type(module).__name__.lower() for module in block.module.modules())
        if any(word in kinds for word in ("expert", "moe", "router", "topk")):
            causes.insert(0, "its router chose other experts the second time, since the device's kernels are not exact")
        if torch.is_autocast_enabled():
            causes.append("it enters or leaves autocast by itself")
        if any(hook for module in block.module.modules() for hook in module._forward_pre_hooks):
            causes.append("a forward hook inside it changes its result from call to call")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        causes.append("its parameters were sharded or gathered differently the second time")
    listed = "\n".join(f"  - {cause}" for cause in causes)
    return (
        f"block {name!r} gave other tensors when it was replayed than in its forward. Possible causes in this run:\n"
        f"{listed}\n"
        f'To train on, keep what it stores: checkpointing_modules={{"{name}": "none"}}. To find the operator, set '
        'activation_checkpointing_kwargs={"debug": True}. What torch found:\n'
        f"{error}"
    )


def explain_lost(names: Sequence[str], blocks: Sequence[Block]) -> str:
    """The reentrant variant cost parameters of blocks that were replayed their gradients: which, why, what to do."""
    block = next(block.name for block in blocks if names[0].startswith(f"{block.name}."))
    return (
        f"the first backward gave no gradient to {_some(names)}, in block {block!r} and its like, which was replayed. "
        "The reentrant variant cuts what leaves a block by another way than its return value. Set "
        "checkpointing_use_reentrant=False; or checkpointing_self_check=False, if they get none without it either."
    )


def explain_unreached(names: Sequence[str], blocks: Sequence[Block]) -> str:
    """Trainable parameters that ran and got no gradient, by no fault of the replay."""
    by_block = Counter(next(block.name for block in blocks if name.startswith(f"{block.name}.")) for name in names)
    shown = [names[0]] if len(names) == 1 else [f"{name} ({number} parameters)" for name, number in by_block.items()]
    return (
        f"the first backward gave no gradient to {_some(shown)}, whose modules ran. Recomputing is not the cause: what "
        "they compute is not part of the loss, or they run under no_grad. Freeze them to save memory, or look there; "
        "checkpointing_self_check=False ends this check."
    )


def explain_no_effect(tally: Tally, planned: Sequence[Block]) -> list[str]:
    """Where the first step did not do what the plan or a setting says: what, and why; empty if all is well."""
    found = []
    cached = tally.calls["got a key/value cache"]
    if cached:
        found.append(
            f"{cached} calls of blocks got a key/value cache and were kept, since a replay would add to it again. "
            "use_cache=False turns it off; methods that train a prefix need it, and leave nothing to recompute."
        )
    elif tally.calls and not any(tally.calls[what] for what in ("recompute", "rebuild", "offload", "kept")):
        calls = ", ".join(f"{number} {why}" for why, number in tally.calls.items() if number)
        found.append(
            f"{len(planned)} blocks were to be recomputed and none was. Their calls in the first step: {calls}."
        )
    for why, number in Counter(tally.unrestored.values()).items():
        first = min(name for name, reason in tally.unrestored.items() if reason == why)
        advice = "remove it" if "=" in why else "set their dropout to 0, or keep what they store (mode 'none')"
        found.append(
            f"{why}: {number} blocks draw random numbers ({first}, ...), others when they are replayed. Their gradients "
            f"are wrong; {advice}."
        )
    return found


def explain_unmatched(names: Sequence[str], ops: Mapping[str, int], modules: Sequence[str]) -> str:
    """Names of what to store that no op and no module of the first step had."""
    near = {name: difflib.get_close_matches(name, modules, n=1) or nearest_names(name, list(ops)) for name in names}
    hint = "".join(f" Did you mean {found[0]!r} for {name!r}?" for name, found in near.items() if found)
    return (
        f"selective is to store {', '.join(map(repr, names))} (checkpointing_save, or after the colon in "
        f"checkpointing_modules, a plan or a policy), which matched nothing in the first step.{hint}\n"
        f"Ops that ran: {', '.join(f'{op} ({n})' for op, n in ops.items()) or 'not looked at'}.\n"
        f"Modules of a block: {', '.join(modules)}."
    )


def explain_selection(stored: Mapping[str, Selection], rebuilding: Rebuilding, tally: Tally) -> list[str]:
    """Where what was to be stored or rebuilt selectively was not; empty if all is well."""
    found = []
    ran = [selection for selection in stored.values() if selection.has_run]
    for save, number in Counter(tuple(selection.save) for selection in ran if not selection.matched).items():
        names = ",".join(save)
        found.append(f"selective:{names}: nothing of the kind ran in {number} blocks, which are recomputed as a whole.")
    not_stored = dict.fromkeys(why for selection in ran for why in selection.not_stored)
    found += [f"selective: {why}." for why in list(not_stored)[:_SHOWN_REASONS]]
    if not AVAILABLE and tally.calls["rebuild"]:
        found.append(
            "selective:expensive stored everything: autograd of this torch does not tell what an op saved. Set "
            "checkpointing_save to matmul, or use torch 2.13."
        )
    elif tally.calls["rebuild"] and not rebuilding.tensors:
        found.append(
            f"selective:expensive found nothing to rebuild in {tally.calls['rebuild']} calls of blocks, and stored "
            "everything. Set checkpointing_save to matmul, or checkpointing_mode='full'."
        )
    return found


def _some(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
