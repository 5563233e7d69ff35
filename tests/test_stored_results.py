"""Results of chosen ops are stored in a forward and given back in its replays: exactly, and only those that help."""

import gc
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError, checkpoint

from ckpt_trainer.flops import FlopCounter
from ckpt_trainer.memory import LiveBytes
from ckpt_trainer.stored_results import StoredResults

TIERS = ["attention", "matmul", "half_matmul"]


class Ops(TorchDispatchMode):
    """Counts the ops that really run."""

    def __enter__(self):
        self.ran = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Runner:
    """A block under torch's checkpoint with stored results."""

    def __init__(self, block, *save):
        self.block, self.calls = block, []
        self.stored = StoredResults(block, "layers.0", save)

    def __call__(self, *args, **kwargs):
        call = self.stored.call()
        self.calls.append(call)

        def contexts():
            return call.storing(), call.reusing()

        return checkpoint(self.block, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def gradients(run, block, *args, times=1):
    torch.manual_seed(0)
    block.zero_grad()
    inputs = [arg.detach().requires_grad_() if torch.is_tensor(arg) else arg for arg in args]
    out = run(*inputs)
    out = out if torch.is_tensor(out) else out[0]
    for _ in range(times - 1):
        out.square().sum().backward(retain_graph=True)
    out.square().sum().backward()
    after = torch.rand(1)
    return [out.detach(), after, *(i.grad for i in inputs if torch.is_tensor(i)), *(p.grad for p in block.parameters())]


def same(left, right):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(left, right, strict=True))


def assert_exact(block, save, *args, calls=3, times=1):
    """The block gives the same with stored results, in several calls; returns what ran them."""
    expected = gradients(block, block, *args, times=times)
    run = Runner(block, *save)
    for _ in range(calls):
        assert same(gradients(run, block, *args, times=times), expected)
    return run


class Layer(nn.Module):
    """Pre-norm decoder layer with a gated MLP; linear layers without bias, as in Llama."""

    def __init__(self, dropout=0.0, width=8):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, 16, bias=False), nn.Linear(width, 16, bias=False)
        self.down = nn.Linear(16, width, bias=False)
        self.dropout = dropout

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (z.unflatten(-1, (2, -1)).transpose(1, 2) for z in (self.q(y), self.k(y), self.v(y)))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        x = x + F.dropout(self.o(y.transpose(1, 2).flatten(2)), self.dropout)
        y = self.norm2(x)
        return x + F.dropout(self.down(F.silu(self.gate(y)) * self.up(y)), self.dropout)


class Wrapped(nn.Module):
    """A block made of a function, with one weight."""

    def __init__(self, function, width=8):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.function = function

    def forward(self, *args):
        return self.function(self, *args)


def x_(*shape):
    return torch.randn(*(shape or (2, 6, 8)), generator=torch.Generator().manual_seed(1))


def counted(run, block, *args):
    """Ops of the forward and of the backward."""
    inputs = [arg.detach().requires_grad_() for arg in args]
    with Ops() as forward:
        out = run(*inputs)
    with Ops() as backward:
        out.square().sum().backward()
    return forward.ran, backward.ran


@pytest.mark.parametrize("save", [*([tier] for tier in TIERS), ["mm", "*softmax*"], ["*"], []], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("times", [1, 3])
def test_gradients_are_the_same(save, dropout, dtype, times):
    torch.manual_seed(0)
    assert_exact(Layer(dropout).to(dtype), save, x_().to(dtype), times=times)


# 7 matmuls and attention; the last matmul is never needed. A backward has two matmuls for each.
@pytest.mark.parametrize(
    ("save", "mm", "attention"), [([], 6, 1), (["attention"], 6, 0), (["matmul"], 0, 0), (["half_matmul"], 3, 0)]
)
def test_stored_ops_do_not_run_again(save, mm, attention):
    block = Layer()
    run = Runner(block, *save)
    plain = counted(block, block, x_())[1]
    for _ in range(3):
        backward = counted(run, block, x_())[1]
        assert backward["mm"] == plain["mm"] + mm
        assert backward["_scaled_dot_product_flash_attention_for_cpu"] == attention


def test_what_no_replay_needs_is_stored_once_only():
    block = Layer()
    run = Runner(block, "matmul")
    elements = 2 * 6 * 8
    attention = elements * 4 + 2 * 2 * 6 * 4  # results, and a sum for each row of scores
    for last in (1, 0, 0):
        loss = run(x_().requires_grad_()).square().sum()
        assert run.calls[-1].bytes == 4 * elements * (4 + 2 + 2 + last) + attention
        loss.backward()
        assert run.calls[-1].bytes == 0


def test_half_is_every_second_place_and_stays_so():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8, bias=False) for _ in range(4))

        def forward(self, x, skip):
            x = torch.tanh(self.a(x))
            x = x if skip else torch.tanh(self.b(x))
            return torch.tanh(self.d(torch.tanh(self.c(x))))

    block = Branches()
    run = Runner(block, "half_matmul")
    one = 2 * 6 * 8 * 4
    for skip, size in ((False, 2 * one), (True, 2 * one), (False, 2 * one)):
        x = x_().requires_grad_()
        loss = run(x, skip).sum()
        # a and c are stored with b or without it; counted by turn it would be a and d.
        assert run.calls[-1].bytes == size
        with Ops() as ops:
            loss.backward()
        assert ops.ran["mm"] == (6 if skip else 8) + (1 if skip else 2)


def test_experts_in_a_list_are_one_place():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))
            self.gate = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))
            self.down = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))

        def forward(self, x, chosen):
            return sum(self.down[i](torch.tanh(self.up[i](x)) * self.gate[i](x)).square() for i in chosen)

    run = Runner(Experts(), "half_matmul")
    for chosen in ((0, 1, 2), (3,), (2, 0, 1, 3)):
        loss = run(x_(2, 8).requires_grad_(), chosen).sum()
        assert run.calls[-1].bytes == len(chosen) * 2 * (2 * 8 * 4)
        loss.backward()


def test_layers_of_a_sequential_take_turns():
    block = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh()) for _ in range(4)))
    run = Runner(block, "half_matmul")
    run(x_(2, 8).requires_grad_()).sum()
    assert run.calls[-1].bytes == 2 * 2 * 8 * 4


def composed(scale):
    def attend(block, x):
        q, k = block.linear(x), x.sin()
        return x + torch.softmax(q @ k.transpose(1, 2) * scale, -1) @ q

    return attend


def test_attention_made_of_matmuls_stores_the_result_not_the_scores():
    block = Wrapped(composed(0.5))
    run = assert_exact(block, ["attention"], x_(2, 20, 8), calls=1)
    assert run.stored.matched == {"attention"}
    run(x_(2, 20, 8).requires_grad_())
    # Nothing: a sum follows, so the result is needed by no replay. In the first call it is stored.
    assert run.calls[-1].bytes == 0
    run = Runner(block, "attention")
    run(x_(2, 20, 8).requires_grad_())
    assert run.calls[-1].bytes == 2 * 20 * 8 * 4


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_batch_of_weights_is_no_attention(dtype):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x):
            return torch.bmm(x, self.weight.transpose(1, 2)).tanh()

    for save, size in ((["attention"], 0), (["matmul"], 1), (["half_matmul"], 1)):
        run = Runner(Experts(), *save)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            run(x_(3, 5, 8).requires_grad_())
        assert run.calls[-1].bytes == size * 3 * 5 * 8 * (2 if dtype else 4)
        assert run.stored.matched == ({save[0]} if size else set())


class Router(nn.Module):
    """Top-k routing that scales the weights in place, as Mixtral's does."""

    def __init__(self):
        super().__init__()
        self.gate, self.expert = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        weight, index = self.gate(x).softmax(-1).topk(2)
        weight /= weight.sum(-1, keepdim=True)
        return (self.expert(x).gather(-1, index) * weight).tanh()


@pytest.mark.parametrize("save", [*([tier] for tier in TIERS), ["mm"]], ids=str)
@pytest.mark.parametrize("times", [1, 3])
def test_the_choice_of_a_router_is_always_stored(save, times):
    block = Router()
    run = assert_exact(block, save, x_(), times=times)
    for _ in range(2):
        assert counted(run, block, x_())[1]["topk"] == 0
    assert run.stored.fallback is None


def test_routing_cannot_drift():
    block = Router()
    expected = gradients(block, block, x_())
    run = Runner(block, "attention")
    torch.manual_seed(0)
    out = run(x_().requires_grad_())
    kept = block.gate.bias.detach().clone()
    # As a kernel that is not deterministic would do it.
    block.gate.bias.data = torch.tensor([9.0, 0.0, -9.0, 0.0])
    block.zero_grad()
    out.square().sum().backward()
    block.gate.bias.data = kept
    # The expert's gradient depends on which were chosen and on the weights, which were stored before they were scaled.
    assert torch.equal(block.expert.weight.grad, expected[-2])


def test_random_numbers_after_a_stored_op_are_the_same():
    def forward(block, x):
        return F.dropout(noisy(block.linear(x)).tanh(), 0.5) * F.dropout(x.sin(), 0.5)

    run = assert_exact(Wrapped(forward), ["ckpt_trainer_test_stored::noisy"], x_(), times=2)
    assert NOISE.calls == 1 + 3  # plain and three forwards; none in the six replays
    assert run.stored.matched == {"ckpt_trainer_test_stored::noisy"}


def test_random_numbers_after_a_stored_op_of_torch_are_the_same():
    def forward(block, x):
        return x + F.dropout(torch.native_dropout(block.linear(x), 0.5, True)[0].tanh(), 0.5)

    block = Wrapped(forward)
    run = assert_exact(block, ["native_dropout"], x_(), times=2)
    assert counted(run, block, x_())[1]["native_dropout"] == 0


class NOISE:
    calls = 0


@torch.library.custom_op("ckpt_trainer_test_stored::noisy", mutates_args=())
def noisy(x: torch.Tensor) -> torch.Tensor:
    NOISE.calls += 1
    return x * torch.rand(x.shape)


noisy.register_autograd(lambda context, grad: grad)


def test_generators_are_left_alone_where_nobody_restores_them():
    block = Wrapped(lambda self, x: noisy(self.linear(x)).tanh())
    run = Runner(block, "ckpt_trainer_test_stored::noisy")
    torch.manual_seed(0)
    out = run(x_().requires_grad_(), preserve_rng_state=False)
    torch.rand(3)
    expected = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), expected)


def add_in_place(view):
    def forward(block, x):
        y = view(block.linear(x))
        y += x
        y.mul_(2)
        return y.tanh()

    return forward


@pytest.mark.parametrize(
    "view", [lambda y: y, lambda y: y[:, 1:5].mul_(3) is y or y, torch.detach], ids=["itself", "written", "detached"]
)
@pytest.mark.parametrize("save", [["matmul"], ["*"]], ids=str)
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("shape", [(2, 6, 8), (6, 8)])
def test_in_place_in_the_block(view, save, times, shape):
    block = Wrapped(add_in_place(view if len(shape) == 3 else lambda y: y))
    run = assert_exact(block, save, x_(*shape), times=times)
    assert run.stored.fallback is None
    assert counted(run, block, x_(*shape))[1]["mm"] == 2 * (view is not torch.detach or len(shape) == 2)


@pytest.mark.parametrize("written", [False, True])
def test_a_change_that_no_op_shows(written):
    def forward(block, x):
        y = block.linear(x).sin() + block.linear(x.cos())
        z = block.linear(y)
        if z.dim() == 2:
            z.detach().numpy()[0] = 3.0
            torch.autograd.graph.increment_version(z)
            if written:
                z += x
        return z.tanh()

    block = Wrapped(forward)
    run = assert_exact(block, ["matmul"], x_(6, 8))
    assert "changes the result of mm" in run.stored.fallback
    assert "'layers.0'" in run.stored.fallback
    run.stored.fallback = None
    assert counted(run, block, x_(6, 8))[1]["mm"] == 6 + 1
    assert run.stored.fallback is None  # from then on it is not even stored


@pytest.mark.parametrize("shape", [(2, 6, 8), (6, 8)])
def test_in_place_after_the_block_raises(shape):
    def forward(block, x):
        y = block.linear(x)
        return y, y.sigmoid()

    run = Runner(Wrapped(forward), "mm")
    y, loss = run(x_(*shape).requires_grad_())
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.* mm .*'layers.0'"):
        loss.sum().backward()


def test_in_place_in_a_replay_only_leaves_what_is_stored():
    replays = []

    def forward(block, x):
        y = block.linear(x)
        if len(replays) == 1:
            y.data.view(-1)[:3].zero_()
            torch.ops.aten.mul_(y.detach(), 1.0)
        return y.sigmoid()

    block = Wrapped(forward)
    run = Runner(block, "mm")
    loss = run(x_(6, 8).requires_grad_()).sum()
    found = []
    for step in range(3):
        replays[:] = [None] * step
        block.zero_grad()
        loss.backward(retain_graph=True)
        found.append(block.linear.weight.grad)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_views_and_arguments_are_never_stored():
    def forward(block, x):
        y = x.view(-1, 8).t().t().expand(12, 8).detach() + x.flatten(0, 1)
        return y.relu_().tanh()

    run = Runner(Wrapped(forward), "view", "t", "expand", "detach", "relu_", "*view*")
    run(x_().requires_grad_()).sum()
    assert run.calls[-1].bytes == 0
    assert run.stored.matched >= {"view", "t", "expand", "detach", "relu_"}


LIBRARY = torch.library.Library("ckpt_trainer_test_stored", "FRAGMENT")
LIBRARY.define("attention_fwd(Tensor q, Tensor(a!)? out=None) -> Tensor")
LIBRARY.impl("attention_fwd", lambda q, out=None: q * 2 if out is None else out.copy_(q * 2).clone(), "CPU")
LIBRARY.define("attention_same(Tensor q) -> Tensor")
LIBRARY.impl("attention_same", lambda q: q, "CPU")


@pytest.mark.parametrize(("name", "stored"), [("fwd", 1), ("fwd with out", 0), ("same", 0)])
def test_kernels_that_write_or_return_an_argument(name, stored):
    def forward(block, x):
        y = block.linear(x)
        with torch.no_grad():
            if name == "same":
                z = torch.ops.ckpt_trainer_test_stored.attention_same(y)
            else:
                out = (torch.empty_like(y),) if name == "fwd with out" else ()
                z = torch.ops.ckpt_trainer_test_stored.attention_fwd(y, *out)
                z = z + sum(out)
        return (y * z).sin()

    block = Wrapped(forward)
    run = assert_exact(block, ["attention"], x_())
    run(x_().requires_grad_())
    assert run.calls[-1].bytes == stored * 2 * 6 * 8 * 4


def test_branches_that_change_in_between():
    flags = {"extra": True}

    def forward(block, x):
        if flags["extra"]:
            flags["extra"] = False
            with torch.no_grad():
                block.linear(x + 1)  # to fill a cache, once
        return block.linear(x).tanh()

    block = Wrapped(forward)
    flags["extra"] = False
    expected = gradients(block, block, x_())
    flags["extra"] = True
    assert same(gradients(Runner(block, "matmul"), block, x_()), expected)


def test_a_replay_that_takes_another_way_teaches_nothing():
    flags = [True]

    def forward(block, x):
        ways = (
            lambda: block.linear(x),
            lambda: block.linear(x),
        )
        return ways[flags[0]]().tanh()

    run = Runner(Wrapped(forward), "matmul")
    loss = run(x_().requires_grad_()).sum()
    flags[0] = False
    loss.backward()
    flags[0] = True
    run(x_().requires_grad_())
    assert run.calls[-1].bytes == 2 * 6 * 8 * 4


def test_another_shape_in_the_replay_is_an_error():
    sizes = [4]
    run = Runner(Wrapped(lambda block, x: block.linear(x[: sizes[0]]).tanh()), "mm")
    loss = run(x_(6, 8).requires_grad_()).sum()
    sizes[0] = 5
    with pytest.raises(CheckpointError, match=r"'layers.0': mm .*\[5, 8\] float32.* in the forward \[4, 8\] float32"):
        loss.backward()


def test_double_backward():
    block = Layer()

    def second(run):
        x = x_().double().requires_grad_()
        (grad,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, block.gate.weight, block.up.weight, block.norm.weight])

    block.double()
    # Attention of the CPU has no second derivative; it is chosen among the other ops.
    block.forward = lambda x: x + block.down(F.silu(block.gate(block.norm(x))) * block.up(x))
    expected = second(block.forward)
    for save in (["matmul"], ["*"]):
        assert same(second(Runner(block, *save)), expected)


def test_partial_backwards_compute_again_what_was_released():
    block = Layer()
    x = x_().requires_grad_()
    expected = torch.autograd.grad(block(x).sum(), [x, block.q.weight])
    run = Runner(block, "matmul")
    loss = run(x).sum()
    (found,) = torch.autograd.grad(loss, [x], retain_graph=True)
    assert torch.equal(found, expected[0])
    assert run.calls[-1].bytes > 0
    (found,) = torch.autograd.grad(loss, [block.q.weight])
    assert torch.equal(found, expected[1])


def test_interleaved_calls():
    block = Layer(0.3)
    run = Runner(block, "matmul")
    expected = [gradients(block, block, x_() * scale) for scale in (1, 2)]
    torch.manual_seed(0)
    first = run(a := x_().requires_grad_())
    torch.manual_seed(0)
    second = run(b := (x_() * 2).requires_grad_())
    block.zero_grad()
    second.square().sum().backward()
    assert same([b.grad, *(p.grad for p in block.parameters())], expected[1][2:])
    block.zero_grad()
    first.square().sum().backward()
    assert same([a.grad, *(p.grad for p in block.parameters())], expected[0][2:])


def test_a_block_within_a_block():
    inner = Runner(Layer(0.2), "matmul")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner.block
            self.last = nn.Linear(8, 8)

        def forward(self, x, run=None):
            return self.last((run or inner.block)(x)).tanh()

    block = Outer()
    expected = gradients(block, block, x_())
    outer = Runner(block, "attention", "addmm")
    for _ in range(2):
        assert same(gradients(lambda x: outer(x, inner), block, x_()), expected)


def test_nothing_is_left_of_a_dropped_graph():
    block = Layer()
    run = Runner(block, "matmul")
    with LiveBytes() as live:
        before = live.current
        out = run(x_().requires_grad_())
        assert live.current > before + run.calls[-1].bytes > before
        run.calls.clear()
        del out
        gc.collect()
        assert live.current == before


def test_a_replay_leaves_nothing_with_what_is_stored():
    block = Layer()
    run = Runner(block, "matmul")
    run(x_().requires_grad_()).sum().backward()
    with LiveBytes(block) as live:
        loss = run(x_().requires_grad_()).sum()
        found = [live.current]
        for _ in range(3):
            torch.autograd.grad(loss, list(block.parameters()), retain_graph=True)
            found.append(live.current)
    assert len(set(found)) == 1


def test_counters_around_see_what_runs():
    block = Layer()
    for save in (["matmul"], []):
        run = Runner(block, *save)
        for _ in range(2):
            with FlopCounter() as flops, LiveBytes() as live:
                run(x_().requires_grad_()).sum().backward()
            if save:
                stored = flops.total, live.peak
    with FlopCounter() as plain:
        block(x_().requires_grad_()).sum().backward()
    assert stored[0] == plain.total < flops.total


def test_a_counter_within_the_block():
    def forward(block, x):
        with FlopCounter():
            return block.linear(x).tanh()

    assert_exact(Wrapped(forward), ["matmul"], x_())


def test_fake_tensors():
    with FakeTensorMode():
        block = Layer(0.1)
        run = Runner(block, "matmul")
        for _ in range(2):
            run(torch.randn(2, 6, 8, requires_grad=True)).sum().backward()
    assert run.stored.seen["mm"] == 7


def test_autocast():
    block = Layer(0.1)

    def cast(run):
        def call(x):
            with torch.autocast("cpu", torch.bfloat16):
                return run(x)

        return call

    expected = gradients(cast(block), block, x_())
    for save in (*TIERS, "_to_copy"):
        run = Runner(block, save)
        for _ in range(2):
            assert same(gradients(cast(run), block, x_()), expected)


def test_what_was_seen():
    run = Runner(Layer(), "mm", "nothing*", "attention")
    for _ in range(2):
        run(x_().requires_grad_())
    assert run.stored.matched == {"mm", "attention"}
    assert run.stored.seen["mm"] == 7
    assert run.stored.seen["_scaled_dot_product_flash_attention_for_cpu"] == 1


def test_an_error_in_a_replay_teaches_nothing():
    fail = [False]

    def forward(block, x):
        y = block.linear(x).tanh()
        if fail[0]:
            raise ValueError("replay")
        return block.linear(y).tanh()

    block = Wrapped(forward)
    run = Runner(block, "matmul")
    loss = run(x_().requires_grad_()).sum()
    fail[0] = True
    with pytest.raises(ValueError, match="replay"):
        loss.backward()
    fail[0] = False
    for _ in range(2):
        assert counted(run, block, x_())[1]["mm"] == 4


class ChangesTwice(nn.Module):
    """Writes to the result of its matmul again and again."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        return (x @ self.weight).add_(1).mul_(2).sub_(3)


class Clones(TorchDispatchMode):
    """Counts copies."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function.overloadpacket.__name__ == "clone"
        return function(*args, **(kwargs or {}))


def test_a_result_that_is_written_to_often_is_copied_once():
    block = ChangesTwice()
    with Clones() as clones, StoredResults(block, "block", ["matmul"]).call().storing():
        block(torch.ones(2, 4))
    assert clones.number == 1
