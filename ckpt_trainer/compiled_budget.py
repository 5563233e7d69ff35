"""Mode `auto` in a compiled model: one plan for all of training, so that the largest micro-batch fits the budget.

Another plan is another compilation, so none is made for each size. The plan is made when the first forward begins, by what
the step costs without a compiler, and carried out by marks (`compiled.MARKS`). It is made anew where a micro-batch comes
that it does not fit, where one runs out of memory, and once when it is known what the optimizer holds.

NOTE on a share in place of marks. `activation_memory_budget` bounds what graphs store and not the peak: in one graph of a
model with 4 layers, 0 has a higher peak than no budget (1.22 times), since all is rebuilt at once, and 0.25 a higher one
than 0.1. Marks are by block, as costs are. Their measured peaks were 0.82 to 1.03 of what is expected without a compiler;
what is above 1 is room that is left.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_iter

from ckpt_trainer import memory
from ckpt_trainer.auto_lines import counts
from ckpt_trainer.blocks import Block
from ckpt_trainer.compiled import Compiled, heeds_marks
from ckpt_trainer.costs import between
from ckpt_trainer.memory import format_bytes, storages_of
from ckpt_trainer.plan import KEEP, RECOMPUTE, Action, Plan, Settings
from ckpt_trainer.roofline import Device, device_of
from ckpt_trainer.sizes import Size, covers, describe, growth, size_of
from ckpt_trainer.solver import solve
from ckpt_trainer.step_costs import PHASES, BlockCost, BudgetTooSmall, Option, Peak, StepCosts, peak_of

# Each mark once, and nothing that a compiler does not tell apart.
ACTIONS = (KEEP, Action("selective", save=("matmul",)), Action("selective", save=("attention",)), RECOMPUTE)

# Left of what the budget has beside weights and optimizer, since a graph is not laid out as single ops are.
_ROOM = 0.05
# A compiler keeps the state of the generator for each random op that it runs again; blocks have a few of those.
_RANDOM_OPS = 4
# Numbers that an optimizer holds for each one that is trained, until it is known: Adam's two.
_STATE_PER_WEIGHT = 2


class CostsOf(Protocol):
    """See `call_costs.costs_of_call`."""

    def __call__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        actions: Sequence[Action],
        device: Device,
        settings: Settings,
        gradients_are_there: bool,
    ) -> StepCosts: ...


def why_not(compiled: Compiled, settings: Settings, costs_of: CostsOf | None) -> str:
    """Why no plan can be chosen for a model whose ops are not seen one by one; empty where one can."""
    if not compiled.blocks or costs_of is None:
        return "ops of a compiled model are not seen one by one"
    if not heeds_marks(compiled):
        return f"{compiled.by} is not known to heed what is marked to be stored"
    if settings.compile_budget is not None:
        return "checkpointing_compile_budget says what a compiled model stores"
    return ""


@dataclass(frozen=True)
class _Seen:
    """A size of micro-batch.

    Args:
        size: Of its inputs.
        gradients_are_there: Whether it was not the first of its step.
        costs: Of its step, without what is resident.
    """

    size: Size
    gradients_are_there: bool
    costs: StepCosts

    def covers(self, size: Size, gradients_are_there: bool) -> bool:
        """Whether a micro-batch costs no more than this one."""
        return covers(self.size, size) and self.gradients_are_there >= gradients_are_there


class CompiledPlan:
    """The plan of a compiled model; watches its forwards while entered.

    Args:
        model: As it is called.
        blocks: Its blocks.
        free: Names of those whose action is to be chosen.
        leanest: The plan that is in force until one is chosen; the others have their action.
        settings: How plans are carried out.
        budget_bytes: What a step may take.
        costs_of: Tells what a call costs.
        put_on: Puts a plan on the model in place of the one that is on; None takes it off.
        say: Level and text of a line for the log.

    Attributes:
        plan: What the next micro-batch runs on.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        free: set[str],
        leanest: Plan,
        settings: Settings,
        budget_bytes: int,
        costs_of: CostsOf | None,
        put_on: Callable[[Plan | None], None],
        say: Callable[[int, str], None],
    ) -> None:
        assert costs_of is not None
        self.plan = self._leanest = leanest
        self._model, self._free, self._budget = model, free, budget_bytes
        self._settings, self._costs_of, self._put_on, self._say = settings, costs_of, put_on, say
        self._where = next((p.device for block in blocks for p in block.module.parameters()), torch.device("cpu"))
        self._trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._state_bytes = _STATE_PER_WEIGHT * _bytes(self._trainable)
        self._limit = budget_bytes
        self._on = leanest
        self._seen: list[_Seen] = []
        self._current: _Seen | None = None
        self._is_off = self._is_asking = self._is_chosen = False
        self._active, self._optimizer = ExitStack(), ExitStack()
        self._has_begun = False
        say(logging.INFO, _start_line(budget_bytes, len(free)))

    def __enter__(self) -> CompiledPlan:
        if not self._has_begun:
            self._has_begun = True
            self._optimizer.callback(register_optimizer_step_post_hook(self._after_optimizer).remove)
        self._active.callback(_watch_calls(self._model, self._begin))
        return self

    def __exit__(self, *error: object) -> None:
        self._active.close()

    def release(self) -> None:
        """Training is over."""
        self._optimizer.close()

    def _begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward begins: see that the plan fits it."""
        if self._is_asking or not torch.is_grad_enabled():
            return
        if not self._is_off:
            self._look_at(args, kwargs)
        if self.plan != self._on:
            self._on = self.plan
            self._put_on(self.plan)

    def _look_at(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        size, there = size_of(args, kwargs), any(p.grad is not None for p in self._trainable)
        known = next((seen for seen in self._seen if seen.covers(size, there)), None) or self._grown(size, there)
        if known is None:
            known = self._ask(size, there, args, kwargs)
            if known is not None and (len(self._seen) == 1 or not self._fits(self.plan, known)):
                self._choose()
        self._current = known

    def _grown(self, size: Size, there: bool) -> _Seen | None:
        """A larger micro-batch that surely fits the plan, by what is known of smaller ones."""
        for seen in self._seen:
            if covers(size, seen.size) and seen.gradients_are_there == there:
                grown = replace(seen, size=size, costs=between(None, seen.costs, growth(seen.size, size)))
                if self._fits(self.plan, grown):
                    self._seen.append(grown)
                    return grown
        return None

    def _ask(self, size: Size, there: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Seen | None:
        """What a call costs; None where that cannot be told."""
        self._is_asking = True
        self._put_on(None)
        try:
            of = _unwrapped(self._model), args, kwargs, ACTIONS[1:], device_of(self._where), self._settings, there
            costs = self._costs_of(*of)
        except Exception as error:  # an estimate that fails must not end training
            self._is_off, self.plan = True, self._leanest
            self._say(logging.INFO, _no_costs_line(error))
            return None
        finally:
            self._is_asking = False
            self._put_on(self._on)
        blocks = tuple(self._narrowed(block) for block in costs.blocks)
        self._seen.append(_Seen(size, there, replace(costs, blocks=blocks)))
        return self._seen[-1]

    def _narrowed(self, block: BlockCost) -> BlockCost:
        """A block with the options that it has: one, where its action is not to be chosen."""
        kept = _RANDOM_OPS * torch.get_rng_state().nbytes if self._where.type == "cpu" else 0
        options = tuple(_with_random_states(option, kept) for option in block.options)
        if block.name not in self._free:
            action = self._leanest[block.name]
            own = next((o for o in options if (o.action.kind, o.action.save) == (action.kind, action.save)), options[0])
            options = (replace(own, action=action),)
        return replace(block, options=options)

    def _choose(self) -> None:
        """Make the plan anew, so that all sizes that were seen fit."""
        tightest = max(self._seen, key=lambda seen: self._peak(self._leanest, seen).bytes)
        try:
            found = solve(self._with_resident(tightest), self._allowed()).plan.actions
        except BudgetTooSmall as error:
            self._adopt(self._leanest, logging.WARNING, _too_small_line(tightest.size, self._limit, error))
            return
        plan = Plan({name: found.get(name, action) for name, action in self._leanest.actions.items()})
        plan = plan if all(self._fits(plan, seen) for seen in self._seen) else self._leanest
        line = _plan_line(plan, tightest.size, self._peak(plan, tightest), self._limit)
        self._adopt(plan, logging.INFO, line)

    def _adopt(self, plan: Plan, level: int, line: str) -> None:
        if plan != self.plan or not self._is_chosen:
            self._say(level, line)
        self.plan, self._is_chosen = plan, True

    def _fits(self, plan: Plan, seen: _Seen) -> bool:
        return self._peak(plan, seen).bytes <= self._allowed()

    def _peak(self, plan: Plan, seen: _Seen) -> Peak:
        costs = self._with_resident(seen)
        return peak_of(costs, [_option(block, plan[block.name]) for block in costs.blocks])

    def _with_resident(self, seen: _Seen) -> StepCosts:
        return replace(seen.costs, resident_bytes=self._resident_bytes())

    def _allowed(self) -> int:
        return self._limit - round(_ROOM * max(0, self._limit - self._resident_bytes()))

    def _resident_bytes(self) -> int:
        """Weights, state of the optimizer, and what else this process has on the device."""
        weights = _bytes((*self._model.parameters(), *self._model.buffers()))
        is_bucketed = any(isinstance(module, DistributedDataParallel) for module in self._model.modules())
        gradients = _bytes(p.grad for p in self._trainable if p.grad is not None)
        there = (memory.current_bytes(self._where) or 0) - gradients
        return max(weights + self._state_bytes + (_bytes(self._trainable) if is_bucketed else 0), there)

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The optimizer made its first step: the plan is made anew with what it holds."""
        ours = {id(parameter) for parameter in self._trainable}
        if not self._seen or not any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            return
        self._optimizer.close()
        state = [leaf for leaf in tree_iter(list(optimizer.state.values())) if isinstance(leaf, Tensor)]
        self._state_bytes = _bytes(leaf for leaf in state if leaf.device.type == self._where.type)
        self._choose()

    def make_leaner(self, share_left: float) -> None:
        """The micro-batch that just ran out of memory gets a leaner plan, and so do all; with 0 the leanest."""
        if self._current is None:
            return
        least, now = (self._peak(plan, self._current).bytes for plan in (self._leanest, self.plan))
        self._limit = least + round(share_left * max(0, now - least))
        before = self.plan
        self._choose()
        if self.plan == before or not share_left:
            self.plan = self._leanest

    def explain_out_of_memory(self) -> str:
        """What was needed and what would fit."""
        if self._current is None:
            return "the forward did not reach the model."
        peak = self._peak(self.plan, self._current)
        return (
            f"a micro-batch of {describe(self._current.size)} does not fit, with {counts(self.plan)} in a compiled model, "
            f"which was expected to need {format_bytes(peak.bytes)} ({peak.where}) without the compiler; the budget is "
            f"{format_bytes(self._budget)}. What helps: {PHASES[peak.phase]}."
        )

    def as_data(self) -> dict[str, Any]:
        """For a report; see `auto_lines.as_data`. The one plan for each size that it was made for."""
        return {
            "budget_bytes": self._budget,
            "optimizer_state_bytes": self._state_bytes,
            "sizes": [self._entry(seen) for seen in self._seen],
        }

    def _entry(self, seen: _Seen) -> dict[str, Any]:
        peak = self._peak(self.plan, seen)
        return {
            "inputs": {name: list(dims) for name, dims in seen.size},
            "gradients_are_there": seen.gradients_are_there,
            "predicted_peak_bytes": peak.bytes,
            "peak_is_in": peak.where,
            "measured_peak_bytes": None,
            "actions": dict(Counter(action.short for action in self.plan.actions.values())),
        }


def _start_line(budget_bytes: int, number: int) -> str:
    return (
        f"auto: budget {format_bytes(budget_bytes)} for {number} blocks to choose for, which are compiled: one plan for "
        "all sizes, made when the first forward begins, by what its step takes without a compiler"
    )


def _plan_line(plan: Plan, size: Size, peak: Peak, limit: int) -> str:
    return (
        f"auto, {describe(size)}, compiled: {counts(plan)}; expected peak without the compiler "
        f"{format_bytes(peak.bytes)} ({peak.where}) of {format_bytes(limit)}"
    )


def _too_small_line(size: Size, limit: int, error: BudgetTooSmall) -> str:
    return (
        f"auto, {describe(size)}, compiled: no plan fits {format_bytes(limit)}; the leanest is used, which without the "
        f"compiler needs {format_bytes(error.least.bytes)} ({error.least.where}). What lowers it there: "
        f"{PHASES[error.least.phase]}"
    )


def _no_costs_line(error: Exception) -> str:
    said = (str(error).splitlines() or [""])[0][:200]
    return (
        "auto: all blocks of the compiled model are recomputed as in mode full, since what it takes cannot be told "
        f"before it is compiled ({type(error).__name__}: {said})"
    )


def _with_random_states(option: Option, kept: int) -> Option:
    if option.action.kind == "keep":
        return option
    return replace(
        option,
        stored_bytes=option.stored_bytes + kept,
        forward_bytes=option.forward_bytes + kept,
        backward_bytes=option.backward_bytes + kept,
    )


def _option(block: BlockCost, action: Action) -> Option:
    return next((option for option in block.options if option.action == action), block.options[0])


def _unwrapped(model: nn.Module) -> nn.Module:
    """A model as it is called by what wraps it for several processes, or for the compiler."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        inner: Any = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
        model = inner
    return model


def _watch_calls(model: nn.Module, begin: Callable[[tuple[Any, ...], Mapping[str, Any]], None]) -> Callable[[], None]:
    """Have `begin` called when a forward of the model begins, outside of what is compiled; returns what undoes it."""
    theirs = model._compiled_call_impl
    if theirs is None:
        hook = model.register_forward_pre_hook(lambda _, args, kwargs: begin(args, kwargs), with_kwargs=True)
        return hook.remove

    def call(*args: Any, **kwargs: Any) -> Any:
        begin(args, kwargs)
        return theirs(*args, **kwargs)

    def undo() -> None:
        model._compiled_call_impl = theirs

    model._compiled_call_impl = call
    return undo


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({s._cdata: s.nbytes() for tensor in tensors for s in storages_of(tensor)}.values())
