"""Say what was planned and what happened: the line at the start, metrics, the report, and errors that lead to the fix.

Returns strings and plain data; never prints and never logs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ckpt_trainer import memory
from ckpt_trainer.blocks import Block
from ckpt_trainer.plan import RECOMPUTE, Plan, Settings
from ckpt_trainer.recompute import Tally


def first_line(plan: Plan, blocks: Sequence[Block], settings: Settings, hooks_taken_off: bool = False) -> str:
    """One line: how many blocks of which part are recomputed, why not the others, and what else is done to the model.

    Args:
        hooks_taken_off: Others put input-gradient hooks on the model, which are off during each step.
    """
    parts = []
    for component in dict.fromkeys(block.component for block in blocks):
        own = [block for block in blocks if block.component == component]
        recomputed = sum(plan[block.name] == RECOMPUTE for block in own)
        notes = Counter(_why_not(plan, block) for block in own)
        others = ", ".join(f"{number} {note}" for note, number in notes.items() if note)
        parts.append(f"{recomputed}/{len(own)} {component} blocks recomputed" + (f" ({others})" if others else ""))
    variant = "reentrant" if settings.use_reentrant else "non-reentrant"
    off = settings.use_cache is False or (settings.use_cache is None and plan.count("recompute"))
    cache = "off while training" if off else "on" if settings.use_cache else "as it was"
    hook = "on" if settings.input_grads == "always" else "off"
    hook += ", the one of others taken off in each step (checkpointing_skip_frozen)" if hooks_taken_off else ""
    return (
        f"mode {settings.mode}: {'; '.join(parts) or 'no blocks'}; {variant}; use_cache {cache}; "
        f"input-gradient hook {hook}"
    )


def _why_not(plan: Plan, block: Block) -> str:
    action = plan[block.name]
    return action.reason if action.reason else ("" if action.kind == "recompute" else "kept")


def memory_report(
    plan: Plan, blocks: Sequence[Block], tally: Tally, recomputable_share: float | None
) -> dict[str, Any]:
    """What was done so far.

    Returns:
        `blocks`: per component, number of blocks by action; `calls`: calls of blocks by what was done with them;
        `recomputed_blocks`: replays, all together, and `recomputed_by_block`; `recomputed_flops_share`: FLOPs of replays
        / FLOPs of forwards, None if not measured; `memory`: bytes, see `memory_bytes`; `plan`: block name -> action.
    """
    kinds: dict[str, Counter[str]] = {}
    for block in blocks:
        kinds.setdefault(block.component, Counter())[plan[block.name].kind] += 1
    return {
        "blocks": {component: dict(counts) for component, counts in kinds.items()},
        "calls": dict(tally.calls),
        "recomputed_blocks": sum(tally.replays.values()),
        "recomputed_by_block": dict(tally.replays),
        "recomputed_flops_share": flops_share(tally, recomputable_share),
        "memory": memory_bytes(blocks[0].module if blocks else None),
        "plan": {name: str(action) for name, action in plan.actions.items()},
    }


def flops_share(tally: Tally, recomputable_share: float | None) -> float | None:
    """FLOPs of replays / FLOPs of forwards, by what blocks and model took in the first forward.

    A replay stops once it has what backward needs, mostly before its last matrix product; it counts here as a whole.
    """
    if recomputable_share is None:
        return None
    forwards = sum(tally.block_flops.get(name, 0) * number for name, number in tally.checkpointed.items())
    replays = sum(tally.block_flops.get(name, 0) * number for name, number in tally.replays.items())
    return recomputable_share * replays / forwards if forwards else 0.0


def memory_bytes(module: nn.Module | None) -> dict[str, int]:
    """Peak bytes of the device that the module is on, as its allocator counts them, and of this process on the host."""
    parameter = next(module.parameters(), None) if module is not None else None
    device = parameter.device if parameter is not None else torch.device("cpu")
    entries = {"peak_device_bytes": memory.peak_bytes(device), "peak_host_bytes": memory.host_peak_bytes()}
    return {key: value for key, value in entries.items() if value is not None}


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


def explain_no_effect(tally: Tally, recomputed: Sequence[Block]) -> list[str]:
    """Where the first step did not do what the plan or a setting says: what, and why; empty if all is well."""
    found = []
    cached = tally.calls["got a key/value cache"]
    if cached:
        found.append(
            f"{cached} calls of blocks got a key/value cache and were kept, since a replay would add to it again. "
            "use_cache=False turns it off; methods that train a prefix need it, and leave nothing to recompute."
        )
    elif tally.calls and not tally.calls["recompute"]:
        calls = ", ".join(f"{number} {why}" for why, number in tally.calls.items() if number)
        found.append(
            f"{len(recomputed)} blocks were to be recomputed and none was. Their calls in the first step: {calls}."
        )
    if tally.unrestored:
        found.append(
            f"preserve_rng_state=False: {len(tally.unrestored)} blocks draw random numbers ({min(tally.unrestored)}, ...), "
            "others when they are replayed. Their gradients are wrong; remove it."
        )
    return found


def _some(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
