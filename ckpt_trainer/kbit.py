"""Models with quantised weights: what they need to train, and what their kernels keep for nothing.

The same for every library that quantises, told by the names that transformers gives them. While training only: what is
cast is cast back, bit for bit, since it is frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ckpt_trainer.log import logger

# Weights of bitsandbytes, also where no config says that they are quantised.
_PACKED = {"Params4bit": "bitsandbytes, 4 bit", "Int8Params": "bitsandbytes, 8 bit"}
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Preparation:
    """What was done to a quantised model for the time of its training.

    Args:
        method: How it is quantised, such as `bitsandbytes, 4 bit`.
        upcast: What is fp32 that was not.
        bytes_before: Of all parameters, as they were.
        bytes_after: Likewise, now.
        compute: How many layers are set to compute in fp32, and follow autocast in each step.
        trained: Names of parameters that are trained in 16 bits, which are not cast: they could not be cast back.
        left: Why nothing is cast though it was asked for, or less; empty where all is.
    """

    method: str
    upcast: Upcast
    bytes_before: int
    bytes_after: int
    compute: int = 0
    trained: tuple[str, ...] = ()
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
    model: nn.Module, use_gradient_checkpointing: bool | None = None, gradient_checkpointing_kwargs: Any = None
) -> nn.Module:
    """Freeze a quantised model, before adapters are attached. In place of PEFT's function of this name.

    Nothing else is done here. PEFT's also turns checkpointing on, hooks the embeddings, and casts all that is not
    quantised to fp32, embeddings and head included; ours is decided by training arguments, for the time of training.

    Args:
        model: A quantised model, as loaded.
        use_gradient_checkpointing: Taken so that scripts need no change, and not used, which a line says: training
            arguments decide.
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
    if use_gradient_checkpointing is not None or gradient_checkpointing_kwargs is not None:
        logger.info(
            "prepare_model_for_kbit_training does not look at use_gradient_checkpointing and its kwargs: whether and how "
            "blocks are recomputed is for training arguments (checkpointing_mode)."
        )
    return model.requires_grad_(False)


@contextmanager
def kbit_prepared(model: nn.Module, upcast: str = "none", is_sharded: bool = False) -> Iterator[Preparation | None]:
    """While entered, weights of a quantised model are fp32 as `upcast` says; after it, they are as they were.

    Cast is what is frozen and in 16 bits: all that is not quantised, or norms alone. A norm in fp32 still gives what it
    gave in dtype, so that no activation grows.

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
        upcast, left = "none", "none is cast under FSDP and DeepSpeed, which hold parameters in another way"
    if upcast == "all" and not method.startswith("bitsandbytes"):
        upcast, left = "norms", f"kernels of {method} take 16 bits, so only norms are cast"
    norms = _norms(model) if upcast == "norms" else []
    chosen = [parameter for norm in norms for parameter in norm.parameters()]
    if upcast == "all":
        chosen = [parameter for parameter in model.parameters() if _is_plain(parameter)]
    before = weight_bytes(model)
    trained = tuple(name for name, p in model.named_parameters() if p.requires_grad and p.dtype in _HALVES)
    with _narrowed(norms), Upcast(chosen) as cast:
        compute = len(_layers_left_at_fp32(model))
        yield Preparation(method, cast, before, weight_bytes(model), compute, trained, left)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters of a model, each storage once."""
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether it is frozen, in 16 bits, and not what a library made of quantised weights."""
    is_plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor and not hasattr(parameter, "ds_id")
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


class Upcast:
    """Parameters that are fp32 while this is entered. They are frozen, so that casting them back changes no bit.

    Args:
        parameters: In 16 bits. One that is there twice counts once.
    """

    def __init__(self, parameters: Iterable[Any]) -> None:
        self._dtypes = [(parameter, parameter.dtype) for parameter in {id(p): p for p in parameters}.values()]

    def __len__(self) -> int:
        return len(self._dtypes)

    def __enter__(self) -> Upcast:
        for parameter, _ in self._dtypes:
            parameter.data = parameter.data.float()
        return self

    def __exit__(self, *error: object) -> None:
        for parameter, dtype in self._dtypes:
            parameter.data = parameter.data.to(dtype)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """As they were, for what is saved meanwhile."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


@contextmanager
def _narrowed(norms: Sequence[nn.Module]) -> Iterator[None]:
    """These norms give what they give while their weights are not fp32, in dtype."""
    with ExitStack() as stack:
        for norm in norms:
            hook = partial(_narrow, next(norm.parameters()).dtype)
            stack.callback(norm.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _narrow(dtype: torch.dtype, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    given = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    if given is None or not isinstance(output, Tensor):
        return None
    return output.to(torch.promote_types(given.dtype, dtype))


@contextmanager
def following_autocast(model: nn.Module) -> Iterator[None]:
    """Layers with 4 bit weights that were left to compute in fp32, the default, compute in what autocast has.

    As LLaVA's script sets it. Their kernel asks for autocast within one op, which no longer sees it under a dispatch
    mode: selective tiers and FLOP counters would change the result.
    """
    with ExitStack() as stack:
        for layer in _layers_left_at_fp32(model):
            stack.callback(setattr, layer, "compute_dtype", torch.float32)
            if layer.bias is not None:  # which the layer casts for good
                stack.callback(setattr, layer.bias, "data", layer.bias.data)
            stack.callback(layer.register_forward_pre_hook(_follow_autocast).remove)
        yield


def _layers_left_at_fp32(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if vars(module).get("compute_dtype") is torch.float32]


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
