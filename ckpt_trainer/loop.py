"""Activation checkpointing for a training loop of one's own: `checkpointing`, a context around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ckpt_trainer.call_costs import costs_of_call
from ckpt_trainer.engine import Checkpointing
from ckpt_trainer.policies import BlockPolicy
from ckpt_trainer.quantized import quantized_prepared
from ckpt_trainer.training_args import settings_of_flags


@contextmanager
def checkpointing(
    model: nn.Module, mode: str | None = None, *, policy: BlockPolicy | None = None, **flags: Any
) -> Iterator[Checkpointing]:
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
        mode: As `checkpointing_mode`; not given: `auto`, unless there is a `plan` or a flag of mode `full`.
        policy: A function of a `Block` that returns its `Action`, the text of one (`selective:attention`), or None for
            what the mode says.
        flags: The other flags without their prefix: `modules`, `every_n`, `save`, `segment`, `plan` (also a `Plan`),
            `offload_save`, `offload_to`, `offload_dir`, `host_budget`, `prefetch`, `budget`,
            `compile_budget`, `skip_frozen`,
            `use_reentrant`, `input_grads`, `kbit_upcast`, `self_check`; and of torch's checkpoint
            `preserve_rng_state`, `determinism_check`, `context_fn`, `debug`, `early_stop`.

    Yields:
        What is in force: its `plan`, and `report()` for what happened under it.

    Raises:
        ValueError: The mode or a flag has no such value, or the model has no repeated blocks.
    """
    settings = settings_of_flags({"mode": mode, **flags})
    state = Checkpointing(model, settings, policy=policy, costs_of=costs_of_call)
    try:
        with quantized_prepared(model, settings), state.step():
            yield state
    finally:
        state.release()
