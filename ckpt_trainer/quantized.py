"""A model with quantised weights made ready to train, and a line that says what that took."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ckpt_trainer import report
from ckpt_trainer.kbit import Preparation, kbit_prepared
from ckpt_trainer.log import logger
from ckpt_trainer.plan import Settings


@contextmanager
def quantized_prepared(
    model: nn.Module, settings: Settings, log_from: int = logging.INFO, is_sharded: bool = False
) -> Iterator[Preparation | None]:
    """While entered, a model with quantised weights is ready to train, and it is said what that took.

    Args and what it yields: see `kbit.kbit_prepared`, and `Checkpointing`.
    """
    with kbit_prepared(model, settings.kbit_upcast, is_sharded) as done:
        if done is not None and log_from <= logging.INFO:
            logger.info(report.kbit_line(done))
        if done is None and settings.kbit_upcast != "none" and log_from <= logging.WARNING:
            logger.warning(
                f"checkpointing_kbit_upcast={settings.kbit_upcast!r} has no effect, since no weight of "
                f"{type(model).__name__} is quantised."
            )
        yield done
