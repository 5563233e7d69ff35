"""Models with quantised weights: what they need to train, and what their kernels keep for nothing.

The same for every library that quantises, told by the names that transformers gives them. While training only: what is
cast is cast back, bit for bit, since it is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Weights of bitsandbytes, also where no config says that they are quantised.
_PACKED = {"Params4bit": "bitsandbytes, 4 bit", "Int8Params": "bitsandbytes, 8 bit"}
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Preparation:
    """What was done to a quantised model for the time of its training.

    Args:
        method: How it is quantised, such as `bitsandbytes, 4 bit`.
        upcast: How many parameters are fp32 that were not.
        bytes_before: Of all parameters, as they were.
        bytes_after: Likewise, now.
        compute: How many layers follow autocast in what they compute in, that were left at fp32.
        left: Why nothing is cast though it was asked for, or less; empty where all is.
    """

    method: str
    upcast: int
    bytes_before: int
    bytes_after: int
    compute: int = 0
    left: str = ""


def quantization_of(model: nn.Module) -> str | None:
    """How weights of a model are quantised: `gptq`, `bitsandbytes, 4 bit`; None if they are not.

    By what transformers writes on a model (`quantization_method`, whatever the library), else by the weights themselves.
    """
    for module in model.modules():
        method = vars(module).get("quantization_method")
        quantizer = vars(module).get("hf_quantizer")
        if method is None and quantizer is not None:
            method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", "quantised")
        if method is not None:
            bits = next((f", {n} bit" for n in (4, 8) if vars(module).get(f"is_loaded_in_{n}bit")), "")
            return f"{getattr(method, 'value', method)}{bits}"
    packed = (_PACKED.get(type(parameter).__name__) for parameter in model.parameters())
    return next((name for name in packed if name), None)


def prepare_model_for_kbit_training(
    model: nn.Module, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> nn.Module:
    """Freeze a quantised model, before adapters are attached. In place of PEFT's function of this name.

    Nothing else is done here. PEFT's also turns checkpointing on, hooks the embeddings, and casts all that is not
    quantised to fp32, embeddings and head included; ours is decided by training arguments, for the time of training.

    Args:
        model: A quantised model, as loaded.
        use_gradient_checkpointing: Taken so that scripts need no change, and not used: training arguments decide.
        gradient_checkpointing_kwargs: Likewise.

    Returns:
        The model.

    Raises:
        ValueError: The model has adapters, which would be frozen, too; or it is not quantised.
    """
    if quantization_of(model) is None:
        raise ValueError(
            f"{type(model).__name__} is not quantised. Load it with a quantization_config, or leave this call out."
        )
    if any("peft_config" in vars(module) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has adapters, which this would freeze. Call it before they are attached; or leave "
            "it out, since attaching them freezes the rest."
        )
    return model.requires_grad_(False)


@contextmanager
def kbit_prepared(model: nn.Module, upcast: str = "none", is_sharded: bool = False) -> Iterator[Preparation | None]:
    """While entered, a quantised model is ready to train; after it, it is as it was.

    Layers that were left to compute in fp32 compute in what mixed precision has, as LLaVA's script sets it. Weights
    that are frozen and in 16 bits are cast to fp32 as `upcast` says: all that are not quantised, or those of norms. A
    norm in fp32 still gives what it gave in dtype, so that no activation grows.

    Args:
        model: Any module.
        upcast: `none`, `norms` or `all`.
        is_sharded: Its parameters are or will be split over processes, and are not cast.

    Yields:
        What was done; None if the model is not quantised.
    """
    method = quantization_of(model)
    if method is None:
        yield None
        return
    left = ""
    if upcast != "none" and is_sharded:
        upcast, left = "none", "parameters are sharded, so none is cast"
    if upcast == "all" and not method.startswith("bitsandbytes"):
        upcast, left = "norms", f"kernels of {method} take 16 bits, so only norms are cast"
    norms = _norms(model) if upcast == "norms" else []
    chosen = [parameter for norm in norms for parameter in norm.parameters()]
    if upcast == "all":
        chosen = [parameter for parameter in model.parameters() if _is_plain(parameter)]
    before = weight_bytes(model)
    with _narrowed(norms), _cast(chosen) as number, _following_autocast(model) as layers:
        yield Preparation(method, number, before, weight_bytes(model), layers, left)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters of a model, each storage once."""
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether it is frozen, in 16 bits, and not what a library made of quantised weights."""
    is_plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
    return is_plain and not parameter.requires_grad and parameter.dtype in _HALVES and not parameter.is_meta


def _norms(model: nn.Module) -> list[nn.Module]:
    """Norms with frozen weights in 16 bits that models write themselves: kernels of torch's own compute in fp32 anyway."""
    found = []
    for module in model.modules():
        own = list(module.parameters())
        is_norm = "norm" in type(module).__name__.lower() and not any(module.children())
        is_of_torch = type(module).__module__.startswith("torch.")
        if is_norm and own and not is_of_torch and all(map(_is_plain, own)):
            found.append(module)
    return found


@contextmanager
def _cast(parameters: Sequence[Any]) -> Iterator[int]:
    """These parameters in fp32; gives how many they are. They are frozen, so that casting back changes nothing."""
    changed = [(parameter, parameter.dtype) for parameter in {id(p): p for p in parameters}.values()]
    for parameter, _ in changed:
        parameter.data = parameter.data.float()
    try:
        yield len(changed)
    finally:
        for parameter, dtype in changed:
            parameter.data = parameter.data.to(dtype)


@contextmanager
def _narrowed(norms: Sequence[nn.Module]) -> Iterator[None]:
    """These norms give what they give while their weights are not fp32, in dtype."""
    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(partial(_narrow, _dtype_of(norm))).remove)
        yield


def _narrow(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    given = next((value for value in args if isinstance(value, Tensor) and value.is_floating_point()), None)
    if given is None or not isinstance(output, Tensor):
        return None
    return output.to(torch.promote_types(given.dtype, dtype))


def _dtype_of(norm: nn.Module) -> torch.dtype:
    return next(norm.parameters()).dtype


@contextmanager
def _following_autocast(model: nn.Module) -> Iterator[int]:
    """Layers with 4 bit weights that were left to compute in fp32, the default, follow autocast; gives how many.

    Their kernel asks for autocast within one op, which no longer sees it under a dispatch mode: selective tiers and
    FLOP counters would change the result.
    """
    layers: list[Any] = [module for module in model.modules() if vars(module).get("compute_dtype") is torch.float32]
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(setattr, layer, "compute_dtype", torch.float32)
            if layer.bias is not None:  # which the layer casts for good
                stack.callback(setattr, layer.bias, "data", layer.bias.data)
            stack.callback(layer.register_forward_pre_hook(_follow_autocast).remove)
        yield len(layers)


def _follow_autocast(module: Any, args: Any) -> None:
    device = module.weight.device.type
    wanted = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    if module.compute_dtype is not wanted:
        module.compute_dtype = wanted


@contextmanager
def without_kept_inputs(model: nn.Module) -> Iterator[None]:
    """Layers with 8 bit weights do not keep their inputs for backward, which reads them for no weight that is frozen.

    Those of bitsandbytes hold an input on the node of autograd, where hooks on saved tensors do not see it: it would stay
    through non-reentrant checkpointing, and offload would not move it.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if type(getattr(module, "weight", None)).__name__ == "Int8Params":
                stack.callback(module.register_forward_hook(_drop_input).remove)
        yield


def _drop_input(module: nn.Module, args: Any, output: Any) -> None:
    node: Any = output.grad_fn if isinstance(output, Tensor) else None
    if node is None or not node.name().startswith("MatMul8bit") or node.needs_input_grad[1]:
        return
    if isinstance(getattr(node, "A", None), Tensor):
        node.A = None
    kept = getattr(node, "tensors", None)
    if isinstance(kept, tuple) and len(kept) == _KEPT:
        node.tensors = (kept[0], None, None)


# (the input quantised by column, its outliers, the input): the last two are for the gradient of the weight alone.
_KEPT = 3
