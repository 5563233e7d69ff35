"""Activation checkpointing for Hugging Face trainers: the same losses and gradients in less memory."""

from ckpt_trainer.estimates import estimate
from ckpt_trainer.kbit import prepare_model_for_kbit_training
from ckpt_trainer.loop import checkpointing
from ckpt_trainer.plan import Action, Plan
from ckpt_trainer.trainer import CheckpointedSeq2SeqTrainer, CheckpointedTrainer, CheckpointingMixin
from ckpt_trainer.training_args import (
    CheckpointingArguments,
    CheckpointSeq2SeqTrainingArguments,
    CheckpointTrainingArguments,
)

__all__ = [
    "Action",
    "CheckpointSeq2SeqTrainingArguments",
    "CheckpointTrainingArguments",
    "CheckpointedSeq2SeqTrainer",
    "CheckpointedTrainer",
    "CheckpointingArguments",
    "CheckpointingMixin",
    "Plan",
    "checkpointing",
    "estimate",
    "prepare_model_for_kbit_training",
]
