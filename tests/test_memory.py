"""Counting bytes: sizes as text, what backward holds, what is alive in a step."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from ckpt_trainer import memory
from ckpt_trainer.flops import FlopCounter
from ckpt_trainer.memory import (
    LiveBytes,
    SavedBytes,
    current_bytes,
    format_bytes,
    host_bytes,
    host_peak_bytes,
    parse_bytes,
    peak_bytes,
    reset_peak,
    storages_of,
)

KB = 4096  # a float32 tensor of 1024 elements


def tensor(num_kb=1, **options):
    return torch.ones(num_kb * 1024, **options)


def linear_chain(num=3):
    return nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(num)))


def rows(**options):
    return torch.ones(32, 32, **options)  # 4 KB, as much as the weight of a linear layer of the chain


def small_model(kind):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "vocab_size": 64}
    torch.manual_seed(0)
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**sizes)).train()
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, use_cache=False, **sizes)).train()


def step(model):
    """One forward and backward: the loss and all gradients."""
    torch.manual_seed(1)
    ids = torch.arange(32).reshape(2, 16)
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


class TestText:
    @pytest.mark.parametrize(
        ("n", "text"),
        [
            (0, "0 B"),
            (512, "512 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (2**20 - 1, "1.00 MiB"),
            (12.3 * 2**20, "12.3 MiB"),
            (999 * 2**20, "999 MiB"),
            (3 * 2**29, "1.50 GiB"),
            (9.999 * 2**30, "10.0 GiB"),
            (5000 * 2**40, "5000 TiB"),
            (-3 * 2**29, "-1.50 GiB"),
        ],
    )
    def test_format(self, n, text):
        assert format_bytes(int(n)) == text

    @pytest.mark.parametrize(
        ("text", "n"),
        [
            (12, 12),
            ("1024", 1024),
            ("7B", 7),
            ("20GiB", 20 * 2**30),
            (" 20 gib ", 20 * 2**30),
            ("1.5MiB", 3 * 2**19),
            ("512MB", 512 * 10**6),
            ("0.1 GB", 10**8),
            ("1.1KiB", 1126),
            ("2TiB", 2**41),
        ],
    )
    def test_parse(self, text, n):
        assert parse_bytes(text) == n

    @pytest.mark.parametrize("text", ["", "0.8", "0.8 B", 0.8, -1, "-1GiB", "20G", "20 GiBs", "1e9", "GiB", True, None])
    def test_parse_refuses(self, text):
        with pytest.raises(ValueError, match=r"is not a size.*'20GiB'") as error:
            parse_bytes(text)
        assert repr(text) in str(error.value)

    @pytest.mark.parametrize("n", [0, 512, 2**20, 3 * 2**29, 2**42])
    def test_round_trip(self, n):
        assert parse_bytes(format_bytes(n)) == n


class TestDevice:
    def test_no_allocator_counts_on_cpu(self):
        for device in ("cpu", "meta", torch.device("cpu")):
            assert peak_bytes(device) is None
            assert current_bytes(device) is None
            reset_peak(device)

    def test_an_accelerator_that_counts(self, monkeypatch):
        was_reset = []
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
        monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 7)
        monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda device: 5)
        monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", was_reset.append)
        assert (peak_bytes("xpu:0"), current_bytes("xpu")) == (7, 5)
        assert peak_bytes("cpu") is peak_bytes("cuda") is None
        reset_peak("xpu:1")
        reset_peak("cpu")
        assert was_reset == ["xpu:1"]

    def test_an_accelerator_that_does_not_count(self, monkeypatch):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
        assert peak_bytes("mps") is None

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
    def test_real_accelerator(self):
        device = torch.accelerator.current_accelerator()
        before = current_bytes(device)
        reset_peak(device)
        held = tensor(1024, device=device)
        del held
        assert current_bytes(device) == before
        assert peak_bytes(device) == before + 1024 * KB


class TestHost:
    def test_resident_bytes_follow_an_allocation(self):
        before, size = host_bytes(), 64 * 2**20
        block = bytearray(b"x") * size
        assert before + 0.9 * size < host_bytes() <= host_peak_bytes()
        del block
        assert host_bytes() < host_peak_bytes() - 0.5 * size

    def test_peak_is_not_what_a_parent_had(self, monkeypatch):
        inherited = SimpleNamespace(ru_maxrss=2**60)
        monkeypatch.setattr(memory.resource, "getrusage", lambda who: inherited)
        assert host_bytes() <= host_peak_bytes() < 2**50

    def test_without_proc(self, monkeypatch):
        truth, true_peak = host_bytes(), host_peak_bytes()
        monkeypatch.setattr(memory, "_read_proc_status", lambda field: None)
        assert host_peak_bytes() == pytest.approx(true_peak, rel=0.05)
        fake = SimpleNamespace(Process=lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=3, peak_wset=4)))
        monkeypatch.setattr(memory, "psutil", fake)
        assert host_bytes() == 3 != truth
        monkeypatch.setattr(memory, "resource", None)
        assert host_peak_bytes() == 4
        monkeypatch.setattr(memory, "psutil", None)
        assert host_bytes() is host_peak_bytes() is None


class TestSavedBytes:
    def test_linear_chain(self):
        model = linear_chain()
        with SavedBytes(model) as saved:
            out = model(rows())
            assert (saved.bytes, saved.num_tensors) == (3 * KB, 3)  # the input of each layer
        out.sum().backward()
        assert (saved.bytes, saved.num_tensors) == (0, 0)

    def test_parameters_count_unless_excluded(self):
        model = linear_chain()
        with SavedBytes() as saved:
            out = model(rows(requires_grad=True))
        assert saved.bytes == 6 * KB
        with SavedBytes(model[0], model[1].weight) as saved:
            out = model(rows(requires_grad=True))
        assert saved.bytes == 4 * KB
        del out

    def test_a_storage_counts_once_and_whole(self):
        x, weight = tensor(8), tensor(2, requires_grad=True)
        with SavedBytes(weight) as saved:
            out = weight * x[: 2 * 1024] + weight * x[2048:4096] + weight * x.view(4, 2048)[3]
        assert (saved.bytes, saved.num_tensors) == (8 * KB, 3)
        del out

    def test_dropped_graph_holds_nothing(self):
        x = tensor(requires_grad=True)
        gc.disable()
        try:
            with SavedBytes(x) as saved:
                y = x.exp().tanh()  # both save their own result
                assert saved.bytes == 2 * KB
                del y
                assert saved.bytes == 0
        finally:
            gc.enable()

    def test_no_tensor_lives_longer(self):
        x = tensor(requires_grad=True)
        with LiveBytes() as live, SavedBytes(x) as saved:
            y = (x * 2).exp().sum()
            assert live.current == KB + 4
            y.backward(torch.ones(()))
            assert live.current == KB + 4  # the gradient of x, y
        assert saved.bytes == 0

    def test_addresses_are_used_again(self):
        x = tensor(requires_grad=True)
        with SavedBytes(x) as saved:
            for _ in range(50):
                y = x * tensor()
                assert saved.bytes == KB
        del y

    def test_size_is_that_of_now(self):
        x, other = tensor(requires_grad=True), tensor()
        with SavedBytes() as saved:
            y = x * other
        other.untyped_storage().resize_(0)
        assert saved.bytes == 0
        del y

    def test_checkpoint_holds_inputs_only(self):
        model = linear_chain(6)
        x = rows(requires_grad=True)
        with SavedBytes(model) as plain:
            out = model(x)
        assert plain.bytes == 6 * KB
        with SavedBytes(model) as saved:
            hidden = x
            for pair in (model[:2], model[2:4], model[4:]):
                hidden = checkpoint(pair, hidden, use_reentrant=False)
            assert (saved.bytes, saved.num_tensors) == (3 * KB, 3)
            hidden.sum().backward()
            assert saved.bytes == 0
        del out

    def test_in_place_change_is_still_an_error(self):
        x = tensor(requires_grad=True)
        with SavedBytes():
            y = x.exp()
            z = y * 2
            y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward() or y.sum().backward()

    def test_double_backward(self):
        x = torch.tensor(3.0, requires_grad=True)
        with SavedBytes():
            (first,) = torch.autograd.grad(x**3, x, create_graph=True)
        first.backward()
        assert x.grad == 18


class TestLiveBytes:
    def test_known_sequence(self):
        with LiveBytes() as live:
            a = tensor(2)
            b = a + a
            assert (live.current, live.peak) == (4 * KB, 4 * KB)
            del a
            assert live.current == 2 * KB
            c = torch.cat([b, b, b])
            assert (live.current, live.peak) == (8 * KB, 8 * KB)
            del b
            b = tensor(1)
            assert (live.current, live.peak) == (7 * KB, 8 * KB)
            live.reset_peak()
            assert live.peak == 7 * KB
        d = tensor(9)
        assert (live.current, live.peak) == (7 * KB, 7 * KB)
        del b, c, d
        assert live.current == 0

    def test_views_make_nothing_and_outlive_their_base(self):
        with LiveBytes() as live:
            base = tensor(4)
            view = base.view(4, 1024)[1].detach()
            del base
            gc.collect()
            assert live.current == 4 * KB
            base = view.add_(1)
            assert live.current == live.peak == 4 * KB
            del view, base
            assert live.current == 0

    def test_what_was_there_before_does_not_count(self):
        before, parameter = tensor(4), nn.Parameter(rows())
        with LiveBytes() as live:
            view, transposed = before[:1024], parameter.t()
            assert live.current == live.peak == 0
            out = before + 1
            assert live.current == 4 * KB
        del view, transposed, before, out
        assert live.current == 0

    def test_baseline(self):
        model, extra = linear_chain(), tensor(5)
        model.register_buffer("mask", tensor())
        model(rows()).sum().backward()
        with LiveBytes(model, extra) as live:
            assert live.current == live.peak == (3 + 3 + 1 + 5) * KB
            model.zero_grad(set_to_none=True)
            del extra
            assert live.current == 4 * KB

    def test_memory_made_without_an_op(self):
        with LiveBytes() as live:
            numbers = torch.tensor([1.0, 2.0])
            assert live.current == 8
        del numbers
        assert live.current == 0

    def test_resize(self):
        before = tensor(2)
        with LiveBytes() as live:
            x = tensor()
            x.resize_(3 * 1024)
            assert live.current == 3 * KB
            out = torch.empty(0)
            torch.add(x, x, out=out)
            assert live.current == 6 * KB
            out.untyped_storage().resize_(0)
            assert live.current == 6 * KB  # nobody told
            out.detach()
            assert live.current == 3 * KB
            before.resize_(4 * 1024)
            before.detach()
            assert live.current == 3 * KB
            out.set_()
            assert live.current == live.peak - 3 * KB

    def test_held_by_autograd_alone(self):
        x = tensor(requires_grad=True)
        with LiveBytes() as live:
            y = (x * 3).exp().sum()  # of the product nothing is left, exp keeps its result
            assert live.current == KB + 4
            assert live.peak == 2 * KB
            del y
            assert live.current == 0

    def test_addresses_are_used_again(self):
        with LiveBytes() as live:
            for num_kb in (3, 1, 2) * 20:
                x = tensor(num_kb)
                assert live.current == num_kb * KB
                del x
                assert live.current == 0

    def test_forward_and_backward_of_a_chain(self):
        model, x = linear_chain(4), rows()
        with LiveBytes() as live:
            out = model(x)
            assert live.current == live.peak == 4 * KB  # three inputs and the output, x was there before
            out.backward(x)
            del out
            assert live.current == 4 * KB  # gradients

    def test_checkpoint(self):
        model, x = linear_chain(4), rows(requires_grad=True)
        with LiveBytes() as live:
            out = checkpoint(model, x, use_reentrant=False)
            assert live.current == KB
            assert live.peak == 2 * KB
            live.reset_peak()
            out.backward(x.detach())
            # In the third layer: the output, two rebuilt inputs, the gradient that comes, the one that goes, two weights'.
            assert live.peak == 7 * KB
            assert live.current == 6 * KB

    def test_nested_modes(self):
        with LiveBytes() as outer:
            x = tensor()
            with FlopCounter(), LiveBytes() as inner:
                y = x * 2
                assert (outer.current, inner.current) == (2 * KB, KB)
        del x, y
        assert outer.current == inner.current == 0

    def test_fake_tensors(self):
        with torch._subclasses.FakeTensorMode(), LiveBytes() as live:
            x = torch.empty(2**40, dtype=torch.uint8)
            y = x[1:].view(-1) + 1
            assert live.current == 2**41 - 1
            del x, y
            assert live.current == 0

    def test_tensors_that_wrap_others(self):
        from torch.testing._internal.two_tensor import TwoTensor

        with LiveBytes() as live:
            pair = TwoTensor(tensor(), tensor())
            pair = pair + pair
            assert live.current == 2 * KB
        with SavedBytes() as saved:
            out = pair * tensor(requires_grad=True)
        assert saved.bytes == 2 * KB
        del out

    def test_sparse_gradient(self):
        table = nn.Embedding(1024, 1, sparse=True)
        with LiveBytes() as live:
            table(torch.zeros(2, dtype=torch.int64)).sum().backward()
            assert table.weight.grad.layout is torch.sparse_coo
        assert live.current > 0

    @pytest.mark.parametrize("kind", ["llama", "bert"])
    def test_agrees_with_the_allocator(self, kind):
        model = small_model(kind)
        step(model)
        model.zero_grad(set_to_none=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step(model)
        model.zero_grad(set_to_none=True)
        now = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        with LiveBytes() as live:
            step(model)
        assert live.peak == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_counting_changes_no_bit(kind, checkpointed):
    model = small_model(kind)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plain = step(model)
    peaks = []
    for contexts in ([], [], [SavedBytes(model)], [FlopCounter()], [SavedBytes(model), FlopCounter()]):
        model.zero_grad(set_to_none=True)
        with LiveBytes() as live, ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            counted = step(model)
        assert all(torch.equal(a, b) for a, b in zip(plain, counted, strict=True))
        del counted
        peaks.append(live.peak)
    assert len(set(peaks)) == 1, "counting is repeatable and costs no memory"


def test_storage_of_a_sharded_tensor_is_that_of_its_local_part(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        local = torch.ones(4, 8)
        sharded = DTensor.from_local(local, mesh, [Shard(0)])
        assert [storage._cdata for storage in storages_of(sharded)] == [local.untyped_storage()._cdata]
    finally:
        torch.distributed.destroy_process_group()
