"""Names, kinds and places of ops."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ckpt_trainer.ops import kind_of, matches_op, name_of, nearest_names, place_of

aten = torch.ops.aten


@torch.library.custom_op("ckpt_trainer_test::selective_scan_fwd", mutates_args=())
def scan(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("ckpt_trainer_test::selective_scan_bwd", mutates_args=())
def scan_backward(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("ckpt_trainer_test::fp8_gemm", mutates_args=())
def gemm(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("ckpt_trainer_test::dequantize_linear", mutates_args=())
def dequantize(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("ckpt_trainer_test_flash_attn::fwd", mutates_args=())
def fwd(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("ckpt_trainer_test_flash_attn::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor) -> torch.Tensor:
    return x * 2


ours = torch.ops.ckpt_trainer_test
flash = torch.ops.ckpt_trainer_test_flash_attn


@pytest.mark.parametrize(
    ("entry", "op", "matches"),
    [
        ("mm", aten.mm.default, True),
        ("aten.mm", aten.mm.default, True),
        ("aten::mm", aten.mm.default, True),
        ("aten.mm.default", aten.mm.default, True),
        ("aten.mm.dtype", aten.mm.default, False),
        ("mm", aten.addmm.default, False),
        ("*mm", aten.addmm.default, True),
        ("*softmax*", aten._softmax.default, True),
        ("aten.add", aten.add.Tensor, True),
        ("ckpt_trainer_test::fp8_gemm", ours.fp8_gemm.default, True),
        ("ckpt_trainer_test.fp8_gemm", ours.fp8_gemm.default, True),
        ("aten.fp8_gemm", ours.fp8_gemm.default, False),
        ("attention", aten._scaled_dot_product_flash_attention.default, True),
        ("attention", aten._scaled_dot_product_flash_attention_backward.default, False),
        ("attention", aten.mm.default, False),
        ("attention", aten.bmm.default, False),
        ("matmul", aten.bmm.default, True),
        ("matmul", aten.convolution.default, True),
        ("matmul", aten.add.Tensor, False),
        ("half_matmul", aten._flash_attention_forward.default, True),
        ("attention", torch.ops.higher_order.flex_attention, True),
        ("attention", torch.ops.higher_order.flex_attention_backward, False),
        ("flex_attention", torch.ops.higher_order.flex_attention, True),
    ],
)
def test_matches_op(entry, op, matches):
    assert matches_op(entry, op) is matches


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        (ours.selective_scan_fwd.default, "attention"),
        (ours.selective_scan_bwd.default, None),
        (flash.fwd.default, "attention"),
        (flash.rms_norm.default, None),
        (ours.fp8_gemm.default, "matmul"),
        (ours.dequantize_linear.default, None),
        (aten._grouped_mm.default, "matmul"),
        (aten._scaled_mm.default, "matmul"),
        (aten._int_mm.default, "matmul"),
        (aten.convolution.default, "matmul"),
        (aten.convolution_backward.default, None),
        (aten.linear_backward.default, None),
        (aten.bmm.default, "batched"),
        (aten.topk.default, "choice"),
        (aten._unsafe_view.default, "unsafe view"),
        (aten.upsample_linear1d.default, None),
        (aten._fused_sdp_choice.default, None),
    ],
)
def test_kind_of(op, kind):
    assert kind_of(op) == kind


def test_name_of():
    assert name_of(aten.mm.default) == "mm"
    assert name_of(ours.fp8_gemm.default) == "ckpt_trainer_test::fp8_gemm"
    assert name_of(torch.ops.higher_order.flex_attention) == "higher_order::flex_attention"


def test_nearest_names():
    assert nearest_names("aten.addm", ["addmm", "relu", "addmm"]) == ["addmm"]
    assert nearest_names("zzz", ["addmm"]) == []


class Places(TorchDispatchMode):
    def __init__(self, forward):
        super().__init__()
        self.forward, self.places = forward, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if kind_of(func) == "matmul":
            self.places.append(place_of(self.forward))
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.last = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x, experts=(0, 1, 2)):
        x = self.first(self.second(x))
        for index in experts:
            x = self.experts[index](x)
        return self.last(x)


def places(block, *args):
    with Places(Block.forward.__code__) as mode:
        block(torch.ones(2, 4), *args)
    return mode.places


def test_places_tell_modules_apart_whatever_ran_before():
    block = Block()
    second, first, *experts, last, also_last = places(block)
    assert first != second
    assert len(set(experts)) == 1
    assert len({first, second, experts[0], last}) == 4
    assert last == also_last
    assert [place[0] for place in (first, experts[0], last)] == [0, 0, 1]
    (fewer,) = (places(block, (2,)),)
    assert fewer == [second, first, experts[0], last, last]


def test_a_place_ends_at_the_block_and_ignores_hooks():
    block = Block()
    expected = places(block)

    def deeper(depth):
        return places(block) if depth == 0 else deeper(depth - 1)

    block.first.register_forward_hook(lambda *args: None)
    assert deeper(3) == expected
