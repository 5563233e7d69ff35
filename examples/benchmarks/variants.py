"""The steps that `gpu.py` compares, on a stack of decoder blocks: plain, recomputed, offloaded by us, by HF, by TRL.

What is not there on a machine (an option of transformers, a package) is a `Missing` that says why, so that it becomes a row
of a table and ends nothing.
"""

from __future__ import annotations

import inspect
import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ckpt_trainer.engine import Checkpointing
from ckpt_trainer.training_args import settings_of_flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from frontier import hf_enabled
from models import build

Batch = dict[str, Tensor]
Context = Callable[[], AbstractContextManager[Any]]

# Bytes that a block stores in plain training / those of its input, for Llama with a fused attention (layer_bytes.md); a
# third more, since torch rounds pinned memory up to powers of two.
KEPT_INPUTS = 1.34 * 1569 / 64


class Missing(Exception):
    """Why a variant cannot be had here."""


@dataclass(frozen=True)
class Variant:
    """One way to run a step.

    Args:
        name: For the table.
        side: Whose it is: `plain`, `ours`, `HF` or `TRL`.
        step: Around forward and backward, and timed with them.
        setting: Around that, not timed: what is turned on once for a whole training.
        report: What it tells about itself, if it does.
        auto: What it tells about the plans of mode `auto`.
    """

    name: str
    side: str
    step: Context = nullcontext
    setting: Context = nullcontext
    report: Callable[[], dict[str, Any]] = dict
    auto: Callable[[], dict[str, Any]] = dict


class Stack(nn.Module):
    """A causal language model whose logits exist for a few tokens at a time, so that the blocks make the peak.

    Args:
        model: One of transformers.
        chunk: Tokens per piece of the loss.
    """

    def __init__(self, model: Any, chunk: int) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings()
        # Of hooks around the whole step (TRL's) the head is exempt, as TRL has it.
        with saved_tensors_hooks(_as_it_is, _as_it_is):
            pieces = zip(hidden.split(self.chunk, dim=1), labels.split(self.chunk, dim=1))
            losses = [checkpoint(_piece_loss, head, *piece, use_reentrant=False) for piece in pieces]
            return {"loss": torch.stack(losses).sum() / labels.numel()}


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _piece_loss(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float().flatten(0, 1), labels.flatten(), reduction="sum")


def build_stack(options: Namespace, tokens: int, dtype: torch.dtype) -> Stack:
    """A model with room for so many tokens; unless all of it is to be trained, its norms are.

    With the norms gradients pass through all blocks and no weight matrix gets one, as with LoRA: the backward is as short
    as it can be, which leaves the least time to hide a copy.
    """
    sizes = Namespace(model=options.model, layers=options.layers, hidden=options.hidden, tokens=tokens, batch=1)
    sizes.config = [f"vocab_size={options.vocab}", *options.config]
    # A build of torch for an accelerator names it even where there is none.
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model, _ = build(sizes, dtype, device)
    for parameter in model.parameters():
        parameter.requires_grad_(options.full_finetuning or parameter.dim() == 1)
    return Stack(model, options.chunk)


def random_batch(stack: Stack, tokens: int) -> Batch:
    """One row of random tokens; the same for the same number."""
    weight = stack.model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(weight.shape[0], (1, tokens), generator=generator).to(weight.device)
    return {"input_ids": ids, "labels": ids.clone()}


def input_bytes(stack: Stack, tokens: int) -> int:
    """Bytes of the input of one block."""
    weight = stack.model.get_input_embeddings().weight
    return tokens * weight.shape[1] * weight.element_size()


def ours(name: str, stack: Stack, options: Namespace, **flags: Any) -> Variant:
    """A variant of this package; `flags` as those of `checkpointing`."""
    more = options.offload if flags["mode"] == "offload" else {}
    try:
        settings = settings_of_flags({**flags, **more})
    except (TypeError, ValueError) as error:
        raise Missing(f"this ckpt_trainer refuses it: {error}") from error
    # Not `checkpointing` itself, which begins anew each time it is entered. This is what the trainer holds.
    state = Checkpointing(stack, settings, log_from=logging.CRITICAL + 1)
    told = partial(_part_of_report, state, "offload"), partial(_part_of_report, state, "auto")
    return Variant(name, "ours", state.step, nullcontext, *told)


def _part_of_report(state: Checkpointing, key: str) -> dict[str, Any]:
    found = state.report().get(key)
    return dict(found) if isinstance(found, Mapping) else {}


def hf_offload(name: str, stack: Stack, options: Namespace) -> Variant:
    """`activation_checkpointing_enable(offload=True)` of transformers, or under the name that it had before."""
    model = stack.model
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    if "offload" not in inspect.signature(enable).parameters:
        raise Missing(f"transformers {transformers.__version__} has no offload")
    return Variant(name, "HF", setting=partial(hf_enabled, model, offload=True))


def hf_offload_rebuilt(name: str, stack: Stack, options: Namespace) -> Variant:
    """The same by the few lines that it has, for a transformers without it."""
    return Variant(name, "HF", setting=partial(_saved_on_host, stack.model))


@contextmanager
def _saved_on_host(model: Any) -> Iterator[None]:
    kind = next(model.parameters()).device.type

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=True, device_type=kind):
            return checkpoint(function, *args, use_reentrant=False, **kwargs)

    with hf_enabled(model):
        layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
        if not any(hasattr(layer, "_gradient_checkpointing_func") for layer in layers):
            raise RuntimeError(
                f"transformers {transformers.__version__} has no _gradient_checkpointing_func to replace"
            )
        for layer in layers:
            layer._gradient_checkpointing_func = run
        yield


def hf_every_n(name: str, stack: Stack, options: Namespace, every_n: int) -> Variant:
    """Every n-th layer is recomputed, as transformers 5.23 has it, and as any version can be told to."""
    return Variant(name, "HF", setting=partial(_every_nth, stack.model, every_n))


@contextmanager
def _every_nth(model: Any, every_n: int) -> Iterator[None]:
    with hf_enabled(model):
        for number, layer in enumerate(_checkpointed_layers(model)):
            layer.gradient_checkpointing = number % every_n == 0
        yield


def _checkpointed_layers(model: Any) -> list[Any]:
    kind = transformers.modeling_layers.GradientCheckpointingLayer
    return [module for module in model.modules() if isinstance(module, kind)]


class _OnHost(torch.autograd.Function):
    """A layer whose input waits on the host, pinned; copies are in line with the computation, which is not waited for."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
        ctx.save_for_backward(hidden.to("cpu", non_blocking=True))
        ctx.function, ctx.args, ctx.device = function, args, hidden.device
        with torch.no_grad():
            return function(hidden, *args)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (saved,) = ctx.saved_tensors
        hidden = saved.to(ctx.device, non_blocking=True).detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.function(hidden, *ctx.args)
        torch.autograd.backward(output, gradients[0])
        return None, hidden.grad, *(None for _ in ctx.args)


def unsloth_offload(name: str, stack: Stack, options: Namespace) -> Variant:
    """Each layer's input goes to the host and comes back for its recompute, in the way that Unsloth has it."""
    return Variant(name, "Unsloth-style", setting=partial(_inputs_on_host, stack.model))


@contextmanager
def _inputs_on_host(model: Any) -> Iterator[None]:
    with hf_enabled(model):
        # The input of the first layer has to need a gradient; transformers 5 has seen to it.
        if not model.get_input_embeddings()._forward_hooks:
            model.enable_input_require_grads()
        for layer in _checkpointed_layers(model):
            layer._gradient_checkpointing_func = _OnHost.apply
        yield


def trl_offload(name: str, stack: Stack, options: Namespace, recompute: bool) -> Variant:
    """TRL's `OffloadActivations` around the step, as `SFTTrainer` has it, with or without activation checkpointing."""
    try:
        from trl.models.activation_offloading import OffloadActivations
    except (ImportError, RuntimeError) as error:  # its lazy modules turn one into the other
        raise Missing(f"trl cannot be imported ({error})") from error
    context = OffloadActivations()
    context.update_model_params(stack)
    setting = partial(hf_enabled, stack.model) if recompute else nullcontext
    return Variant(name, "TRL", step=lambda: context, setting=setting)


def plain(name: str, stack: Stack, options: Namespace) -> Variant:
    """Nothing is recomputed and nothing leaves."""
    return Variant(name, "plain")


FULL, OFFLOAD = "full", "offload inputs"

# Name -> makes it or raises `Missing`; those that are first to go where time is short come last.
VARIANTS: dict[str, Callable[..., Variant]] = {
    FULL: partial(ours, mode="full"),
    OFFLOAD: partial(ours, mode="offload", offload_save="inputs"),
    "offload attention": partial(ours, mode="offload", offload_save="attention"),
    "HF offload": hf_offload,
    "HF offload, rebuilt": hf_offload_rebuilt,
    "none": plain,
    "TRL offload, recompute": partial(trl_offload, recompute=True),
    "offload all": partial(ours, mode="offload", offload_save="all"),
    "TRL offload, all": partial(trl_offload, recompute=False),
}
# Those that fill the host's memory, so that they are not held beside others.
LARGE = ("offload all", "TRL offload, all")


def make_variant(name: str, stack: Stack, options: Namespace, tokens: int, available: int) -> Variant:
    """The variant of this name.

    Args:
        available: Bytes of host memory that may be had. Ours keeps to its own budget; TRL has none, and a process that
            takes more than there is gets killed.

    Raises:
        Missing: It cannot be had, or not at this size.
    """
    needed = int(KEPT_INPUTS * input_bytes(stack, tokens) * options.layers)
    if name == "TRL offload, all" and needed > 0.8 * available:
        raise Missing(f"not tried: needs about {needed / 2**30:.0f} GiB of pinned memory of {available / 2**30:.0f}")
    return VARIANTS[name](name, stack, options)


def without_needless(stack: Stack, names: Sequence[str], options: Namespace) -> list[str]:
    """These variants, without what is rebuilt of a transformers that has it."""
    try:
        hf_offload("", stack, options)
    except Missing:
        return list(names)
    return [name for name in names if name != "HF offload, rebuilt"]
