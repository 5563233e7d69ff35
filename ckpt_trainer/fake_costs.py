"""What a step costs, found without a device and without weights: the `fake` source of `StepCosts`.

A few blocks of each class run one step under each action, carried out by what carries it out in training, on tensors that
have shapes and no data. Bytes are read off as they come and go; seconds are those of a device known by numbers.

NOTE on what is assumed. A tensor that a rule can make again comes out the same bit for bit: a real step proves it, and
stores the tensor where it does not (`rebuild`). Ops run by the kernels that the host has for them; attention with dropout
stores more there than on other devices. What an allocator adds (fragmentation, rounding) and workspaces inside kernels are
not seen. With mixed plans a block may also depend on what is done to its neighbours, by less than a layer's input.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from ckpt_trainer.block_classes import passed_over, stand_ins
from ckpt_trainer.blocks import Block, find_blocks
from ckpt_trainer.costs import bytes_in_flight
from ckpt_trainer.engine import Checkpointing
from ckpt_trainer.measured import BlockBytes, StepBytes, new_gradients, read_spans
from ckpt_trainer.memory import LiveBytes, storages_of
from ckpt_trainer.plan import KEEP, RECOMPUTE, SELECTIVE, TIERS, Action, Plan, Settings
from ckpt_trainer.roofline import Device
from ckpt_trainer.spans import measure_step
from ckpt_trainer.step_costs import BlockCost, Option, StepCosts
from ckpt_trainer.without_weights import without_weights

Batch = Mapping[str, Any]

ACTIONS = (KEEP, *(Action("selective", save=(tier,)) for tier in TIERS), RECOMPUTE)
"""All that can be done on the device, from what stores most to what stores least."""


def loss_of_output(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that models of transformers give where there are labels."""
    loss: Tensor = model(**batch)["loss"]
    return loss


@dataclass(frozen=True)
class Conditions:
    """How a step is run, apart from its plan.

    Args:
        loss_of: Model and batch -> loss.
        optimizer: Makes one of parameters; None: there is none.
        autocast: Dtype of mixed precision; None: there is none.
        gradients_are_there: A later micro-batch of an accumulation, in which every gradient exists from the start.
        settings: How actions are carried out; not given: with the key/value cache off.
        host: Offer each action also with what it stores on the host.
        host_budget_bytes: Host memory for that.
        every_block: Run all blocks instead of a few of each class.
    """

    loss_of: Callable[[nn.Module, Batch], Tensor] = loss_of_output
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None
    autocast: torch.dtype | None = None
    gradients_are_there: bool = False
    settings: Settings = field(default_factory=Settings)
    host: bool = False
    host_budget_bytes: int = 0
    every_block: bool = False


def fake_costs(
    model: nn.Module,
    batch: Batch,
    actions: Sequence[Action] = ACTIONS,
    device: Device | None = None,
    conditions: Conditions | None = None,
) -> StepCosts:
    """Measure a step without data; the model is afterwards as it was.

    Args:
        model: On any device, on `meta` too: its weights are neither read nor needed. Its dtype, what of it trains and
            its mode count.
        batch: Real tensors of the shapes in question. Masks and positions count by value; ids and labels may be ones.
        actions: What is offered beside `keep`.
        device: Whose time; None: all seconds are 0.
        conditions: How the step is run.

    Raises:
        NeedsValues: The model computes shapes from values of its own (some losses and experts do), or its weights are
            more than tensors (quantised, sharded). It has to be measured live.
    """
    conditions = conditions or Conditions()
    with without_weights(model):
        blocks = find_blocks(model)
        instead = {block.name: block.name for block in blocks} if conditions.every_block else stand_ins(blocks)
        step = _Runner(model, batch, blocks, instead, conditions, device)
        with passed_over(blocks, instead) as places:
            steps = {action: step.run(action) for action in dict.fromkeys((KEEP, *actions))}
        blocks = sorted(blocks, key=lambda block: places.get(block.name, len(blocks)))
        tensors = (*model.parameters(), *model.buffers(), *tree_iter(dict(batch)))
        temporaries, state = _optimizer_bytes(model, step.with_gradient(), conditions)
        resident = _bytes(tensors) + state
    costs = _costs(steps, blocks, instead, device, conditions)
    return replace(costs, resident_bytes=resident, optimizer_bytes=temporaries)


class _Runner:
    """Runs steps of a model in which all blocks have one action."""

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        blocks: Sequence[Block],
        instead: Mapping[str, str],
        conditions: Conditions,
        device: Device | None,
    ) -> None:
        self._model = model
        self._batch = batch
        self._blocks = blocks
        self._instead = instead
        self._conditions = conditions
        self._device = device
        self._graded: set[str] = set()

    def run(self, action: Action) -> StepBytes:
        """What a step under an action does."""
        conditions, settings = self._conditions, self._conditions.settings
        ran = [block for block in self._blocks if self._instead[block.name] == block.name]
        plan = Plan({**{block.name: KEEP for block in self._blocks}, **{block.name: action for block in ran}})
        # Off under `keep`, too, as it is in each step of which a block is not kept.
        settings = replace(settings, plan=plan, use_cache=settings.use_cache or False)
        state = Checkpointing(self._model, settings, logging.CRITICAL + 1, watches=False)
        self._model.zero_grad()
        first = spans = self._measured(state, ran)
        # Again where a first replay shows which results none asks for, and the blocks store them no more.
        if conditions.gradients_are_there or (action.kind == "selective" and action.save != SELECTIVE.save):
            if not conditions.gradients_are_there:
                self._model.zero_grad()
            spans = self._measured(state, ran)
        self._graded.update(name for name, p in self._model.named_parameters() if p.grad is not None)
        self._model.zero_grad()
        return read_spans(spans, new_gradients(first), self._device)

    def _measured(self, state: Checkpointing, ran: Sequence[Block]) -> Any:
        dtype = self._conditions.autocast

        def loss() -> Tensor:
            with torch.autocast("cpu", dtype) if dtype is not None else nullcontext():
                return self._conditions.loss_of(self._model, self._batch)

        with state.step():
            return measure_step(self._model, ran, loss)

    def with_gradient(self) -> list[nn.Parameter]:
        """Parameters that got a gradient; in blocks that did not run, those that did in the block that ran instead."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        found = {id(p): p for p in self._model.parameters() if names[id(p)] in self._graded}
        modules = {block.name: block.module for block in self._blocks}
        for name, other in self._instead.items():
            for own, theirs in zip(modules[name].parameters(), modules[other].parameters(), strict=True):
                if id(theirs) in found:
                    found[id(own)] = own
        return list(found.values())


def _optimizer_bytes(model: nn.Module, parameters: Sequence[nn.Parameter], conditions: Conditions) -> tuple[int, int]:
    """Temporaries of a step of the optimizer, once its state is there, and that state."""
    if conditions.optimizer is None or not parameters:
        return 0, 0
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = conditions.optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
    optimizer.step()
    with LiveBytes() as live:
        optimizer.step()
    return live.peak, _bytes(tree_iter(list(optimizer.state.values())))


def _bytes(values: Iterable[Any]) -> int:
    tensors = [value for value in values if isinstance(value, Tensor)]
    return sum({s._cdata: s.nbytes() for tensor in tensors for s in storages_of(tensor)}.values())


def _costs(
    steps: Mapping[Action, StepBytes],
    blocks: Sequence[Block],
    instead: Mapping[str, str],
    device: Device | None,
    conditions: Conditions,
) -> StepCosts:
    keep = steps[KEEP]
    shared: dict[tuple[Option, ...], tuple[Option, ...]] = {}
    made = []
    for block in blocks:
        own = keep.blocks.get(instead[block.name])
        if own is None:  # it did not run
            made.append(BlockCost(block.name, (Option(KEEP, 0, 0, 0),)))
            continue
        found = {action: step.blocks[instead[block.name]] for action, step in steps.items()}
        options = tuple(o for action, under in found.items() for o in _options(action, under, own, conditions.host))
        options = shared.setdefault(options, options)
        made.append(BlockCost(block.name, options, own.gradients, own.forward_seconds, own.backward_seconds))
    links = [option.link_bytes for options in shared for option in options]
    return StepCosts(
        tuple(made),
        before_bytes=keep.before,
        head_forward_bytes=keep.head,
        head_backward_bytes=keep.head_backward,
        head_gradient_bytes=keep.head_gradients,
        before_backward_bytes=keep.before_backward,
        before_gradient_bytes=keep.before_gradients,
        staging_bytes=bytes_in_flight(links, conditions.settings.prefetch),
        gradients_are_there=conditions.gradients_are_there,
        host_budget_bytes=conditions.host_budget_bytes,
        link_bytes_per_second=device.link_bytes_per_second if device is not None and conditions.host else 0.0,
        other_seconds=keep.other_seconds,
    )


def _options(action: Action, block: BlockBytes, keep: BlockBytes, host: bool) -> list[Option]:
    seconds = block.forward_seconds + block.backward_seconds - keep.forward_seconds - keep.backward_seconds
    option = Option(action, block.stored, block.forward, block.backward, max(0.0, seconds))
    if not host or block.stored <= 0 or action.place != "device":
        return [option]
    moved = replace(action, place="host")
    return [option, replace(option, action=moved, stored_bytes=0, host_bytes=block.stored, link_bytes=block.stored)]
