"""A model and its batch, of which the costs of a step can be asked: at the sizes of the batch, and at others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from ckpt_trainer.comparison import Row
from ckpt_trainer.fake_costs import Conditions, fake_costs
from ckpt_trainer.largest import Axis, PeakUnder, largest_sizes
from ckpt_trainer.memory import storages_of
from ckpt_trainer.model_configs import batch_of, position_limit
from ckpt_trainer.plan import Action, Plan
from ckpt_trainer.predicted_rows import AUTO, options_under
from ckpt_trainer.roofline import Device
from ckpt_trainer.solver import least_peak
from ckpt_trainer.step_costs import StepCosts, peak_of

_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")

# Ids of the largest batch have to fit on the host.
_MOST_TOKENS = 2**26
_OF_TOKENS = {"input_ids", "attention_mask", "decoder_input_ids", "labels"}
# The longest sequence is a multiple of this.
TOKEN_STEP = 64


@dataclass(frozen=True)
class Study:
    """A model, its batch and how it is run.

    Args:
        model: In any mode; runs in training mode and is put back.
        batch: What it is called with.
        actions: What is offered beside `keep`.
        device: Whose seconds.
        conditions: How the step is run.
    """

    model: nn.Module
    batch: Mapping[str, Any]
    actions: Sequence[Action]
    device: Device
    conditions: Conditions

    @property
    def inner_model(self) -> Any:
        """Without adapters around it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore[operator]

    @property
    def held_bytes(self) -> int:
        """Of weights, buffers and the batch."""
        return _held_bytes(self.model, self.batch)

    @property
    def sizes_can_vary(self) -> bool:
        """Whether the batch is one of token ids, of which there could be more."""
        ids = self.batch.get("input_ids")
        return isinstance(ids, Tensor) and ids.dim() == 2 and set(self.batch) <= _OF_TOKENS

    @property
    def tokens(self) -> int | None:
        """In a row."""
        return int(self.batch["input_ids"].shape[1]) if self.sizes_can_vary else None

    @property
    def position_limit(self) -> int | None:
        """The longest row that the model's config allows for."""
        config = getattr(self.inner_model, "config", None)
        return position_limit(config) if hasattr(config, "get_text_config") else None

    def costs(self) -> StepCosts:
        """Of the batch.

        Raises:
            ValueError: Its rows are longer than the model can take.
        """
        return self._costs(self.batch, self.device, self.conditions)

    def costs_of_size(self, known: StepCosts, rows: int, tokens: int) -> StepCosts:
        """Bytes of another batch; the optimizer does not care and is not run again.

        Args:
            known: Those of the own batch.
        """
        batch = batch_of(self.model, rows, tokens)
        other = self._costs(batch, None, replace(self.conditions, optimizer=None))
        return replace(
            other,
            resident_bytes=known.resident_bytes - self.held_bytes + _held_bytes(self.model, batch),
            optimizer_bytes=known.optimizer_bytes,
            link_bytes_per_second=known.link_bytes_per_second,
        )

    def _costs(self, batch: Mapping[str, Any], device: Device | None, conditions: Conditions) -> StepCosts:
        training, was_quiet = self.model.training, _LOGGER.disabled
        self.model.train()
        _LOGGER.disabled = True  # it writes tracebacks of what is raised, and said below
        try:
            return fake_costs(self.model, batch, self.actions, device, conditions)
        except (RuntimeError, IndexError) as error:
            tokens, limit = self.tokens, self.position_limit
            if tokens is None or limit is None or tokens <= limit:
                raise
            raise ValueError(
                f"rows of {tokens} tokens do not run: {type(self.inner_model).__name__} has {limit} positions "
                f"({type(error).__name__}: {error}). Give a shorter seq."
            ) from error
        finally:
            self.model.train(training)
            _LOGGER.disabled = was_quiet


def with_largest(
    rows: Sequence[Row], study: Study, costs: StepCosts, plans: Mapping[str, Plan], budget_bytes: int
) -> list[Row]:
    """The rows with the largest batch and the longest sequence that fit, where the sizes can vary."""
    if not study.sizes_can_vary:
        return list(rows)
    number, tokens = study.batch["input_ids"].shape
    peaks = [_peak_under(plans[row.label] if row.label != AUTO else None) for row in rows]
    most_tokens = max(study.position_limit or _MOST_TOKENS, tokens)
    axes = (
        Axis(partial(_of_rows, study, costs, tokens), number, 1, max(number, _MOST_TOKENS // tokens), degree=1),
        Axis(partial(study.costs_of_size, costs, number), tokens, TOKEN_STEP, most_tokens, degree=2),
    )
    batches, sequences = (largest_sizes(axis, costs, peaks, budget_bytes) for axis in axes)
    found = zip(rows, batches, sequences, strict=True)
    return [replace(row, largest_batch=batch, longest_sequence=sequence) for row, batch, sequence in found]


def _of_rows(study: Study, costs: StepCosts, tokens: int, rows: int) -> StepCosts:
    return study.costs_of_size(costs, rows, tokens)


def _peak_under(plan: Plan | None) -> PeakUnder:
    """The peak of a plan; of None the lowest there is, which is what `auto` comes to."""
    if plan is None:
        return lambda costs: least_peak(costs).bytes
    return lambda costs: peak_of(costs, options_under(plan, costs)).bytes


def _held_bytes(model: nn.Module, batch: Mapping[str, Any]) -> int:
    tensors = [*model.parameters(), *model.buffers(), *(v for v in tree_iter(dict(batch)) if isinstance(v, Tensor))]
    return sum({s._cdata: s.nbytes() for tensor in tensors for s in storages_of(tensor)}.values())
