"""Models of random weights by the name of their configuration in transformers, with a batch to train them on."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Batch = dict[str, Tensor]


def add_options(parser: ArgumentParser, config: Sequence[str] = (), **defaults: int) -> None:
    """The flags that say which model: its configuration and sizes."""
    parser.add_argument("--model", default="Llama", help="configuration class without `Config` (default: Llama)")
    more = f"more of its values, as JSON (default: {' '.join(config) or 'none'})"
    parser.add_argument("--config", nargs="+", default=config, metavar="KEY=VALUE", help=more)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"(default: {value})")


def build(options: Namespace, dtype: torch.dtype, device: torch.device | None = None) -> tuple[nn.Module, Batch]:
    """A model of random weights, in training, and a batch of random data; on the accelerator if there is one."""
    device = device or torch.accelerator.current_accelerator() or torch.device("cpu")
    config = configuration(options)
    torch.manual_seed(0)
    auto, make_batch = next((auto, make) for auto, make in HEADS.items() if type(config) in auto._model_mapping)
    # Made there and not moved there, which tensors without data do not bear.
    with device:
        model = auto.from_config(config, dtype=dtype).train()
        batch = make_batch(config, options.batch, options.tokens)
    return model, {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def configuration(options: Namespace) -> Any:
    """A configuration of transformers by the name of its class; sizes that it has not are left out."""
    hidden = options.hidden
    config_class = getattr(transformers, f"{options.model.removesuffix('Config')}Config", None)
    if config_class is None:
        raise SystemExit(
            f"--model {options.model}: transformers has no {options.model}Config. Try Llama, Qwen3 or GPT2."
        )
    sizes = {
        "vocab_size": 8192,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": options.layers,
        "num_attention_heads": max(1, hidden // 64),
        "num_key_value_heads": max(1, hidden // 128),
        "max_position_embeddings": max(options.tokens, 64),
        "use_cache": False,
    }
    default = config_class()
    known = {key: value for key, value in sizes.items() if hasattr(default, key)}
    return config_class(**known | read_pairs(options.config))


def _text(config: Any, rows: int, tokens: int) -> Batch:
    ids = torch.randint(config.vocab_size, (rows, tokens))
    return {"input_ids": ids, "labels": ids.clone()}


def _pairs(config: Any, rows: int, tokens: int) -> Batch:
    batch = _text(config, rows, tokens)
    return {**batch, "decoder_input_ids": batch["input_ids"].clone()}


def _images(config: Any, rows: int, tokens: int) -> Batch:
    size = config.image_size
    images = torch.randn(rows, getattr(config, "num_channels", 3), size, size)
    return {"pixel_values": images, "labels": torch.randint(config.num_labels, (rows,))}


# Auto class -> a batch for it; the first that has a model for a configuration is taken.
HEADS: dict[Any, Callable[[Any, int, int], Batch]] = {
    transformers.AutoModelForCausalLM: _text,
    transformers.AutoModelForSeq2SeqLM: _pairs,
    transformers.AutoModelForMaskedLM: _text,
    transformers.AutoModelForImageClassification: _images,
}


def read_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """`["a=1", "b=text"]` as `{"a": 1, "b": "text"}`: JSON where it is JSON, text where it is not."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise SystemExit(f"--config {pair}: write key=value")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found
