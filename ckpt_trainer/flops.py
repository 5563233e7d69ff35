"""Floating-point operations of a step, counted as its ops run.

torch has the formulas; here are the ones it lacks, and a counter that leaves the step as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# NOTE: why not torch's FlopCounterMode. It replaces each op that has a composition by it, also where the device has a
# kernel of its own: silu_backward on a CPU, so that counting a Llama changes its gradients. In inference mode it runs
# compositions written in Python, which do the same to an image resize. And it tracks modules, with hooks on each of
# them and on the gradients of their inputs and outputs that hold the graph until it exits. Its formulas are used as
# they are.


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _matrix_vector(matrix: Tensor, vector: Tensor, *rest: Any) -> int:
    return 2 * matrix.numel()


def _add_matrix_vector(bias: Tensor, matrix: Tensor, vector: Tensor, *rest: Any) -> int:
    return 2 * matrix.numel()


def _grouped(a: Tensor, b: Tensor, *rest: Any) -> int:
    # Two 3-d operands are a batch. A 2-d one is cut along one dimension, each group takes its part of it, and the parts
    # add up. From shapes only: where the groups end is a tensor, and reading it would make a device wait.
    batch = a.shape[0] if a.dim() == b.dim() == 3 else 1
    return 2 * batch * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _grouped_fallback_backward(a: Tensor, b: Tensor, *rest: Any) -> int:
    return 2 * _grouped(a, b)


# Op -> number of floating-point operations of a call, from its arguments.
FORMULAS: dict[str, Callable[..., int]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten._scaled_dot_product_fused_attention_overrideable": _attention,
    "aten._scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
    "aten._scaled_dot_product_attention_math_for_mps": _attention,
    "aten.mv": _matrix_vector,
    "aten.addmv": _add_matrix_vector,
    "aten._grouped_mm": _grouped,
    "transformers.grouped_mm_fallback": _grouped,
    "transformers.grouped_mm_fallback_backward": _grouped_fallback_backward,
}


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations of matmuls, convolutions and attention within the context, backward included.

    A multiplication and an addition are two; elementwise ops are none; causal attention counts as full, as in torch.
    What a kernel that torch has no formula for does is not seen. Results are bitwise those without the counter.
    `flex_attention` does not run within: torch compiles it, and does not compile under a dispatch mode.

    A block under torch's non-reentrant checkpoint counts once more in backward, without what early stop leaves out:
    recompute ends when the last tensor that backward needs is there, so a matmul whose result nobody saves (the last
    of a block, before the residual) does not run again.

    Attributes:
        total: Operations so far, readable at any time; a second `with` on the same counter goes on from there.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Parts that are compiled run compiled: torch would else run them op by op, which gives other bits."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func, args):
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        out = func(*args, **kwargs)
        self.total += flops_of(func, args, kwargs, out)
        return out


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating-point operations of one call of an op; 0 of one without a formula."""
    op = func._overloadpacket
    if op in flop_registry:
        formula: Any = flop_registry[op]
        return int(formula(*args, **kwargs, out_val=out))
    return FORMULAS[str(op)](*args) if str(op) in FORMULAS else 0


def _is_composite(func: Any, args: Any) -> bool:
    # In inference mode an op that is made of others, and of nothing else on this device, arrives whole, with its
    # matmuls inside. Its own C++ composition is what would run anyway.
    if func.namespace == "prim":
        return False  # what a tensor without data is asked for, and no kernel is registered for
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if not has_kernel(func.name(), torch._C.DispatchKey.CompositeImplicitAutograd):
        return False
    devices = {leaf.device.type for leaf in tree_iter(args) if isinstance(leaf, Tensor)}
    return not any(has_kernel(func.name(), torch._C._dispatch_key_for_device(device)) for device in devices)
