"""Options of commands that are about a model given by its config: which one, of what sizes, trained in what way."""

from __future__ import annotations

import argparse
from typing import Any

from ckpt_trainer.model_configs import ATTENTIONS, DTYPES, TASKS


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them to the parser of a command."""
    add = parser.add_argument
    add("model", help="name on the hub (the local cache is asked too), folder, or path of a config.json")
    add("--batch", type=int, default=1, metavar="N", help="rows of the micro-batch (default: 1)")
    add("--seq", type=int, required=True, metavar="N", help="tokens in a row")
    add("--task", choices=TASKS, help="what is trained for (default: what the config says)")
    add(
        "--dtype",
        choices=DTYPES,
        default="bf16",
        help="of the weights; -mixed: autocast over fp32 weights (default: bf16)",
    )
    add(
        "--optimizer",
        default="adamw_fused",
        metavar="NAME",
        help="one of torch.optim, _fused for its fused variant, or none (default: adamw_fused)",
    )
    add("--lora", type=int, metavar="RANK", help="train LoRA adapters of this rank only")
    add(
        "--lora-targets", type=_names, metavar="NAMES", help="modules that get them, separated by commas, or all-linear"
    )
    add("--attention", choices=ATTENTIONS, help="default: what transformers takes, sdpa where it can")
    add("--modes", type=lambda text: text.split(","), metavar="NAMES", help="separated by commas (default: all)")
    add("--budget", metavar="SIZE", help="what has to hold the peak: 20GiB, or a share of the device (default: 0.9)")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--plot", metavar="FILE.png", help="draw the table as bars")


def model_options(chosen: argparse.Namespace) -> dict[str, Any]:
    """What was chosen of those that say how a model is built and trained, by the names that `estimate` has for them."""
    names = ("batch", "seq", "task", "dtype", "optimizer", "lora", "lora_targets", "attention", "modes", "budget")
    return {name: getattr(chosen, name) for name in names}


def _names(text: str) -> str | list[str]:
    return text if text == "all-linear" else text.split(",")
