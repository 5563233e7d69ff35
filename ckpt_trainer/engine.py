"""Activation checkpointing of one model while it trains: the plan, what carries it out, and each step under it.

`Checkpointing` is what the trainer holds; `checkpointing` is the same for people with a loop of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointError

from ckpt_trainer import report
from ckpt_trainer.block_state import BlockState
from ckpt_trainer.blocks import Block, find_blocks, largest_groups
from ckpt_trainer.flops import FlopCounter
from ckpt_trainer.gradient_check import GradientCheck
from ckpt_trainer.install import Installed
from ckpt_trainer.log import logger
from ckpt_trainer.plan import Plan, Settings
from ckpt_trainer.policies import make_plan
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
from ckpt_trainer.training_args import CheckpointingArguments


class Checkpointing:
    """One model and its plan. Between steps nothing of it is on the model.

    Args:
        model: The model as it is called in a step: bare, or wrapped by PEFT, DDP, FSDP or a compiler.
        settings: What was asked for.
        quiet: Log nothing (all ranks but the first).

    Attributes:
        blocks: The blocks of the model, in forward order.
        plan: Their actions.
        tally: What happened to their calls so far.
        forward_flops: FLOPs of the first forward, recompute not included; None until it is measured.
        num_steps: Forward and backward passes done.

    Raises:
        ValueError: The settings ask for something that this model cannot do.
    """

    def __init__(self, model: nn.Module, settings: Settings, quiet: bool = False) -> None:
        self.model = model
        self.settings = settings
        self.blocks = find_blocks(model)
        self.tally = Tally()
        self.forward_flops: int | None = None
        self.num_steps = 0
        self._use_cache = UseCache(model)
        self._quiet = quiet
        self._switched = modules_switched_on(model)
        if settings.use_reentrant:
            refuse_reentrant(model)
        self._find_input_hooks()
        self._carry_out()
        for warning in self._warnings():
            self._say(logging.WARNING, warning)

    def _find_input_hooks(self) -> None:
        needless = self.settings.skip_frozen and not self.settings.use_reentrant
        self._needless_hooks = modules_with_input_grad_hook(self.model) if needless else []
        always = self.settings.input_grads == "always"
        self._hooked = input_modules(self.model) if always else []

    def _carry_out(self) -> None:
        self._trainable = [block.trainable for block in self.blocks]
        self.plan: Plan = make_plan(self.blocks, self.settings)
        self._installed = Installed(self.blocks, self.plan, self.settings, self.tally)
        if isinstance(self.model, nn.DataParallel) and self.plan.count("recompute"):
            raise ValueError(
                "nn.DataParallel copies a model to each device for each step, which activation checkpointing of "
                "single blocks does not survive. Start with `torchrun --nproc_per_node=N` or `accelerate launch`, or "
                "use one device (CUDA_VISIBLE_DEVICES=0)."
            )
        self._say(logging.INFO, report.first_line(self.plan, self.blocks, self.settings, bool(self._needless_hooks)))

    @property
    def _cache_wanted(self) -> bool | None:
        if self.settings.use_cache is None and self.plan.count("recompute"):
            return False
        return self.settings.use_cache

    def _warnings(self) -> Iterator[str]:
        if not self.blocks and self.settings.mode != "none":
            groups = ", ".join(f"{name} ({num})" for name, num in largest_groups(self.model)) or "none"
            what = f"found no repeated blocks in {type(self.model).__name__}, so nothing can be recomputed."
            hint = f"Largest groups of children: {groups}."
            if self.settings.named:
                raise ValueError(f"checkpointing_mode={self.settings.mode!r}: {what} {hint}")
            yield f"{what} {hint} Training goes on without activation checkpointing."
        if self.settings.preserve_rng_state is False:
            random = [block.name for block in self._recomputed if BlockState(block.module).draws_random_numbers()]
            if random:
                yield (
                    f"preserve_rng_state=False: {len(random)} blocks draw random numbers ({random[0]}, ...), others the "
                    "second time. Their gradients will be wrong; remove it."
                )
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
        if [block.trainable for block in self.blocks] != self._trainable:
            self._carry_out()
        first = self.num_steps == 0
        with ExitStack() as stack:
            stack.enter_context(switched_off(self._switched))
            stack.enter_context(without_input_grad_hooks(self._needless_hooks))
            stack.enter_context(input_grads(self._hooked))
            if self.settings.use_reentrant:
                stack.enter_context(reentrant_calls_checked(self.model))
            if self._cache_wanted is not None:
                stack.enter_context(self._use_cache.set_to(self._cache_wanted))
            if first and len(self.plan):
                stack.enter_context(self._first_step())
            stack.enter_context(self._installed)
            try:
                yield
            except CheckpointError as error:
                raise CheckpointError(report.explain_mismatch(error, self.tally, self.blocks)) from error
        self.num_steps += 1

    @contextmanager
    def _first_step(self) -> Iterator[None]:
        """Measure the forward and check the gradients, once; not where hooks and modes would be compiled too."""
        eager = _is_eager(self.model)
        with ExitStack() as stack:
            if eager:
                stack.enter_context(self._counted_forward())
            check = GradientCheck(self._recomputed) if eager and self.settings.self_check else None
            if check is not None:
                stack.enter_context(check)
            yield
        missing = check.missing() if check is not None else []
        replayed = tuple(f"{name}." for name in self.tally.replays)
        lost = [name for name in missing if name.startswith(replayed)]
        if lost and self.settings.use_reentrant:
            raise RuntimeError(report.explain_lost(lost, self._recomputed))
        if missing:
            self._say(logging.WARNING, report.explain_unreached(missing))
        if eager and (text := report.explain_no_effect(self.tally, self._recomputed)):
            self._say(logging.WARNING, text)

    @property
    def _recomputed(self) -> list[Block]:
        return [block for block in self.blocks if self.plan[block.name].kind == "recompute"]

    @contextmanager
    def _counted_forward(self) -> Iterator[None]:
        running = ExitStack()

        def start(module: nn.Module, args: Any) -> None:
            if self.tally.counter is None and self.forward_flops is None:
                self.tally.counter = running.enter_context(FlopCounter())

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            if self.tally.counter is not None:
                self.forward_flops = self.tally.counter.total
                self.tally.counter = None
                running.close()

        hooks = [
            self.model.register_forward_pre_hook(start),
            # Also after a forward that raised; after a KeyboardInterrupt, for which torch calls no hook, see below.
            self.model.register_forward_hook(stop, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.tally.counter = None
            running.close()

    def report(self) -> dict[str, Any]:
        """What was done so far, as plain data; see `report.memory_report`."""
        return report.memory_report(self.plan, self.blocks, self.tally, self.forward_flops, self.num_steps)

    def _say(self, level: int, text: str) -> None:
        if not self._quiet:
            logger.log(level, text)


def _is_eager(model: nn.Module) -> bool:
    """Whether ops run one by one: not where they are compiled, by the user or within flex attention."""
    return not any(
        hasattr(module, "_orig_mod")
        or module._compiled_call_impl is not None
        or "flex" in str(getattr(getattr(module, "config", None), "_attn_implementation", ""))
        for module in model.modules()
    )


@contextmanager
def checkpointing(model: nn.Module, mode: str = "full", **flags: Any) -> Iterator[Checkpointing]:
    """Activation checkpointing for a training loop of your own.

    ```python
    with checkpointing(model, mode="full"):
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    ```

    Blocks are recomputed where gradients are on; evaluation and `generate` in between run as they always do, under
    `torch.no_grad`.

    Args:
        model: Any module with repeated blocks, wrapped (PEFT, DDP, FSDP) or not.
        mode: As `checkpointing_mode`.
        flags: The other flags without their prefix: `modules`, `every_n`, `skip_frozen`, `use_reentrant`, `input_grads`,
            `self_check`.

    Yields:
        What is in force: its `plan`, and `report()` for what happened under it.

    Raises:
        ValueError: The mode or a flag has no such value, or the model has no repeated blocks.
    """
    arguments = CheckpointingArguments(
        **{f"checkpointing_{key}": value for key, value in {"mode": mode, **flags}.items()}
    )
    state = Checkpointing(model, arguments.settings())
    with state.step():
        yield state
