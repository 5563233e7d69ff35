"""How the result of a cheap op is computed again, told from the autograd node that the op left behind.

One rule for each kind of node, in the table `RULES`: which function to call, where its tensors are found (saved by the
node, or results of the nodes before it) and its other arguments. Ops that cost more than reading and writing their
tensors (matmul, attention, convolution, reductions) have no rule: their results are stored.

NOTE on names. A node names what it saved `_saved_<argument>`, and of those that are tensors there is a
`_raw_saved_<argument>`, which leads to what a pack hook gave for it. Both are semi-private to torch. Rules only read
arguments that their op cannot do without; where one is not there, the result is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Node = Any  # torch.autograd.graph.Node, with the attributes of its kind

_UNSIGNED = 2**63


@dataclass(frozen=True)
class Rule:
    """How the result of one kind of node is computed again: `function(*tensors, *constants, *arguments)`.

    Args:
        function: Gives the result, bit for bit as the op did.
        tensors: The differentiable arguments in the order of `node.next_functions`, each by the name under which the
            node may have saved it; empty where it never does. None: all of them, in a list.
        constants: Tensors without gradient that the node saved.
        arguments: Node and number of the output -> all other arguments.
    """

    function: Callable[..., Tensor]
    tensors: tuple[str, ...] | None = ("",)
    constants: tuple[str, ...] = ()
    arguments: Callable[[Node, int], tuple[Any, ...]] = lambda node, output: ()


def _signed(value: Any) -> Any:
    # Dimensions are shown as unsigned: -1 as 2**64 - 1.
    if isinstance(value, tuple):
        return tuple(_signed(item) for item in value)
    return value - 2**64 if isinstance(value, int) and value >= _UNSIGNED else value


def _read(*names: str) -> Callable[[Node, int], tuple[Any, ...]]:
    saved = [f"_saved_{name}" for name in names]
    return lambda node, output: tuple(_signed(getattr(node, name)) for name in saved)


def shape_of(node: Node, output: int = 0) -> tuple[int, ...]:
    """Shape of the result of a node."""
    return tuple(node._input_metadata[output].shape)


def dtype_of(node: Node, output: int = 0) -> torch.dtype:
    """Dtype of the result of a node."""
    dtype: torch.dtype = node._input_metadata[output].dtype
    return dtype


def _shape(node: Node, output: int) -> tuple[Any, ...]:
    return (shape_of(node),)


def _add(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return torch.add(a, b, alpha=alpha)


def _subtract(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return torch.sub(a, b, alpha=alpha)


def _gelu(a: Tensor, approximate: str) -> Tensor:
    return torch.nn.functional.gelu(a, approximate=approximate)


def _elu(a: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    result: Tensor = torch.ops.aten.elu(a, alpha, scale, input_scale)
    return result


def _cast(a: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return a.to(device, dtype)


def _dropped(a: Tensor, mask: Tensor, p: float) -> Tensor:
    scale = 0.0 if p == 1 else 1 / (1 - p)
    if a.device.type == "cpu":
        return a * mask.to(a.dtype).mul_(scale)
    # A fused kernel; the one of its backward multiplies by mask and scale in the same order.
    result: Tensor = torch.ops.aten.native_dropout_backward(a, mask, scale)
    return result


def _softmax(a: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    result: Tensor = torch.ops.aten._softmax(a, dim, a.dtype != dtype)
    return result


def _cloned(a: Tensor) -> Tensor:
    return a.clone(memory_format=torch.contiguous_format)


def _split(a: Tensor, output: int, size: Any, dim: int) -> Tensor:
    result: Tensor = torch.split(a, size, dim)[output]
    return result


def _sliced(a: Tensor, dim: int, start: int, end: int, step: int) -> Tensor:
    result: Tensor = torch.ops.aten.slice(a, dim, start, end, step)
    return result


def _first_and(read: Callable[[Node, int], tuple[Any, ...]]) -> Callable[[Node, int], tuple[Any, ...]]:
    return lambda node, output: (output, *read(node, output))


def _and_dtype(read: Callable[[Node, int], tuple[Any, ...]]) -> Callable[[Node, int], tuple[Any, ...]]:
    return lambda node, output: (*read(node, output), dtype_of(node))


_POINTWISE = {
    "MulBackward0": Rule(torch.mul, ("self", "other")),
    "DivBackward0": Rule(torch.div, ("self", "other")),
    "AddBackward0": Rule(_add, ("", ""), arguments=_read("alpha")),
    "SubBackward0": Rule(_subtract, ("", ""), arguments=_read("alpha")),
    "MaximumBackward0": Rule(torch.maximum, ("self", "other")),
    "MinimumBackward0": Rule(torch.minimum, ("self", "other")),
    "WhereBackward0": Rule(lambda a, b, condition: torch.where(condition, a, b), ("", ""), ("condition",)),
    "PowBackward0": Rule(torch.pow, ("self",), arguments=_read("exponent")),
    "NegBackward0": Rule(torch.neg),
    "AbsBackward0": Rule(torch.abs, ("self",)),
    "ExpBackward0": Rule(torch.exp),
    "LogBackward0": Rule(torch.log, ("self",)),
    "SinBackward0": Rule(torch.sin, ("self",)),
    "CosBackward0": Rule(torch.cos, ("self",)),
    "SqrtBackward0": Rule(torch.sqrt),
    "RsqrtBackward0": Rule(torch.rsqrt),
    "ReciprocalBackward0": Rule(torch.reciprocal),
    "TanhBackward0": Rule(torch.tanh),
    "SigmoidBackward0": Rule(torch.sigmoid),
    "ReluBackward0": Rule(torch.relu),
    "SiluBackward0": Rule(torch.nn.functional.silu, ("self",)),
    "GeluBackward0": Rule(_gelu, ("self",), arguments=_read("approximate")),
    "EluBackward0": Rule(_elu, ("self",), arguments=_read("alpha", "scale", "input_scale")),
    "MishBackward0": Rule(torch.nn.functional.mish, ("self",)),
    "HardswishBackward0": Rule(torch.nn.functional.hardswish, ("self",)),
    "LeakyReluBackward0": Rule(torch.nn.functional.leaky_relu, ("self",), arguments=_read("negative_slope")),
    "SoftplusBackward0": Rule(torch.nn.functional.softplus, ("self",), arguments=_read("beta", "threshold")),
    "ClampBackward1": Rule(torch.clamp, ("self",), arguments=_read("min", "max")),
    "ClampMinBackward0": Rule(torch.clamp_min, ("self",), arguments=_read("min")),
    "ClampMaxBackward0": Rule(torch.clamp_max, ("self",), arguments=_read("max")),
    "GluBackward0": Rule(torch.nn.functional.glu, ("self",), arguments=_read("dim")),
    "ToCopyBackward0": Rule(_cast, arguments=lambda node, output: (dtype_of(node), node._input_metadata[0].device)),
    "NativeDropoutBackward0": Rule(_dropped, constants=("result1",), arguments=_read("p")),
    "SoftmaxBackward0": Rule(_softmax, arguments=_and_dtype(_read("dim"))),
}

_MOVING = {
    "ViewBackward0": Rule(Tensor.view, arguments=_shape),
    "UnsafeViewBackward0": Rule(Tensor.view, arguments=_shape),
    "ReshapeAliasBackward0": Rule(Tensor.view, arguments=_shape),
    "ExpandBackward0": Rule(Tensor.expand, arguments=_shape),
    "AliasBackward0": Rule(lambda a: a),
    "TBackward0": Rule(torch.t),
    "TransposeBackward0": Rule(torch.transpose, arguments=_read("dim0", "dim1")),
    "PermuteBackward0": Rule(torch.permute, arguments=_read("dims")),
    "UnsqueezeBackward0": Rule(torch.unsqueeze, arguments=_read("dim")),
    "SqueezeBackward1": Rule(torch.squeeze, arguments=_read("dim")),
    "SelectBackward0": Rule(torch.select, arguments=_read("dim", "index")),
    "SliceBackward0": Rule(_sliced, arguments=_read("dim", "start", "end", "step")),
    "SplitBackward0": Rule(_split, arguments=_first_and(_read("split_size", "dim"))),
    "SplitWithSizesBackward0": Rule(_split, arguments=_first_and(_read("split_sizes", "dim"))),
    "UnbindBackward0": Rule(lambda a, output, dim: a.unbind(dim)[output], arguments=_first_and(_read("dim"))),
    "CloneBackward0": Rule(_cloned),
    "RollBackward0": Rule(torch.roll, arguments=_read("shifts", "dims")),
    "RepeatBackward0": Rule(Tensor.repeat, arguments=_read("repeats")),
    "FlipBackward0": Rule(torch.flip, arguments=_read("dims")),
    "CatBackward0": Rule(lambda *a: torch.cat(a[:-1], a[-1]), None, arguments=_read("dim")),
    "StackBackward0": Rule(lambda *a: torch.stack(a[:-1], a[-1]), None, arguments=_read("dim")),
    "IndexBackward0": Rule(lambda a, *indices: torch.ops.aten.index(a, list(indices)), constants=("indices",)),
    "IndexSelectBackward0": Rule(
        lambda a, index, dim: torch.index_select(a, dim, index), constants=("index",), arguments=_read("dim")
    ),
    "GatherBackward0": Rule(
        lambda a, index, dim: torch.gather(a, dim, index), ("self",), ("index",), arguments=_read("dim")
    ),
}

RULES: dict[str, Rule] = _POINTWISE | _MOVING
NORMS = ("NativeLayerNormBackward0", "FusedRmsNormBackward0")


def norm_rule(node: Node, epsilon_of: Callable[[Node], float | None]) -> Rule | None:
    """A rule for one node of a normalisation, which does not save the epsilon it was called with."""
    name = node.name()
    if name not in NORMS or node._raw_saved_weight.data is None:
        return None
    epsilon = epsilon_of(node)
    if epsilon is None:
        return None
    shape = node._saved_normalized_shape
    if name == "FusedRmsNormBackward0":
        return Rule(lambda a, w: torch.nn.functional.rms_norm(a, shape, w, epsilon), ("input", "weight"))
    has_bias = node._raw_saved_bias.data is not None
    tensors = ("input", "weight", "bias") if has_bias else ("input", "weight")
    return Rule(lambda a, w, b=None: torch.nn.functional.layer_norm(a, shape, w, b, epsilon), tensors)
