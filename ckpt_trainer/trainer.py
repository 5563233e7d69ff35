"""The trainers: Hugging Face's own, with each training step under a plan.

`CheckpointingMixin` holds all overrides. Each is a context or one call around super(), so that it works on any subclass
of `Trainer`, TRL's included.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ckpt_trainer import memory
from ckpt_trainer.blocks import find_blocks
from ckpt_trainer.call_costs import costs_of_call
from ckpt_trainer.distributed import fsdp_mode, may_replay_reentrant, take_over, unused_parameters_decided
from ckpt_trainer.engine import Checkpointing
from ckpt_trainer.kbit import Preparation
from ckpt_trainer.log import logger
from ckpt_trainer.policies import BlockPolicy, check_policy, make_plan
from ckpt_trainer.prepare import UseCache
from ckpt_trainer.quantized import quantized_prepared
from ckpt_trainer.rescue import Rescue
from ckpt_trainer.training_args import settings_of

# What makes transformers turn on its own checkpointing; the newer name and the older one.
_SWITCHES = ("activation_checkpointing", "gradient_checkpointing")

_OFFLOAD_METRICS = ("bytes_out", "bytes_in", "prefetch_hits", "prefetch_misses", "waited_seconds")

# In a folder of a checkpoint: the plans that mode `auto` made, for `checkpointing_plan`.
PLAN_FILE = "checkpointing_plan.json"

_NOTHING = logging.CRITICAL + 1

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class CheckpointingMixin(_Base):
    """Activation checkpointing for any trainer: `class Mine(CheckpointingMixin, SFTTrainer): pass`.

    What is done follows the training arguments: the `checkpointing_*` flags of `CheckpointTrainingArguments`, and the
    switches of transformers in any. On the model there is nothing of it but during a training step.

    Args:
        checkpointing_policy: A function of a `Block` that returns its `Action`, the text of one (`selective:attention`),
            or None for what the arguments say. Asked once for each block whenever a plan is made.
        args: As of the trainer that this is mixed with.
        kwargs: Likewise.

    Raises:
        ValueError: There are a policy and `checkpointing_plan`, or the arguments name blocks that are not there.
        TypeError: The policy is not callable.
    """

    _checkpointing_policy: BlockPolicy | None = None
    _checkpointing: Checkpointing | None = None
    _checkpointing_use_cache: UseCache | None = None
    _checkpointing_switches: _Switches | None = None
    _checkpointing_prepared: Preparation | None = None
    _checkpointing_rescue: Rescue | None = None
    _checkpointing_logged: Mapping[str, float] = MappingProxyType({})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Trainer in cls.__mro__ and cls.__mro__.index(Trainer) < cls.__mro__.index(CheckpointingMixin):
            raise TypeError(
                f"{cls.__name__} names CheckpointingMixin after a trainer; put it first, or it does nothing."
            )
        owner = next(base for base in cls.__mro__ if "__init__" in vars(base) and base is not CheckpointingMixin)
        signature = inspect.signature(vars(owner)["__init__"])
        parameters = list(signature.parameters.values())[1:]
        if cls.__mro__.index(CheckpointingMixin) < cls.__mro__.index(owner):
            own = inspect.signature(CheckpointingMixin.__init__).parameters["checkpointing_policy"]
            last = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
            parameters.insert(last, own)
        cls.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]

    def __init__(self, *args: Any, checkpointing_policy: BlockPolicy | None = None, **kwargs: Any) -> None:
        self._checkpointing_policy = checkpointing_policy
        self._checkpointing_remember(kwargs.get("model", args[0] if args else None))
        super().__init__(*args, **kwargs)
        settings = settings_of(self.args)
        check_policy(checkpointing_policy, settings)
        if (settings.modules or settings.plan is not None) and isinstance(self.model, nn.Module):
            make_plan(find_blocks(self.model), settings)  # names in it that match nothing are told now
        if self._checkpointing_use_cache is not None:
            self._checkpointing_use_cache.restore()
        # First in the list, so that other callbacks see the arguments as the user gave them.
        self.callback_handler.callbacks.insert(0, _Events(self))

    def create_accelerator_and_postprocess(self) -> None:
        # By now the model exists also where a trainer loads it by name.
        self._checkpointing_remember(getattr(self, "model", None))
        asked = settings_of(self.args)  # Of FSDP's switch and another, one is refused here.
        # transformers refuses them, too, even where its own is the default of a trainer's arguments.
        with _Switches(self.args):
            super().create_accelerator_and_postprocess()
        was_on = take_over(getattr(self.accelerator.state, "fsdp_plugin", None))
        # Where there is no accelerator, accelerate runs DDP in place of FSDP.
        was_on = was_on or fsdp_mode(vars(self.args), None) is not None
        if was_on and self._checkpointing_log_from() <= logging.INFO:
            logger.info(
                f"FSDP's activation_checkpointing is taken as checkpointing_mode={asked.mode!r}: blocks are recomputed "
                "here, not by accelerate, whose replays draw other dropout masks."
            )

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model: nn.Module = super().call_model_init(trial)
        self._checkpointing_remember(model)
        return model

    def _checkpointing_remember(self, model: Any) -> None:
        # Trainer.__init__ overwrites it for good.
        if self._checkpointing_use_cache is None and isinstance(model, nn.Module):
            self._checkpointing_use_cache = UseCache(model)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        with unused_parameters_decided(vars(self.args), self._checkpointing_may_replay_reentrant()):
            built: dict[str, Any] = super()._build_accelerator_args(**kwargs)
            return built

    def _wrap_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        # Here it is that transformers 4 decides on it.
        with unused_parameters_decided(vars(self.args), self._checkpointing_may_replay_reentrant()):
            wrapped: nn.Module = super()._wrap_model(*args, **kwargs)
            return wrapped

    def _checkpointing_may_replay_reentrant(self) -> bool:
        return may_replay_reentrant(settings_of(self.args), self._checkpointing_policy is not None)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._checkpointing = None
        self._checkpointing_logged = {}
        with _Switches(self.args) as self._checkpointing_switches:
            try:
                return super().train(*args, **kwargs)
            finally:
                if self._checkpointing is not None:
                    self._checkpointing.release()
                # As a model that was loaded: `generate` right after training gives what the saved model gives.
                if isinstance(self.model, nn.Module):
                    self.model.eval()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # May run more than once in a train(): with auto_find_batch_size after each failure.
        # The model is there by now, also if it comes from model_init, and not wrapped yet.
        assert isinstance(self.model, nn.Module)
        is_sharded = bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)
        flags = settings_of(self.args), self._checkpointing_log_from(), is_sharded
        with (
            self._checkpointing_switches or _Switches(self.args),
            quantized_prepared(self.model, *flags) as self._checkpointing_prepared,
        ):
            try:
                return super()._inner_training_loop(*args, **kwargs)
            finally:
                self._checkpointing_prepared = None
                self._checkpointing_end_rescue()

    def _save(self, *args: Any, **kwargs: Any) -> None:
        # What is cast while training is saved as it was.
        prepared = self._checkpointing_prepared
        with prepared.upcast.suspended() if prepared is not None else nullcontext():
            super()._save(*args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        state = self._checkpointing_of(model)
        if not state.oom_retries:
            return self._checkpointing_step(model, *args, **kwargs)
        if self._checkpointing_rescue is None or self._checkpointing_rescue.state is not state:
            self._checkpointing_end_rescue()
            self._checkpointing_rescue = Rescue(self, model, state)
        return self._checkpointing_rescue.run(partial(self._checkpointing_step, model), *args, **kwargs)

    def _checkpointing_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._checkpointing_of(model).step():
            loss: torch.Tensor = super().training_step(model, *args, **kwargs)
            return loss

    def _checkpointing_end_rescue(self) -> None:
        if self._checkpointing_rescue is not None:
            self._checkpointing_rescue.end()
            self._checkpointing_rescue = None

    def _checkpointing_of(self, model: nn.Module) -> Checkpointing:
        if self._checkpointing is None or self._checkpointing.model is not model:
            if self._checkpointing is not None:
                self._checkpointing.release()
            memory.reset_peak(self.args.device)
            log_from = self._checkpointing_log_from()
            asked = settings_of(self.args), log_from, self._checkpointing_policy
            self._checkpointing = Checkpointing(model, *asked, costs_of=costs_of_call)
        return self._checkpointing

    def _checkpointing_log_from(self) -> int:
        if not self.is_world_process_zero():
            return _NOTHING
        # The line at the start is meant to be seen: only a level that the user set hides it.
        return logging.INFO if self.args.log_level == "passive" else int(self.args.get_process_log_level())  # type: ignore[no-untyped-call]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        state = self._checkpointing
        if "loss" in logs and state is not None and state.is_active:
            if not state.is_used:
                state.warn_unused(type(self).__name__)
            logs = {**logs, **self._checkpointing_metrics(state)}
        super().log(logs, *args, **kwargs)

    def _checkpointing_metrics(self, checkpointing: Checkpointing) -> dict[str, float]:
        report = checkpointing.report()
        metrics = dict(report["memory"])
        offload = report["offload"] if report["offload"] and report["offload"]["devices"] else None
        # Of these, what came since the last time.
        totals = {f"offload_{key}": offload[key] for key in _OFFLOAD_METRICS} if offload else {}
        if report["calls"]:  # none are seen where the model is compiled
            totals["recomputed_blocks"] = report["recomputed_blocks"]
        metrics |= {key: total - self._checkpointing_logged.get(key, 0) for key, total in totals.items()}
        self._checkpointing_logged = totals
        if offload:
            metrics["offload_host_peak_bytes"] = offload["host_peak_bytes"]
        if report["recomputed_flops_share"] is not None:
            metrics["recomputed_flops_share"] = round(report["recomputed_flops_share"], 4)
        return {f"checkpointing/{key}": value for key, value in metrics.items()}

    def memory_report(self) -> dict[str, Any]:
        """What the last (or present) `train()` did: plan, recomputed block calls, bytes. See `report.memory_report`.

        Before the first training step: the plan alone, nothing counted yet.
        """
        if self._checkpointing is None:
            assert isinstance(self.model, nn.Module)
            return Checkpointing(self.model, settings_of(self.args), _NOTHING, self._checkpointing_policy).report()
        return self._checkpointing.report()


class _Switches:
    """The checkpointing switches of transformers in training arguments, off while entered; calling it ends that early.

    Left on, `train()` would put transformers' own checkpointing and its hooks on the model. Only what stands in the
    arguments at that moment counts, so they are on again before callbacks read or save them.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self._fields = vars(args)
        self._values = {name: self._fields[name] for name in _SWITCHES if name in self._fields}

    def __enter__(self) -> _Switches:
        self._fields.update(dict.fromkeys(self._values, False))
        return self

    def __call__(self) -> None:
        self._fields.update(self._values)

    def __exit__(self, *error: object) -> None:
        self()


class _Events(TrainerCallback):
    """At the start of training: give the switches of transformers back, make the plan and say what it is. With each
    checkpoint, plans of mode `auto` are saved."""

    def __init__(self, trainer: CheckpointingMixin) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer._checkpointing_switches is not None:
            self._trainer._checkpointing_switches()
        self._trainer._checkpointing_of(self._trainer.model_wrapped)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(self._trainer._get_output_dir(trial=None), f"checkpoint-{state.global_step}")
        plan = self._trainer._checkpointing.whole_plan if self._trainer._checkpointing is not None else None
        if not args.should_save or not folder.is_dir():
            return
        if plan is not None and plan.sizes:
            (folder / PLAN_FILE).write_text(plan.to_json() + "\n", encoding="utf-8")
        else:
            (folder / PLAN_FILE).unlink(missing_ok=True)  # of another run


class CheckpointedTrainer(CheckpointingMixin, Trainer):
    """`transformers.Trainer` with activation checkpointing; takes what `Trainer` takes."""


class CheckpointedSeq2SeqTrainer(CheckpointedTrainer, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with activation checkpointing; takes what `Seq2SeqTrainer` takes."""
