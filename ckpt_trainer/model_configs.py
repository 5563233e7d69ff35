"""A model from what a user has of it: a name, a folder, a JSON file, a config; and a batch for it.

The model is built in the class that its config names or that a task asks for: on `meta`, which costs no memory, or with
random weights on a device.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.import_utils import is_peft_available

# What is trained for -> the class that builds it; the first that knows the config is taken where nobody says.
TASKS = {
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "image-text-to-text": "AutoModelForImageTextToText",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}
# Tasks with one label for each row; all others here have one for each token.
_ONE_LABEL = "ForSequenceClassification"

# Name -> dtype of the weights, and of autocast.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "fp16-mixed": (torch.float32, torch.float16),
}
ATTENTIONS = ("sdpa", "eager")


def config_of(source: Any) -> Any:
    """The config of a model.

    Args:
        source: A config; the path of a folder with a `config.json`, or of a JSON file with a `model_type`; or a name on the
            hub, of which the local cache is asked where there is no network.

    Raises:
        ValueError: There is no such file, it is no config, its type is unknown, or nobody has the name.
    """
    if not isinstance(source, (str, Path)):
        return source
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ValueError(f"model {str(source)!r} is a folder without a config.json. Give the path of a JSON file.")
    if path.is_file():
        return _read(path)
    if path.suffix == ".json" or path.is_absolute() or str(source).startswith("."):
        raise ValueError(f"model {str(source)!r} is the path of a file or folder that does not exist.")
    try:
        return AutoConfig.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model {str(source)!r} is no file or folder here, and neither the local cache nor the hub gave a config of "
            f"that name ({type(error).__name__}: {why}). Check the name, or give the path of its config.json."
        ) from error


def build_model(
    config: Any,
    task: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    attention: str | None = None,
    device: torch.device | str = "meta",
) -> nn.Module:
    """A model in training mode.

    Args:
        config: As `config_of` gives it.
        task: One of `TASKS`; None: what the first of the config's architectures is for.
        dtype: Of its weights.
        attention: One of `ATTENTIONS`; None: what transformers takes for this model.
        device: Where it is; not on `meta`: with random weights.

    Raises:
        ValueError: The task or the attention is unknown, or this config has no model for it.
    """
    _check("task", task, TASKS)
    _check("attention", attention, ATTENTIONS)
    kind = _class_of(config, task)
    try:
        with torch.device(device):
            model = kind._from_config(config, dtype=dtype, attn_implementation=attention)
    except (TypeError, AttributeError, RuntimeError, ZeroDivisionError, ImportError) as error:
        raise ValueError(
            f"a {kind.__name__} cannot be built from this config: {type(error).__name__}: {error}. Check its sizes."
        ) from error
    built: nn.Module = model.train()
    return built


def with_lora(model: nn.Module, rank: int | None, targets: Sequence[str] | str | None = None) -> nn.Module:
    """The model with LoRA adapters, and nothing else in training.

    Args:
        rank: Of the adapters; None: the model as it is.
        targets: Names of modules, or `all-linear`; None: what PEFT takes for this model.

    Raises:
        ImportError: PEFT is missing.
        ValueError: The rank is not positive, there is none for the targets, or there are no such modules.
    """
    if rank is None:
        if targets is not None:
            raise ValueError(f"lora_targets={targets!r} without lora. Give the rank of the adapters, such as lora=16.")
        return model
    if not is_peft_available():
        raise ImportError("LoRA was asked for, and peft is missing. Run: pip install peft")
    from peft import LoraConfig, get_peft_model  # an extra

    if rank < 1:
        raise ValueError(f"a LoRA rank of {rank} was asked for. Give 1 or more.")
    wanted = targets if targets is None or isinstance(targets, str) else list(targets)
    config = LoraConfig(r=rank, target_modules=wanted)
    try:
        adapted: nn.Module = get_peft_model(model, config, low_cpu_mem_usage=next(model.parameters()).is_meta)
    except ValueError as error:
        raise ValueError(f"LoRA: {error} Name the modules (--lora-targets), or 'all-linear'.") from error
    return adapted.train()


def batch_of(model: nn.Module, rows: int, tokens: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """A batch as collators make it, on the host: full rows, no padding, a label for each row or token.

    Args:
        model: One that `build_model` or `with_lora` made.
        rows: How many.
        tokens: In each of them.
        generator: Draws them; None: all are the same.

    Raises:
        ValueError: A size is not positive, or the model is not one that is given token ids.
    """
    for name, size in (("batch", rows), ("seq", tokens)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r} was asked for. Give a whole number from 1 on.")
    inner: Any = model
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    main = getattr(inner, "main_input_name", "input_ids")
    if main != "input_ids":
        raise ValueError(
            f"{type(inner).__name__} is given {main!r} instead of token ids. In Python, give a batch of your own: "
            "estimate(model, batch={...})."
        )
    ids = torch.full((rows, tokens), _plain_id(inner.config))
    if generator is not None:
        drawn = torch.randint(inner.config.get_text_config().vocab_size, ids.shape, generator=generator)
        ids = torch.where(torch.isin(drawn, torch.tensor([*_special_ids(inner.config)])), ids, drawn)
    labels = torch.zeros(rows, dtype=torch.long) if _ONE_LABEL in type(inner).__name__ else torch.zeros_like(ids)
    decoder = {"decoder_input_ids": ids.clone()} if inner.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **decoder, "labels": labels}


def position_limit(config: Any) -> int | None:
    """The longest row that a config allows for; None: it does not say."""
    text = config.get_text_config()
    found = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    # T5 has relative positions and only says what it was trained with.
    relative = getattr(text, "relative_attention_num_buckets", None)
    return int(found) if isinstance(found, int) and found > 0 and not relative else None


def _read(path: Path) -> Any:
    try:
        data = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from None
    kind = data.get("model_type") if isinstance(data, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"{str(path)!r} has no model_type, so it is not the config of a model.")
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(kind, CONFIG_MAPPING.keys(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{str(path)!r}: transformers {transformers.__version__} has no model_type {kind!r}.{hint}")
    try:
        return CONFIG_MAPPING[kind].from_dict(data)
    except Exception as error:  # configs check themselves with errors of many kinds
        why = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} is no valid config of {kind!r}: {type(error).__name__}: {why}") from error


def _class_of(config: Any, task: str | None) -> Any:
    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or []]
    if task is None and named and named[0] is not None and not _has_no_loss(named[0].__name__):
        return named[0]
    for name in [task] if task is not None else TASKS:
        mapping = getattr(transformers, TASKS[name])._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    asked = f"task {task!r}" if task is not None else f"any of the tasks {', '.join(TASKS)}"
    raise ValueError(f"transformers {transformers.__version__} has no model of type {config.model_type!r} for {asked}.")


def _has_no_loss(name: str) -> bool:
    return name.endswith(("Model", "EncoderModel")) and "For" not in name and "LMHead" not in name


def _plain_id(config: Any) -> int:
    special = _special_ids(config)
    return next(number for number in range(len(special) + 1) if number not in special)


def _special_ids(config: Any) -> set[int]:
    """Tokens that mean something in particular, such as an image or the end."""
    configs = [config, config.get_text_config()]
    return {value for one in configs for name, value in vars(one).items() if name.endswith(("_id", "_index"))
            and isinstance(value, int)}  # fmt: skip


def _check(name: str, value: str | None, known: Any) -> None:
    if value is not None and value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}.{hint}")
