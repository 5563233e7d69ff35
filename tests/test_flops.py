"""Counting operations: exact numbers, nothing changed by counting, what checkpointing adds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from ckpt_trainer.flops import FlopCounter

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
IDS = torch.arange(32).reshape(2, 16)


def small_model(kind):
    torch.manual_seed(0)
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**SIZES)).train()
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(num_key_value_heads=2, num_local_experts=4, **SIZES)).train()
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, use_cache=False, **SIZES)).train()


def step(model):
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def count(function, *args):
    with FlopCounter() as counter:
        function(*args)
    return counter.total


class OpNames(TorchDispatchMode):
    """What runs below the modes above it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class TestFormulas:
    def test_linear(self):
        assert count(nn.Linear(8, 16), torch.ones(4, 8)) == 2 * 4 * 8 * 16
        assert count(nn.Linear(8, 16, bias=False), torch.ones(3, 4, 8)) == 2 * 12 * 8 * 16

    def test_mlp_with_backward(self):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        first, last = 2 * 5 * 8 * 16, 2 * 5 * 16 * 4
        # Two matmuls backward for each forward, but none for the gradient of the input.
        assert count(lambda: model(torch.ones(5, 8)).sum().backward()) == 2 * first + 3 * last

    def test_attention(self):
        query, key, value = (torch.randn(2, 4, length, 8, requires_grad=True) for length in (16, 24, 24))
        one_matmul = 2 * 2 * 4 * 16 * 24 * 8
        with FlopCounter() as counter, OpNames() as ops:
            out = F.scaled_dot_product_attention(query, key, value)
            assert counter.total == 2 * one_matmul
            out.sum().backward()
            assert counter.total == (2 + 5) * one_matmul
        assert "aten._scaled_dot_product_flash_attention_for_cpu.default" in ops.names

    def test_matrix_times_vector(self):
        matrix, vector = torch.ones(8, 16), torch.ones(16)
        assert count(torch.mv, matrix, vector) == 2 * 8 * 16
        assert count(torch.addmv, torch.ones(8), matrix, vector) == 2 * 8 * 16

    def test_convolution(self):
        assert count(nn.Conv2d(3, 8, 4, stride=4), torch.ones(2, 3, 16, 16)) == 2 * 2 * (3 * 4 * 4) * 8 * (4 * 4)

    def test_grouped_matmul(self):
        a = torch.randn(32, 16, requires_grad=True, dtype=torch.bfloat16)
        b = torch.randn(4, 16, 8, requires_grad=True, dtype=torch.bfloat16)
        ends = torch.tensor([8, 8, 24, 32], dtype=torch.int32)
        with FlopCounter() as counter:
            out = F.grouped_mm(a, b, offs=ends)
            assert counter.total == 2 * 32 * 16 * 8
            out.backward(torch.ones_like(out))
            assert counter.total == 3 * 2 * 32 * 16 * 8
        assert count(lambda: F.grouped_mm(b, b.transpose(-2, -1))) == 2 * 4 * 16 * 8 * 16

    def test_grouped_matmul_of_transformers(self):
        pytest.importorskip("transformers.integrations.moe", reason="transformers 4 has a loop instead")
        a, b = torch.randn(32, 16, requires_grad=True), torch.randn(4, 16, 8, requires_grad=True)
        with FlopCounter() as counter:
            out = torch.ops.transformers.grouped_mm_fallback(a, b, torch.tensor([8, 8, 24, 32], dtype=torch.int32))
            assert counter.total == 2 * 32 * 16 * 8
            out.sum().backward()
        assert counter.total == 3 * 2 * 32 * 16 * 8

    def test_experts_of_a_model_count(self):
        expert = 2 * IDS.numel() * 2 * 32 * 48  # 2 experts for a token, one matmul of the three
        with torch.no_grad():
            total = count(lambda: small_model("mixtral")(input_ids=IDS))
            without = count(lambda: small_model("llama")(input_ids=IDS))
            dense = 2 * IDS.numel() * 32 * 48
            router = 2 * IDS.numel() * 32 * 4
        assert total - without == 3 * (3 * expert - 3 * dense + router)


class TestCounter:
    def test_readable_within(self):
        blocks = [nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16)]
        parts, hidden = [], torch.ones(4, 8)
        with FlopCounter() as counter:
            for block in blocks:
                before = counter.total
                hidden = block(hidden)
                parts.append(counter.total - before)
            assert sum(parts) == counter.total
        assert parts == [512, 512, 1024]

    def test_goes_on_when_entered_again(self):
        counter, layer = FlopCounter(), nn.Linear(8, 8)
        for times in (1, 2):
            with counter:
                layer(torch.ones(4, 8))
            layer(torch.ones(4, 8))
            assert counter.total == times * 512

    def test_inference_mode(self):
        layer, x, image = nn.Linear(8, 16), torch.ones(2, 4, 8), torch.randn(1, 3, 7, 9)
        with torch.inference_mode():
            assert count(layer, x) == count(torch.matmul, x, torch.ones(8, 16)) == 2 * 8 * 8 * 16
            plain = F.interpolate(image, size=(17, 23), mode="bilinear")
            with FlopCounter():
                assert torch.equal(F.interpolate(image, size=(17, 23), mode="bilinear"), plain)

    def test_agrees_with_torch_where_torch_knows_all_ops(self):
        model = BertForMaskedLM(BertConfig(**SIZES, attn_implementation="eager")).train()
        with FlopCounterMode(display=False) as reference:
            step(model)
        assert count(step, model) == reference.get_total_flops() > 0

    @pytest.mark.parametrize("checkpointed", [False, True])
    @pytest.mark.parametrize("kind", ["llama", "bert", "mixtral"])
    def test_counting_changes_no_bit_and_no_op(self, kind, checkpointed):
        model = small_model(kind)
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with OpNames() as plain_ops:
            plain = step(model)
        with OpNames() as ops, FlopCounter() as first:
            counted = step(model)
        assert all(torch.equal(a, b) for a, b in zip(plain, counted, strict=True))
        assert ops.names == plain_ops.names
        assert count(step, model) == first.total


class TestCheckpoint:
    """Non-reentrant: recompute costs the forward again, as far as backward needs it."""

    FIRST, LAST = 2 * 5 * 8 * 16, 2 * 5 * 16 * 8

    def run(self, block, *, checkpointed):
        hidden = torch.ones(5, 8, requires_grad=True)
        for _ in range(3):
            hidden = checkpoint(block, hidden, use_reentrant=False) if checkpointed else block(hidden)
        hidden.sum().backward()

    def extra(self, block):
        plain = count(lambda: self.run(block, checkpointed=False))
        assert plain == 3 * 3 * (self.FIRST + self.LAST)
        return count(lambda: self.run(block, checkpointed=True)) - plain

    def test_last_matmul_is_not_run_again(self):
        block = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        assert self.extra(block) == 3 * self.FIRST

    def test_last_matmul_is_run_again_where_its_result_is_saved(self):
        block = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh())
        assert self.extra(block) == 3 * (self.FIRST + self.LAST)

    def test_without_early_stop_the_whole_forward_is(self):
        block = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        with set_checkpoint_early_stop(False):
            assert self.extra(block) == 3 * (self.FIRST + self.LAST)

    def test_llama(self):
        model, tokens = small_model("llama"), IDS.numel()
        with torch.no_grad():
            forward = count(lambda: model(input_ids=IDS))
        plain = count(step, model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        head, down, attention = 2 * tokens * 32 * 64, 2 * tokens * 48 * 32, 2 * 2 * 2 * 16 * 16 * 32
        qkvo = 2 * tokens * 32 * (32 + 16 + 16 + 32)
        # Beside blocks and head only the rotary embedding, in one version a matmul with one column.
        assert 0 <= forward - head - 3 * (3 * down + attention + qkvo) <= 128
        assert count(step, model) - plain == 3 * (2 * down + attention + qkvo)
