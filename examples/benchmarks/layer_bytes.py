"""Bytes that one layer of a large model stores between forward and backward, without its weights and without a device.

    python examples/benchmarks/layer_bytes.py --output examples/benchmarks/layer_bytes.md

Shapes and dtypes are followed with fake tensors, which have no data. A model of one layer more is compared with one of
less, so that what is in it once (embeddings, head, loss) does not count. The default has the shapes of Llama-3-8B:

    python examples/benchmarks/layer_bytes.py --model Qwen3 --hidden 2560 --config intermediate_size=9728 head_dim=128
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses import FakeTensorMode

from ckpt_trainer.engine import Checkpointing
from ckpt_trainer.memory import LiveBytes
from ckpt_trainer.plan import TIERS
from ckpt_trainer.training_args import settings_of_flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import MIB, Batch, circumstances, markdown_table
from models import add_options, build

# Name -> flags of `checkpointing`.
VARIANTS: dict[str, dict[str, Any]] = {
    "keep": {"mode": "none"},
    **{f"selective: {tier}": {"mode": "selective", "save": tier} for tier in TIERS},
    "full": {"mode": "full"},
}


def layer_bytes(options: argparse.Namespace) -> dict[str, int]:
    """Variant -> bytes that one more layer stores."""
    few, many = (build_fake(options, layers) for layers in (2, 3))
    return {name: stored_bytes(*many, flags) - stored_bytes(*few, flags) for name, flags in VARIANTS.items()}


def build_fake(options: argparse.Namespace, layers: int) -> tuple[nn.Module, Batch]:
    """A model and a batch without data. Tensors that a forward makes itself are real ones, and small."""
    sizes = argparse.Namespace(**{**vars(options), "layers": layers})
    # Around this only: the state of a random generator cannot be compared where all tensors are fake.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, batch = build(sizes, getattr(torch, options.dtype), torch.device("cpu"))
    attend_without_mask(model)
    return model, batch


def attend_without_mask(model: Any) -> None:
    """Let causal attention be told by a flag, as where no token is padding."""
    # With fake tensors transformers takes itself for traced and makes a mask; none for attention that it does not know.
    transformers.AttentionInterface.register(_ATTENTION, transformers.AttentionInterface()["sdpa"])
    try:
        model.set_attn_implementation(_ATTENTION)
    except ValueError:
        print(f"{type(model).__name__} does not attend by sdpa; its attention is taken as it is.")


def stored_bytes(model: nn.Module, batch: Batch, flags: dict[str, Any]) -> int:
    """Bytes alive at the end of forward that were not there before."""
    state = Checkpointing(model, settings_of_flags(flags), log_from=logging.CRITICAL + 1)
    # Twice, since a first replay shows which results none asks for, and the blocks store them no more.
    for _ in range(2):
        with state.step(), LiveBytes() as live:
            loss = model(**batch)["loss"]
            stored = live.current
            loss.backward()
        model.zero_grad()
    return stored


def bytes_table(found: Mapping[str, int]) -> str:
    """Variant, MiB per layer and their ratio to those of keep, as a markdown table."""
    header = ("stored", "MiB per layer", "of keep")
    rows = [(name, f"{number / MIB:.0f}", f"{number / found['keep']:.2f}") for name, number in found.items()]
    return markdown_table(header, rows)


def main() -> None:
    options = read_options()
    transformers.utils.logging.set_verbosity_error()
    start = time.perf_counter()
    table = bytes_table(layer_bytes(options))
    print(f"{table}\n\nin {time.perf_counter() - start:.0f} s")
    if options.output is not None:
        size = f"{options.model}, width {options.hidden}, {options.batch} x {options.tokens} tokens, {options.dtype}"
        text = f"# Bytes per layer\n\n{NOTES}\n\n{circumstances(_SCRIPT)}\n\n{size}:\n\n{table}\n"
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)


NOTES = """\
Written by `layer_bytes.py` from shapes alone: what one layer stores between forward and backward, its input included,
attention by a fused kernel (`sdpa` without a mask, which on any device saves query, key, value, its result and one number
per row and head)."""

_ATTENTION = "sdpa_without_mask"
_SCRIPT = "examples/benchmarks/layer_bytes.py"

# Those of Llama-3-8B beside the sizes that have flags of their own.
_CONFIG = ["vocab_size=128256", "intermediate_size=14336", "num_attention_heads=32", "num_key_value_heads=8"]


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, config=_CONFIG, hidden=4096, tokens=8192, batch=1)
    parser.add_argument("--dtype", default="bfloat16", help="(default: bfloat16)")
    parser.add_argument("--output", type=Path, help="markdown file to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
