"""A micro-batch that runs out of memory is run again under a leaner plan, with the losses and gradients it would have had.

In forward and backward all of the accumulation window is run again, see `window`. Once the gradients are whole nothing
can be: clipping and the optimizer change what they read. There single ops are run again, see `retrying`.

NOTE on several ranks. A forward is run again on the rank that failed, if no collective ran in it that a second run would
repeat. Else it cannot: the rank ends with an error that says so, and the launcher ends the others.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol

from torch import Tensor, nn

from ckpt_trainer.block_state import devices_of
from ckpt_trainer.collectives import why_not_alone
from ckpt_trainer.log import logger
from ckpt_trainer.out_of_memory import OutOfMemory, drop_frames, is_out_of_memory, release_memory
from ckpt_trainer.plan import Plan
from ckpt_trainer.retrying import Retrying
from ckpt_trainer.window import MicroBatch, Window

# An optimizer that runs more ops than this goes tensor by tensor: watched each time, it would take some percent longer.
_MOST_OPS = 1000
# In the first its state comes into being; a scaler of fp16 may skip it.
_FIRST_STEPS = 3

_HELPS = (
    "What helps: an optimizer with less state (optim='adamw_bnb_8bit', 'adafactor'), fewer trainable weights (LoRA), a "
    "state that is sharded over devices."
)


class Leaner(Protocol):
    """What is asked of the plan in force."""

    plan: Plan
    oom_retries: int

    def make_leaner(self, attempt: int, retries: int) -> None:
        """The shape that just failed is run under a leaner plan from now on."""

    def explain_out_of_memory(self, error: BaseException) -> str:
        """What was needed and what would fit."""


class Rescue:
    """The rescue of one trainer and its model, from the first step to the end of training.

    Args:
        trainer: A `Trainer`.
        model: As it is called in a step.
        state: Its plan.
    """

    def __init__(self, trainer: Any, model: nn.Module, state: Leaner) -> None:
        self.model, self.state = model, state
        self._trainer, self._accelerator = trainer, trainer.accelerator
        self._window = Window()
        self._devices = devices_of([*model.parameters(), *model.buffers()])
        self._never = why_not_alone(model, in_backward=False)
        self._place, self._is_tight, self._num_steps, self._num_ops = "forward", False, 0, 0
        self._replaced: list[tuple[dict[str, Any], str, Any]] = []
        self._replace(self._accelerator, "backward", self._in_backward)
        self._retries_ops = self._accelerator.num_processes == 1 and not self._never
        if self._retries_ops:
            self._replace(self._accelerator, "clip_grad_norm_", self._in_clipping)
            self._replace(trainer.optimizer, "step", self._in_optimizer)

    def end(self) -> None:
        """Training is over: nothing of this is left."""
        for attributes, name, theirs in reversed(self._replaced):
            attributes.pop(name, None)
            if theirs is not None:
                attributes[name] = theirs
        self._replaced = []
        self._window.close()

    def run(self, attempt: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """`attempt(*args, **kwargs)`, again and leaner as long as it runs out of memory.

        Raises:
            OutOfMemory: Retries are used up, or a second run would not give the same.
        """
        self._begin(args, kwargs)
        outcome, number = self._try(attempt, is_again=False), 0
        while isinstance(outcome, Exception):
            # Outside of any `except` block: the traceback's frames hold the graph of what failed.
            drop_frames(outcome)
            why = self._why_not()
            if why or number == self.state.oom_retries:
                raise OutOfMemory(self._explain(outcome, why)) from outcome
            number += 1
            outcome = self._redo(attempt, number)
        return outcome

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        number = 0
        while (error := self._log(args, kwargs)) is not None:
            number += 1
            if number > self.state.oom_retries:
                raise error
            released = release_memory(self._trainer.args.device)
            self._warn(
                f"ran out of memory in copies of buffers and inputs, before forward; {released}; they are made again."
            )

    def _log(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
        """Copies little, for which there may be no memory either: then the error that says so."""
        try:
            of = self.model, vars(self._trainer), self._accelerator, self._devices, self._window.note_sync
            self._window.add(MicroBatch(*of, args, kwargs), self.model, self._weights())
            return None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return error

    def _weights(self) -> list[Tensor]:
        # A loss may have weights of its own, which are none of the model.
        groups = getattr(self._trainer.optimizer, "param_groups", ())
        return [*self.model.parameters(), *(weight for group in groups for weight in group["params"])]

    def _try(self, attempt: Callable[..., Tensor], is_again: bool) -> Tensor | Exception:
        """The loss of the last micro-batch, or the error that means that memory ran out."""
        batches = self._window.batches
        try:
            if is_again:
                self._window.put_buffers_back()
            for batch in batches if is_again else batches[-1:]:
                self._place = "forward"
                with batch.found_again() if is_again else batch.collectives:
                    loss = attempt(*batch.args, **batch.kwargs)
            batches[-1].ran_collectives = batches[-1].collectives.ran()
            return loss
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return error

    def _why_not(self) -> str:
        """Why the window cannot be run again; empty if it can."""
        *earlier, last = self._window.batches
        why = self._never or why_not_alone(self.model, self._place == "backward")
        if not why and (last.collectives.ran() or any(batch.ran_collectives for batch in earlier)):
            why = "a collective has run, which the other ranks do not run twice"
        if not why and earlier and last.collectives.is_awaited:
            why = "DDP waits for its gradients, and would average those of the micro-batches before it instead"
        return why or self._window.why_lost()

    def _redo(self, attempt: Callable[..., Tensor], number: int) -> Tensor | Exception:
        """Run the window again under a leaner plan, and say so when it is over: a plan may be chosen in the forward."""
        of = len(self._window.batches)
        place = f"micro-batch {of} ran out of memory in {self._place}"
        self._window.drop_gradients(self._weights())
        released = release_memory(self._trainer.args.device)
        self.state.make_leaner(number, self.state.oom_retries)
        self._is_tight = True
        again = "it was" if of == 1 else f"all {of} since the last step were"
        try:
            return self._try(attempt, is_again=True)
        finally:
            counts = Counter(action.short for action in self.state.plan.actions.values())
            plan = ", ".join(f"{count} {action}" for action, count in counts.items())
            tried = f"{number} of {self.state.oom_retries}"
            self._warn(f"{place}; {released}; {again} run again under a leaner plan ({tried}): {plan}.")

    def _explain(self, error: Exception, why: str) -> str:
        tried = f"It was not run again, since {why}." if why else f"It was run again {self.state.oom_retries} times."
        text = f"{self._where()}: {self._place} ran out of memory. {tried} {self.state.explain_out_of_memory(error)}"
        return f"{text} It said: {error}"

    def _where(self) -> str:
        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes
        return f"step {self._trainer.state.global_step + 1}" + (f" on rank {rank} of {ranks}" if ranks > 1 else "")

    def _warn(self, text: str) -> None:
        args = self._trainer.args
        # Only a level that the user set hides it, on any rank.
        if args.log_level == "passive" or args.get_process_log_level() <= logging.WARNING:
            logger.warning(f"{self._where()}: {text}")

    # What is called between forward and the end of a step, replaced on the instance while training.

    def _replace(self, owner: Any, name: str, run: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        @wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            return run(original, args, kwargs)

        self._replaced.append((vars(owner), name, vars(owner).get(name)))
        vars(owner)[name] = replaced

    def _in_backward(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._place = "backward"
        out = original(*args, **kwargs)
        self._place = "forward"
        return out

    def _in_clipping(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return self._retrying("clipping", original, args, kwargs)

    def _in_optimizer(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._num_steps += 1
        out = self._retrying("optimizer", original, args, kwargs)
        self._window.close()
        return out

    def _retrying(self, place: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._num_steps > _FIRST_STEPS and self._num_ops > _MOST_OPS and not self._is_tight:
            return original(*args, **kwargs)

        def release(name: str, number: int) -> None:
            self._is_tight = True
            released = release_memory(self._trainer.args.device)
            self._warn(f"{place} ran out of memory in {name}; {released}; it is run again ({number} of {retries}).")

        retries = self.state.oom_retries
        try:
            with Retrying(retries, release) as watched:
                return original(*args, **kwargs)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            name = type(getattr(self._trainer.optimizer, "optimizer", self._trainer.optimizer)).__name__
            raise OutOfMemory(
                f"{self._where()}: {place} ({name}) ran out of memory. It cannot be begun anew, since weights or gradients "
                f"may have changed; go on from the last checkpoint. {_HELPS} It said: {error}"
            ) from error
        finally:
            self._num_ops = max(self._num_ops, watched.num_ops)
