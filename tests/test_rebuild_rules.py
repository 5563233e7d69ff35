"""Each rule makes the result of its op again, bit for bit, and the names it reads exist."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ckpt_trainer.packed import Rebuilt, unpack
from ckpt_trainer.rebuild import Rebuilding
from ckpt_trainer.rebuild_rules import RULES

MASK = torch.rand(4, 6, 64, generator=torch.Generator().manual_seed(1)) > 0.5
INDEX = torch.tensor([2, 0, 2])

OPS = {
    "MulBackward0": lambda a, b: a * b,
    "DivBackward0": lambda a, b: a / (b + 3),
    "AddBackward0": lambda a, b: torch.add(a, b, alpha=2),
    "SubBackward0": lambda a, b: a - b,
    "MaximumBackward0": torch.maximum,
    "MinimumBackward0": torch.minimum,
    "WhereBackward0": lambda a, b: torch.where(MASK, a, b),
    "PowBackward0": lambda a, b: a.pow(3),
    "NegBackward0": lambda a, b: -a,
    "AbsBackward0": lambda a, b: a.abs(),
    "ExpBackward0": lambda a, b: a.exp(),
    "LogBackward0": lambda a, b: a.log(),
    "SinBackward0": lambda a, b: a.sin(),
    "CosBackward0": lambda a, b: a.cos(),
    "SqrtBackward0": lambda a, b: a.sqrt(),
    "RsqrtBackward0": lambda a, b: a.rsqrt(),
    "ReciprocalBackward0": lambda a, b: a.reciprocal(),
    "TanhBackward0": lambda a, b: a.tanh(),
    "SigmoidBackward0": lambda a, b: a.sigmoid(),
    "ReluBackward0": lambda a, b: a.relu(),
    "SiluBackward0": lambda a, b: F.silu(a),
    "GeluBackward0": lambda a, b: F.gelu(a, approximate="tanh"),
    "EluBackward0": lambda a, b: F.elu(a, 0.7),
    "MishBackward0": lambda a, b: F.mish(a),
    "HardswishBackward0": lambda a, b: F.hardswish(a),
    "LeakyReluBackward0": lambda a, b: F.leaky_relu(a, 0.3),
    "SoftplusBackward0": lambda a, b: F.softplus(a, 2.0, 3.0),
    "ClampBackward1": lambda a, b: a.clamp(0.2, 0.6),
    "ClampMinBackward0": lambda a, b: a.clamp_min(0.4),
    "ClampMaxBackward0": lambda a, b: a.clamp_max(0.4),
    "GluBackward0": lambda a, b: F.glu(a, -1),
    "ToCopyBackward0": lambda a, b: a.to(torch.float16),
    "NativeDropoutBackward0": lambda a, b: torch.native_dropout(a, 0.3, True)[0],
    "SoftmaxBackward0": lambda a, b: F.softmax(a, -1),
    "ViewBackward0": lambda a, b: a.view(24, 64),
    "UnsafeViewBackward0": lambda a, b: torch.ops.aten._unsafe_view(a, (24, 64)),
    "ReshapeAliasBackward0": lambda a, b: torch.ops.aten._reshape_alias(a, (24, 64), (64, 1)),
    "ExpandBackward0": lambda a, b: a[:, :1].expand(4, 6, 64),
    "AliasBackward0": lambda a, b: torch.ops.aten.alias(a),
    "TBackward0": lambda a, b: a[0].t(),
    "TransposeBackward0": lambda a, b: a.transpose(-1, 0),
    "PermuteBackward0": lambda a, b: a.permute(2, 0, 1),
    "UnsqueezeBackward0": lambda a, b: a.unsqueeze(-1),
    "SqueezeBackward1": lambda a, b: a[:, :1].squeeze(1),
    "SelectBackward0": lambda a, b: a.select(-2, -1),
    "SliceBackward0": lambda a, b: a[:, 1:-1:2],
    "SplitBackward0": lambda a, b: a.split(40, -1)[1],
    "SplitWithSizesBackward0": lambda a, b: a.split([20, 44], -1)[1],
    "UnbindBackward0": lambda a, b: a.unbind(1)[3],
    "CloneBackward0": lambda a, b: a.transpose(0, 1).contiguous(),
    "RollBackward0": lambda a, b: a.roll((1, 2), (0, -1)),
    "RepeatBackward0": lambda a, b: a.repeat(2, 1, 1),
    "FlipBackward0": lambda a, b: a.flip(-1),
    "CatBackward0": lambda a, b: torch.cat([a, b, a], -1),
    "StackBackward0": lambda a, b: torch.stack([a, b], -1),
    "IndexBackward0": lambda a, b: a[:, INDEX],
    "IndexSelectBackward0": lambda a, b: a.index_select(1, INDEX),
    "GatherBackward0": lambda a, b: a.gather(1, INDEX.view(1, 3, 1).expand(4, 3, 64)),
}


def packed_result(op, dtype):
    """The result of an op whose inputs are stored, and what stands in its place."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.rand(4, 6, 64, generator=generator).to(dtype).requires_grad_() for _ in range(2)]
    rebuilding = Rebuilding([])
    with torch.autograd.graph.saved_tensors_hooks(rebuilding._pack, unpack):
        a, b = leaves[0] * 1, leaves[1] * 1
        stored = [a.sin(), b.sin()]  # which saves its input, whatever the op itself saves
        result = op(a, b)
        packed = rebuilding._result(result.grad_fn, result.output_nr, 12)
    return result, packed, stored


def test_each_rule_has_a_case():
    assert set(OPS) == set(RULES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("node", OPS)
def test_result_is_made_again(node, dtype):
    result, packed, _ = packed_result(OPS[node], dtype)
    assert result.grad_fn.name() == node
    assert isinstance(packed, Rebuilt)
    made = packed.peek()
    assert made.dtype == result.dtype
    assert torch.equal(made, result)


def norm_of(module, hidden, rebuilding):
    with torch.autograd.graph.saved_tensors_hooks(rebuilding._pack, unpack):
        result = module(hidden * 1)
        return result, rebuilding._result(result.grad_fn, 0, 12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("epsilon", [1e-12, 1e-5, 0.1])
def test_layer_norm_is_made_again_with_its_epsilon(bias, epsilon):
    torch.manual_seed(0)
    module, hidden = nn.LayerNorm(64, epsilon, bias=bias), torch.randn(4, 6, 64, requires_grad=True)
    nn.init.normal_(module.weight)
    result, packed = norm_of(module, hidden, Rebuilding([module]))
    assert torch.equal(packed.peek(), result)


def test_layer_norm_of_unknown_epsilon_is_stored():
    module, hidden = nn.LayerNorm(64), torch.randn(4, 6, 64, requires_grad=True)
    assert norm_of(module, hidden, Rebuilding([]))[1] is None
    assert norm_of(nn.LayerNorm(64, elementwise_affine=False), hidden, Rebuilding([module]))[1] is None


def test_softmax_in_more_bits_is_made_again():
    result, packed, _ = packed_result(lambda a, b: F.softmax(a, -1, dtype=torch.float32), torch.bfloat16)
    assert torch.equal(packed.peek(), result)
