"""A plan for each micro-batch: chosen when its forward begins, measured where that is needed.

`BatchPlans` stands between a model in training and `auto.Planner`. It sees the size of each micro-batch, has its plan put
on the model, watches those steps that the planner wants measured, and lets blocks be probed when such a step is over. What
the optimizer takes is seen by the hooks that every optimizer of torch has.

NOTE on modes. Ops and, on a host, bytes are counted by dispatch modes. They go on when the forward begins. The last
callback of backward ends what is counted, but cannot take them off: autograd puts back the modes that there were when
backward began. They go off with the end of the step, the optimizer or the next forward, whichever is first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from ckpt_trainer import auto_lines
from ckpt_trainer.auto import Choice, Planner
from ckpt_trainer.block_classes import kinds_of
from ckpt_trainer.blocks import Block
from ckpt_trainer.costs import Probed, Sample, bookkeeping_seconds
from ckpt_trainer.hooks import Hook
from ckpt_trainer.install import Runners
from ckpt_trainer.measured import StepBytes, new_gradients, read_spans, without_held
from ckpt_trainer.memory import bytes_of, meter_of, num_allocation_retries, reserved_bytes
from ckpt_trainer.modes import beneath, modes_on
from ckpt_trainer.open_graphs import OpenGraph
from ckpt_trainer.optimizer_watch import OptimizerWatch
from ckpt_trainer.out_of_memory import is_out_of_memory
from ckpt_trainer.plan import KEEP, RECOMPUTE, TIERS, Action, Plan
from ckpt_trainer.probes import Call, CallNotes, probe
from ckpt_trainer.recompute import Tally
from ckpt_trainer.roofline import Device
from ckpt_trainer.sizes import Size, size_of
from ckpt_trainer.spans import WatchedStep

ACTIONS = (KEEP, *(Action("selective", save=(tier,)) for tier in TIERS), RECOMPUTE)
"""What is offered for each block, on the device."""

# Plans and measurements that are told in the log.
_LINES = 24


@dataclass
class _Watch:
    """A micro-batch that is measured.

    Args:
        size: Of its inputs.
        choice: What it runs on.
        step: Cuts it into spans.
        notes: Of calls that are to be probed.
        gradient_bytes: What gradients took when it began.
        state_bytes: What the optimizer's state took.
        has_ended: Its backward is over.
        is_spoilt: Another forward ran within its backward.
    """

    size: Size
    choice: Choice
    step: WatchedStep
    notes: CallNotes
    gradient_bytes: int
    state_bytes: int
    has_ended: bool = False
    is_spoilt: bool = False


class BatchPlans:
    """The plans of the micro-batches of one model; active while entered, which each step may do anew, until `release`.

    Args:
        model: As it is called.
        blocks: Its blocks.
        free: Names of those whose action is to be chosen; the others have that of the leanest plan.
        planner: Decides.
        runners: What carries out actions.
        device: Whose time counts.
        put_on: Puts a plan on the model in place of the one that is on; None takes it off.
        say: Level and text of a line for the log.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        free: set[str],
        planner: Planner,
        runners: Runners,
        device: Device,
        put_on: Callable[[Plan | None], None],
        say: Callable[[int, str], None],
    ) -> None:
        self.planner = planner
        self.current: Choice | None = None
        self._model, self._blocks, self._runners, self._device = model, blocks, runners, device
        self._by_name = {block.name: block for block in blocks}
        self._kinds = kinds_of([block for block in blocks if block.name in free])
        self._put_on, self._say = put_on, say
        self._where = next((p.device for block in blocks for p in block.module.parameters()), torch.device("cpu"))
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        parts = self._where, self._trainable, self.conclude, planner.learn_optimizer
        self._optimizers = OptimizerWatch(*parts)
        self._watch: _Watch | None = None
        self._learned: set[str] = set()
        self._said: set[str] = set()
        self._retries = num_allocation_retries(self._where)
        self._lines = 0
        self._was_called = self._said_other_way = self._said_several = False
        self._chosen: Choice | None = None
        self._graph = OpenGraph()
        self._has_begun_without = False
        self._modes: list[Any] = []
        self._active = ExitStack()
        for action in ACTIONS:
            for names in self._members().values():
                runners.share_lessons(names, self._by_name, action)

    def _members(self) -> dict[str, list[str]]:
        """The block that is probed -> those that it stands for, itself first."""
        found: dict[str, list[str]] = {}
        for name, other in self._kinds.items():
            found.setdefault(other, [other]).extend([name] if name != other else [])
        return found

    def __enter__(self) -> BatchPlans:
        self._optimizers.open()  # until the end of training: its steps are between those of the model
        self._was_called, self._num_calls = False, self._runners.num_calls
        self._modes = modes_on()
        self._active.callback(self._model.register_forward_pre_hook(Hook(self._begin), with_kwargs=True).remove)
        self._active.callback(self._model.register_forward_hook(Hook(self._end_forward)).remove)
        self._active.callback(self._drop)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if kind is None:
                self.conclude()
                if not self._was_called and (self.current is not None or self._runners.num_calls > self._num_calls):
                    self._note_other_way()
        finally:
            self._active.close()

    def _note_other_way(self) -> None:
        """A step came by without a call of the model, so that no plan was chosen: the leanest from now on."""
        if not self._said_other_way:
            self._say(
                logging.WARNING,
                "auto: a step ran without a call of the model itself (of a part of it, or under no_grad), so that no plan "
                "was chosen for it. From such steps on, blocks store their inputs only until the model is called.",
            )
        self._said_other_way, self.current, self._chosen = True, None, None
        self._put_on(self.planner.leanest)

    def release(self) -> None:
        """Training is over."""
        self._drop()
        self._optimizers.close()

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        self._was_called = True
        if torch._C._current_graph_task_id() != -1:
            self._begin_within()
            return
        self.conclude()
        if self._graph.is_there:
            self._begin_another()
        else:
            self._begin_one(args, kwargs)

    def _begin_one(self, args: Any, kwargs: Any) -> None:
        self._drop()  # a forward that no backward followed
        size, there = size_of(args, kwargs), self._gradients_are_there()
        if not self.planner.is_ready and not there:
            self._note_window()
        choice = self.planner.choose(size, there)
        self._chosen = choice
        if choice is not self.current:
            self._adopt(choice)
        if choice.measures and not self._runners.is_counting:  # FLOPs of one forward, by a mode that ends with it
            self._start_watching(size, choice, (args, kwargs))

    def _begin_within(self) -> None:
        """A forward within a backward, such as that of a checkpoint around the model: nothing is known of such steps.

        What is being measured of this one is dropped later, since autograd puts back the modes that it began with.
        """
        if self._watch is not None:
            self._watch.is_spoilt = True
        self.current = None
        self._put_on(self.planner.leanest)

    def _begin_another(self) -> None:
        """A second forward before the backward of the first, which is measured with it."""
        if not self._said_several:
            self._said_several = True
            self._say(
                logging.WARNING,
                "auto: several forwards before a backward; the later ones store inputs of blocks only. What all hold is "
                "known from steps that were measured: where their number varies, lower checkpointing_budget.",
            )
        self.current = None
        self._put_on(self.planner.leanest)

    def _note_window(self) -> None:
        # An optimizer that is none of torch's calls no hook: its step is over when there are no gradients again.
        if self._has_begun_without:
            self.planner.learn_optimizer(self._optimizers.state_bytes, 0)
        self._has_begun_without = bool(self.planner.samples())

    def _gradients_are_there(self) -> bool:
        return any(p.grad is not None for p in self._trainable)

    def _adopt(self, choice: Choice) -> None:
        self.current = choice
        self._put_on(choice.plan)
        if choice.peak is None or choice.is_told:
            return
        choice.is_told, line = True, auto_lines.plan_line(choice)
        if line not in self._said:  # made anew, it may be the same
            self._said.add(line)
            self._tell(logging.WARNING if choice.least else logging.INFO, line)

    def _tell(self, level: int, text: str) -> None:
        self._lines += 1
        if self._lines <= _LINES or level > logging.INFO:
            self._say(level, text)
        if self._lines == _LINES:
            self._say(logging.INFO, "auto: plans of further sizes are in memory_report()['auto']")

    def make_leaner(self, share_left: float) -> None:
        """The micro-batch that ran on the current plan ran out of memory; its size gets a leaner one, see `Planner`."""
        self._drop()
        if self._chosen is not None:
            self.planner.make_leaner(self._chosen, share_left)

    def explain_out_of_memory(self) -> str:
        """What was needed and what would fit."""
        if self._chosen is None:
            return "the forward did not reach the model."
        fits = self.planner.fitting_share(self._chosen)
        return auto_lines.explain_out_of_memory(self._chosen, self.planner.budget(), fits)

    def as_data(self) -> dict[str, Any]:
        """For a report; see `auto_lines.as_data`."""
        return auto_lines.as_data(self.planner, self.planner.budget())

    def _start_watching(self, size: Size, choice: Choice, inputs: Any) -> None:
        gradients, state = self._gradient_bytes(), self._optimizers.state_bytes
        tensors = [leaf for leaf in (*tree_iter(inputs), *self._optimizers.state()) if isinstance(leaf, Tensor)]
        meter = meter_of(self._where, self._model, *tensors)
        # Where gradients are there, a block stores what it stores in a first micro-batch of the same size.
        known = self.planner.probes_of(size)
        probed = set(self._kinds.values()) if choice.solution is None and not known else set[str]()
        notes = CallNotes({name: self._by_name[name].module for name in probed})
        step = WatchedStep(self._model, self._blocks, meter, lambda: self._call_at_end(step))
        self._watch = _Watch(size, choice, step, notes, gradients, state)
        notes.__enter__()
        with beneath(self._modes):
            step.__enter__()

    def _end_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        if self._watch is not None:
            self._watch.step.end_forward()
        self._graph.note(output)

    def _call_at_end(self, step: WatchedStep) -> None:
        """Within the first hook of backward: have the watch end with it."""
        torch.autograd.Variable._execution_engine.queue_callback(partial(self._end_backward, step))

    def _end_backward(self, step: WatchedStep) -> None:
        # Not where another forward has begun meanwhile, which is watched in its place.
        if self._watch is not None and self._watch.step is step and not self._watch.has_ended:
            self._watch.has_ended = True
            self._watch.notes.__exit__(None, None, None)
            step.end()

    def _drop(self) -> None:
        """End what is being measured without learning from it."""
        self._optimizers.drop()
        if self._watch is not None:
            self._end_backward(self._watch.step)
            self._watch.step.__exit__(None, None, None)
        self._watch = None

    def conclude(self) -> None:
        """The micro-batch is over: learn from it, if it was measured."""
        watch = self._watch
        if watch is None or not watch.has_ended:
            return
        self._watch = None
        watch.step.__exit__(None, None, None)
        step = self._read(watch) if not watch.is_spoilt else None
        if step is None:
            return
        self._note_fragments(step.peak)
        if watch.choice.solution is None:
            self._learn_leanest(watch, step)
        else:
            again = self.planner.learn_peak(watch.choice, step, watch.size == watch.choice.size)
            self._tell(logging.INFO, auto_lines.measured_line(watch.choice, watch.size, again))

    def _note_fragments(self, peak: int) -> None:
        """Where the allocator had to give memory back to go on, what it held beyond the peak was of no use to it."""
        retries = num_allocation_retries(self._where)
        if retries > self._retries:
            self._retries = retries
            self.planner.learn_fragments(reserved_bytes(self._where) - peak)

    def _read(self, watch: _Watch) -> StepBytes | None:
        spans = watch.step.spans
        ran = {span.name for span in spans if span.backward}
        if not any(block.name in ran for block in self._blocks):
            return None  # nothing of it reached a block: a forward whose loss does not, or no backward
        return read_spans(spans, new_gradients(spans), self._device)

    def _learn_leanest(self, watch: _Watch, step: StepBytes) -> None:
        step = without_held(step, {name: call.held_bytes for name, call in watch.notes.calls.items()})
        there, known = watch.choice.gradients_are_there, self.planner.samples()
        probes = self.planner.probes_like(watch.size, there, step) or self._probe_all(watch)
        counted = not there or any(not its for _, its in known)
        bare = step.start - (watch.gradient_bytes if counted else 0) - watch.state_bytes
        sample = Sample(self.planner.leanest, step, self._kinds, probes, bare, there)
        self.planner.learn(watch.size, sample)
        watch.choice.measured_bytes = step.peak
        if step.peak > self.planner.budget() and watch.choice.least is None:  # of which there is a line
            self._tell(logging.WARNING, auto_lines.above_line(watch.size, step.peak, self.planner.budget()))

    def _probe_all(self, watch: _Watch) -> Mapping[str, Mapping[Action, Probed]]:
        self._put_on(None)
        try:
            found = {name: self._probe(name, call) for name, call in watch.notes.calls.items()}
        finally:
            self._put_on(watch.choice.plan)
        return {name: probed for name, probed in found.items() if probed is not None}

    def _probe(self, name: str, call: Call) -> Mapping[Action, Probed] | None:
        if not call.needs_graph or call.has_cache:
            return None
        try:
            return self._probe_each(name, call)
        except Exception as error:  # the step itself went well
            why = "there is no memory for it" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
            self._say(logging.WARNING, f"auto: block {name} cannot be run alone; blocks like it are recomputed. {why}")
            return None

    def _probe_each(self, name: str, call: Call) -> Mapping[Action, Probed]:
        block, found = self._by_name[name], {}
        for action in ACTIONS:
            runner = self._runners.run_of(block, action)
            # What a probe does is not counted with what happens in training.
            run = _plainly if runner is None else replace(runner, tally=Tally()).run
            forward = block.module.forward
            if name not in self._learned and action.kind == "selective":
                probe(call, run, forward)  # what its replay shows is stored no more from then on
            one = probe(call, run, forward)
            seconds = self._device.seconds_with_host(one.work, bookkeeping_seconds(action, one.forward_ops))
            times = call.times
            levels = times * one.stored, (times - 1) * one.stored + one.forward, (times - 1) * one.stored + one.backward
            found[action] = Probed(levels, times * seconds, times * self._device.seconds_with_host(one.forward_work))
        self._learned.add(name)
        return found

    def _gradient_bytes(self) -> int:
        return bytes_of((p.grad for p in self._trainable if p.grad is not None), self._where)


def _plainly(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)
