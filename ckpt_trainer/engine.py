"""Activation checkpointing of one model while it trains: the plan, what carries it out, and each step under it.

`Checkpointing` is what the trainer and `loop` hold.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError

from ckpt_trainer import auto_lines, compiled, compiled_budget, memory, report
from ckpt_trainer.auto import Planner
from ckpt_trainer.batch_plans import BatchPlans
from ckpt_trainer.blocks import Block, find_blocks, largest_groups
from ckpt_trainer.budgets import budget_of
from ckpt_trainer.compiled import is_eager
from ckpt_trainer.compiled_budget import CompiledPlan, CostsOf
from ckpt_trainer.costs import Link
from ckpt_trainer.deepspeed_rules import deepspeed_notes, refuse_emptied
from ckpt_trainer.distributed import (
    is_under_fsdp1,
    one_forward_checked,
    refuse_reentrant_wrapped,
    refuse_wrapped_blocks,
    wrapper_notes,
)
from ckpt_trainer.first_pass import FirstPass
from ckpt_trainer.host_memory import host_cap
from ckpt_trainer.install import Installed, Runners, is_sharded, offloading_of
from ckpt_trainer.kbit import following_autocast, quantization_of, without_kept_inputs
from ckpt_trainer.log import logger
from ckpt_trainer.offload import Offloading
from ckpt_trainer.plan import Action, Plan, Settings
from ckpt_trainer.policies import BlockPolicy, free_blocks, make_plan, remembering
from ckpt_trainer.prepare import (
    UseCache,
    input_grads,
    input_modules,
    modules_switched_on,
    modules_with_input_grad_hook,
    reentrant_calls_checked,
    refuse_reentrant,
    switched_off,
    without_input_grad_hooks,
)
from ckpt_trainer.recompute import Tally
from ckpt_trainer.roofline import device_of
from ckpt_trainer.streams import why_not


class Checkpointing:
    """One model and its plan. Between steps nothing of it is on the model.

    Args:
        model: The model as it is called in a step: bare, or wrapped by PEFT, DDP, FSDP or a compiler.
        settings: What was asked for.
        log_from: Level from which on to log: `logging.INFO`, or above `logging.CRITICAL` for nothing.
        policy: A user's own, asked for the action of each block whenever a plan is made; see `policies.make_plan`.
        watches: Look at the first forward and backward, and say what they showed.
        costs_of: Tells what a step of a compiled model costs, for mode `auto`; without, such a model is recomputed.

    Attributes:
        blocks: The blocks of the model, in forward order.
        plan: Their actions.
        tally: What happened to their calls so far.
        oom_retries: How often a micro-batch that ran out of memory is to be redone; 0 where no plan could be leaner.
        recomputable_share: FLOPs of one forward of the blocks to be recomputed / FLOPs of one of the model, from the
            first; None until it is measured, and where it is compiled.

    Raises:
        ValueError: The settings ask for something that this model cannot do.
        TypeError: The policy returned something that is no action.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        log_from: int = logging.INFO,
        policy: BlockPolicy | None = None,
        watches: bool = True,
        costs_of: CostsOf | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.blocks = find_blocks(model)
        self.tally = Tally()
        self.recomputable_share: float | None = None
        self._concluded = not watches
        self._begun = False
        self._is_left = False
        self._is_on = False
        self._offloading: Offloading | None = None
        self._use_cache = UseCache(model)
        self._log_from = log_from
        self._policy = policy
        self._costs_of = costs_of
        self._switched = modules_switched_on(model)
        self._compiled = compiled.compiled_part(model, [(block.name, block.module) for block in self.blocks])
        self._is_quantized = quantization_of(model) is not None
        self._find_input_hooks()
        warnings = list(self._warnings())
        self._batches: BatchPlans | CompiledPlan | None = None
        self._carry_out()
        warnings += compiled.warnings(self.plan, settings, self._compiled)
        for warning in [*warnings, *wrapper_notes(model), *deepspeed_notes(model, self.plan)]:
            self._say(logging.WARNING, warning)

    def _find_input_hooks(self) -> None:
        needless = self.settings.skip_frozen and not self.settings.use_reentrant
        theirs = modules_with_input_grad_hook(self.model)
        self._needless_hooks = theirs if needless else []
        wanted = input_modules(self.model) if self.settings.input_grads == "always" else []
        self._hooked = [module for module in wanted if needless or module not in theirs]

    def _carry_out(self) -> None:
        self._trainable = [block.trainable for block in self.blocks]
        policy = remembering(self._policy)
        self.plan: Plan = make_plan(self.blocks, self.settings, policy)
        may_move = self.plan.sizes or free_blocks(self.blocks, self.settings, policy)
        if self._offloading is None and (self._moves or may_move):
            self._offloading = offloading_of(self.settings)
        if self._replays_reentrant:
            refuse_reentrant(self.model)
            refuse_reentrant_wrapped(self.model)
        refuse_emptied(self.model, self.plan, self.settings)
        compiled.refuse(self.model, self.plan, self.settings, self._compiled)
        self._budget = compiled.budget_of(self.plan, self.settings, self._compiled)
        self._runners = Runners(self.blocks, self.settings, self.tally, self._offloading)
        self._made: dict[tuple[Action, ...], Installed] = {}
        self._installed = self._install(self.plan)
        if self._batches is not None:
            self._batches.release()
        self._batches = self._batch_plans(policy)
        self.oom_retries = self.settings.oom_retries if self._batches is not None else 0
        if isinstance(self.model, nn.DataParallel) and self.plan.is_active:
            raise ValueError(
                "nn.DataParallel copies a model to each device for each step, which activation checkpointing of "
                "single blocks does not survive. Start with `torchrun --nproc_per_node=N` or `accelerate launch`, or "
                "use one device (CUDA_VISIBLE_DEVICES=0)."
            )
        if self.plan.is_active:
            refuse_wrapped_blocks(self.model)
        hooks, own = bool(self._needless_hooks), self._policy is not None
        self._say(logging.INFO, report.first_line(self.plan, self.blocks, self.settings, hooks, own))
        by_compiler = compiled.first_line(self.plan, self.settings, self._compiled)
        if by_compiler and self._batches is None:
            self._say(logging.INFO, by_compiler)
        why = why_not(report.device_of(self.blocks[0].module)) if self._moves and self.blocks else None
        if why:
            self._say(logging.INFO, report.explain_nowhere(why, self.plan))

    def _install(self, plan: Plan) -> Installed:
        actions = tuple(plan.actions.values())
        if actions not in self._made:
            carried = self.blocks, plan, self.settings, self._runners
            self._made[actions] = Installed(*carried, self._compiled, self._left_by_compiler)
        return self._made[actions]

    def _batch_plans(self, policy: BlockPolicy | None) -> BatchPlans | CompiledPlan | None:
        """What chooses a plan for each micro-batch: in mode `auto`, or where a plan has several."""
        free = free_blocks(self.blocks, self.settings, policy)
        if not free and not self.plan.sizes:
            return None
        why = self._why_not_auto(bool(free))
        if why:
            self._say(logging.INFO, f"auto: the same is done to micro-batches of all sizes, since {why}")
            return None
        where = report.device_of(self.blocks[0].module)
        allowed = budget_of(self.settings.budget, where, memory.own_bytes(self.model))
        if not is_eager(self.model):
            of = self.model, self.blocks, free, self.plan, self.settings, allowed(), self._costs_of
            return CompiledPlan(*of, self._swap, self._say)
        names = [block.name for block in self.blocks]
        planner = Planner(names, Plan(self.plan.actions), allowed, self._link(where), self.plan.sizes)
        if free:
            self._say(logging.INFO, auto_lines.start_line(allowed(), self.settings.budget, len(free)))
        parts = self._runners, device_of(where), self._swap, self._say
        return BatchPlans(self.model, self.blocks, free, planner, *parts)

    def make_leaner(self, attempt: int, retries: int) -> None:
        """The micro-batch that just failed gets a leaner plan, with the last of the retries the leanest there is."""
        if self._batches is not None:
            self._batches.make_leaner(1 - attempt / retries)

    def explain_out_of_memory(self, error: BaseException) -> str:
        """What the micro-batch that just failed needed, and what would fit."""
        return self._batches.explain_out_of_memory() if self._batches is not None else ""

    def _link(self, where: torch.device) -> Link:
        """The way to host memory, if there is one."""
        if why_not(where) is not None:
            return Link()
        settings, speed = self.settings, device_of(where).link_bytes_per_second
        return Link(speed, host_cap(settings.host_budget), settings.prefetch)

    def _why_not_auto(self, is_free: bool) -> str:
        """Why steps of this model cannot be measured; empty where they can."""
        if not is_eager(self.model):
            costs_of = self._costs_of if is_free else None
            if why := compiled_budget.why_not(self._compiled, self.settings, costs_of):
                return why
        if isinstance(self.model, nn.DataParallel):
            return "nn.DataParallel copies the model in each step"
        if any(isinstance(module, nn.SyncBatchNorm) for module in self.model.modules()):
            return "SyncBatchNorm makes all ranks run the same blocks"
        devices = {parameter.device for block in self.blocks for parameter in block.module.parameters()}
        if len(devices) > 1:
            return f"its blocks are on {len(devices)} devices"
        sharded = (is_sharded(module) for block in self.blocks for module in block.module.modules())
        if is_under_fsdp1(self.model) or any(sharded):
            return "its weights are sharded"
        return ""

    def _swap(self, plan: Plan | None) -> None:
        """Put another plan on the model, within a step; None takes off the one that is on."""
        if self._is_on:
            self._installed.__exit__(None, None, None)
            self._is_on = False
        if plan is not None:
            self.plan, self._installed = plan, self._install(plan)
            self._installed.__enter__()
            self._is_on = True

    @property
    def _moves(self) -> bool:
        return any(action.place != "device" for action in self.plan.actions.values())

    @property
    def _replays_reentrant(self) -> bool:
        # What `selective` blocks do is not for this variant, which is refused beside them.
        return self.settings.use_reentrant and self.plan.count("recompute") > 0

    @property
    def _cache_wanted(self) -> bool | None:
        # In mode `auto` under every plan alike, since a cache may change the last bits.
        if self.settings.use_cache is None and (self.plan.is_active or self._batches is not None):
            return False
        return self.settings.use_cache

    def _warnings(self) -> Iterator[str]:
        if not self.blocks and self.settings.mode != "none":
            groups = (
                ", ".join(f"{name or 'the model itself'} ({num})" for name, num in largest_groups(self.model)) or "none"
            )
            what = f"found no repeated blocks in {type(self.model).__name__}, so nothing can be recomputed."
            hint = f"Largest groups of children: {groups}."
            if self.settings.named:
                raise ValueError(f"checkpointing_mode={self.settings.mode!r}: {what} {hint}")
            yield f"{what} {hint} Training goes on without activation checkpointing."
        if self._switched:
            yield (
                f"checkpointing was turned on for {len(self._switched)} modules of the model itself "
                "(gradient_checkpointing_enable); while training, this plan takes its place."
            )

    @contextmanager
    def step(self) -> Iterator[None]:
        """One forward and backward under the plan.

        Raises:
            CheckpointError: A replay did not match its forward; names the block, likely causes and what to set.
            RuntimeError: The first backward lost gradients (`checkpointing_self_check`).
        """
        self._begun = True
        if [block.trainable for block in self.blocks] != self._trainable:
            self._carry_out()
        with ExitStack() as stack:
            stack.enter_context(switched_off(self._switched))
            stack.enter_context(without_input_grad_hooks(self._needless_hooks))
            stack.enter_context(input_grads(self._hooked))
            if self._replays_reentrant:
                stack.enter_context(reentrant_calls_checked(self.model))
                stack.enter_context(one_forward_checked(self.model, self.tally.turns))
            if self._cache_wanted is not None:
                stack.enter_context(self._use_cache.set_to(self._cache_wanted))
            if self._is_quantized and is_eager(self.model):
                stack.enter_context(without_kept_inputs(self.model))
                stack.enter_context(following_autocast(self.model))
            first = self._first_pass()
            stack.enter_context(first or nullcontext())
            stack.enter_context(compiled.compiler_set(self._budget, self._compiled))
            stack.callback(self._swap, None)
            self._swap(self.plan)
            if self._batches is not None:
                stack.enter_context(self._batches)
            try:
                yield
            except CheckpointError as error:
                raise CheckpointError(report.explain_mismatch(error, self.tally, self.blocks)) from error
        if first is not None:
            self._conclude(first)

    def _first_pass(self) -> FirstPass | None:
        if self._concluded or not self._planned or not is_eager(self.model):
            return None
        if isinstance(self._batches, BatchPlans) and not self._batches.planner.is_ready:
            return None  # a step that is measured is not looked at by two
        return FirstPass(self.model, self._planned, self.tally, self._conclude)

    def _conclude(self, first: FirstPass) -> None:
        """Say what the first forward and backward showed."""
        if self._concluded:
            return
        self._concluded = True
        first.__exit__(None, None, None)
        self.recomputable_share = first.recomputable_share
        missing = first.missing() if self.settings.self_check else []
        replayed = tuple(f"{name}." for name in self.tally.replays)
        lost = [name for name in missing if name.startswith(replayed)]
        if lost and self.settings.use_reentrant:
            raise RuntimeError(report.explain_lost(lost, self._planned))
        if missing:
            self._say(logging.WARNING, report.explain_unreached(missing, self._planned))
        installed = self._installed
        if unmatched := installed.unmatched():
            ran = [selection for selection in installed.stored.values() if selection.has_run]
            ops = sum((selection.ops.seen for selection in ran if selection.ops is not None), Counter[str]())
            raise ValueError(report.explain_unmatched(unmatched, ops, ran[0].modules.names))
        notes = report.explain_no_effect(self.tally, self._planned)
        notes += report.explain_selection(installed.stored, installed.rebuilding, self.tally)
        offload = self._offload_report()
        if offload is not None and offload["devices"] and not offload["bytes_out"]:
            notes.append(report.explain_nothing_moved(offload))
        if self.settings.segment != 1 and self.tally.replays and not self.tally.rebuilt_inputs:
            notes.append(
                f"checkpointing_segment={self.settings.segment!r} had no effect: no block got the very output of the one "
                "before it, as under FSDP2 and where blocks in between are kept."
            )
        for text in notes:
            self._say(logging.WARNING, text)

    @property
    def _planned(self) -> list[Block]:
        return [block for block in self.blocks if not self.plan[block.name].does_nothing]

    def report(self) -> dict[str, Any]:
        """What was done so far, as plain data; see `report.memory_report`."""
        by_compiler = compiled.as_data(self.plan, self.settings, self._compiled)
        # FLOPs of one step say nothing of others where plans differ.
        share = self.recomputable_share if self._batches is None else None
        measured = share, self._offload_report(), by_compiler
        found = report.memory_report(self.plan, self.blocks, self.tally, *measured)
        if self._batches is None:
            return {**found, "auto": None}
        return {**found, "auto": self._batches.as_data(), "plan": self.whole_plan.as_data()}

    @property
    def whole_plan(self) -> Plan:
        """What is done to micro-batches of all sizes, as `checkpointing_plan` takes it."""
        return self._batches.planner.plan() if isinstance(self._batches, BatchPlans) else self.plan

    def _offload_report(self) -> dict[str, Any] | None:
        return self._offloading.report() if self._offloading is not None and self._moves else None

    def release(self) -> None:
        """Training is over: give back the host memory that offload took; the report stays."""
        if self._offloading is not None:
            self._offloading.release()
        if self._batches is not None:
            self._batches.release()

    @property
    def is_active(self) -> bool:
        """Whether anything is done to any block, in this step or another."""
        return self.plan.is_active or self._batches is not None

    @property
    def is_used(self) -> bool:
        """Whether a step was begun."""
        return self._begun

    def warn_unused(self, owner: str) -> None:
        """Say once that no step came by here."""
        self._begun = True
        self._say(
            logging.WARNING,
            f"training_step of {owner} does not call super().training_step, so nothing is recomputed. Call it, or put "
            f"CheckpointingMixin in front: class Mine(CheckpointingMixin, {owner}).",
        )

    def _left_by_compiler(self, name: str) -> None:
        if not self._is_left:
            self._is_left = True
            self._say(logging.WARNING, compiled.explain_left(name))

    def _say(self, level: int, text: str) -> None:
        if level >= self._log_from:
            logger.log(level, text)
