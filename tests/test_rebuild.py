"""What is stored and what is rebuilt, how often, for how long, and that gradients stay the same to the last bit."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ckpt_trainer import rebuild, rebuild_rules
from ckpt_trainer.memory import LiveBytes
from ckpt_trainer.packed import NOTHING, Held, Rebuilt
from ckpt_trainer.rebuild import Rebuilding

WIDTH = 64
ROWS = 32
BYTES = ROWS * WIDTH * 4  # of one activation


class GatedBlock(nn.Module):
    """Norm in fp32, gated MLP, residual: one of each of what is stored and what is rebuilt."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.eps = 1e-6

    def forward(self, hidden):
        full = hidden.to(torch.float32)
        normed = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + self.eps)
        x = self.scale * normed.to(hidden.dtype)
        return hidden + self.down(F.silu(self.gate(x)) * self.up(x))


def inputs(dtype=torch.float32):
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def gradients(block, hidden, run=None):
    out = block(hidden) if run is None else run(block, (hidden,), {}, list(block.parameters()))
    leaves = [hidden, *block.parameters()]
    return out, torch.autograd.grad(out.float().square().sum(), leaves)


def equal(ours, theirs):
    return all(a is b or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Counting(TorchDispatchMode):
    """Notes the ops that run."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same(dtype):
    block = GatedBlock().to(dtype)
    out, theirs = gradients(block, inputs(dtype))
    rebuilding = Rebuilding(block.modules())
    ours_out, ours = gradients(block, inputs(dtype), rebuilding.run)
    assert torch.equal(out, ours_out)
    assert equal(ours, theirs)
    assert rebuilding.refused == set()


def stored_bytes(block, hidden, run):
    with LiveBytes(block, hidden) as live:
        before = live.current
        out = run(block, (hidden,), {})
        return live.current - before - out.nbytes


def test_stored_is_what_is_expensive():
    # Gate and up; not silu(gate), their product, x twice, nor what is normed. The input is there anyway.
    small = 4 * ROWS * 2  # rsqrt, and the mean that it is taken of
    block, hidden = GatedBlock(), inputs()
    assert stored_bytes(block, hidden, Rebuilding(block.modules()).run) in (2 * BYTES + small // 2, 2 * BYTES + small)
    plain = stored_bytes(block, hidden, lambda forward, args, kwargs: forward(*args))
    assert plain >= 6 * BYTES


def test_cast_of_an_input_is_rebuilt_from_the_input():
    block, hidden = GatedBlock().to(torch.bfloat16), inputs(torch.bfloat16)
    stored = stored_bytes(block, hidden.cumsum(0), Rebuilding(block.modules()).run)
    # A block that gets what no op saved does not copy it: it is stored by being kept.
    assert stored <= 2 * (BYTES // 2) + 4 * ROWS * 2


def test_cast_in_the_middle_is_stored_in_the_bits_it_had():
    rebuilding, hidden = Rebuilding([]), inputs(torch.bfloat16)

    def forward(a):
        return a.cumsum(0).to(torch.float32).pow(2)

    assert stored_bytes(nn.Identity(), hidden, lambda f, args, kw: rebuilding.run(forward, args, kw)) == BYTES // 2
    out = rebuilding.run(forward, (hidden,), {})
    assert equal(torch.autograd.grad(out.sum(), hidden), torch.autograd.grad(forward(hidden).sum(), hidden))


def test_repeated_heads_are_stored_once():
    rebuilding = Rebuilding([])
    heads = torch.randn(2, 4, 16, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    query = torch.randn(2, 8, 16, 8, requires_grad=True)

    def forward(keys):
        repeated = (keys + 1)[:, :, None].expand(2, 4, 2, 16, 8).reshape(2, 8, 16, 8)
        return (query @ repeated.transpose(2, 3)).sum((2, 3))

    assert stored_bytes(query, heads, lambda f, args, kw: rebuilding.run(forward, args, kw)) == heads.nbytes
    ours = torch.autograd.grad(rebuilding.run(forward, (heads,), {}).sum(), (heads, query))
    assert equal(ours, torch.autograd.grad(forward(heads).sum(), (heads, query)))


def test_shared_results_are_rebuilt_once():
    block, hidden = GatedBlock(), inputs()
    rebuilding = Rebuilding(block.modules())
    gradients(block, hidden, rebuilding.run)  # each way of making something is looked at the first time
    ops = []
    for run in (rebuilding.run, lambda forward, args, kwargs: forward(*args)):
        out = run(block, (hidden,), {})
        with Counting() as counting:
            torch.autograd.grad(out.sum(), [hidden, *block.parameters()])
        ops.append(Counter(counting.calls))
    # normed, x (for gate and up) and the product of silu and up; silu for the product and for its other factor.
    more = ops[0] - ops[1]
    del more["detach"]  # by autograd, of whatever a hook gives it
    assert more == {"mul": 3, "silu": 1}
    assert ops[1] - ops[0] == {}


def test_values_are_dropped_after_their_last_use():
    rebuilding, hidden = Rebuilding([]), inputs()

    def forward(a):
        b = F.silu(a * 2)
        return b.pow(2) + b.pow(3)

    def rebuilt(out):
        powers = [node for node, _ in out.grad_fn.next_functions]
        return [node._raw_saved_self.data for node in powers]

    out = rebuilding.run(forward, (hidden,), {})
    one, other = rebuilt(out)
    assert one is other
    assert isinstance(one, Rebuilt)
    for _ in range(2):
        torch.autograd.grad(out.sum(), hidden, retain_graph=True)
        assert one.value is None
    first = one.get()
    held = weakref.ref(first)
    del first
    assert held() is not None
    assert torch.equal(one.get(), F.silu(hidden * 2))
    assert held() is None


def test_kept_graph_gives_the_same_again():
    block, hidden = GatedBlock(), inputs()
    out = Rebuilding(block.modules()).run(block, (hidden,), {})
    leaves = [hidden, *block.parameters()]
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    assert equal(first, torch.autograd.grad(out.sum(), leaves, retain_graph=True))
    assert equal(first, torch.autograd.grad(block(hidden).sum(), leaves))
    only = torch.autograd.grad(out.sum(), block.up.weight)
    assert torch.equal(only[0], first[3])


def test_second_derivatives_are_the_same():
    block, hidden = GatedBlock(), inputs()

    def twice(run):
        out = run(block, (hidden,), {})
        (first,) = torch.autograd.grad(out.square().sum(), hidden, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [hidden, *block.parameters()])

    rebuilding = Rebuilding(block.modules())
    assert equal(twice(rebuilding.run), twice(lambda forward, args, kwargs: forward(*args)))
    assert rebuilding.tensors > 0


def test_change_in_place_of_what_is_stored_is_an_error():
    rebuilding, hidden = Rebuilding([]), inputs()
    gate = hidden.cumsum(0)
    out = rebuilding.run(lambda a: F.silu(a) * 2 + F.silu(a).pow(2), (gate,), {})
    with torch.no_grad():
        gate.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: \[float32 \[32, 64\]\] is at version 1"):
        out.sum().backward()


def test_change_in_place_of_a_parameter_is_an_error():
    block, hidden = GatedBlock(), inputs()
    out = Rebuilding(block.modules()).run(block, (hidden,), {})
    with torch.no_grad():
        block.scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_change_in_place_of_what_is_rebuilt_does_no_harm():
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)
    rebuilding, hidden = Rebuilding([]), inputs()

    def forward(a, change):
        b = F.silu(a * 2)
        out = b @ weight
        if change:
            with torch.no_grad():
                b.zero_()
        return out

    ours = torch.autograd.grad(rebuilding.run(forward, (hidden, True), {}).sum(), (hidden, weight))
    assert equal(ours, torch.autograd.grad(forward(hidden, False).sum(), (hidden, weight)))


def test_result_written_in_place_within_the_block_is_not_taken_for_what_it_was():
    rebuilding, hidden = Rebuilding([]), inputs()

    def forward(a):
        b = (a * 2).sin()
        b.mul_(3).add_(1)
        return b.pow(2) * F.silu(b)

    ours = torch.autograd.grad(rebuilding.run(forward, (hidden,), {}).sum(), hidden)
    assert equal(ours, torch.autograd.grad(forward(hidden).sum(), hidden))


@pytest.mark.parametrize("backward", [False, True])
def test_graph_is_freed_without_the_collector(backward):
    block, hidden = GatedBlock(), inputs()
    rebuilding = Rebuilding(block.modules())
    gc.disable()
    try:
        with LiveBytes(block, hidden) as live:
            before = live.current
            out = rebuilding.run(block, (hidden,), {})
            assert live.current > before
            if backward:
                torch.autograd.grad(out.sum(), [hidden, *block.parameters()])
            del out
            assert live.current == before
    finally:
        gc.enable()


class Mark:
    pass


def test_saved_results_of_an_op_do_not_hold_the_op():
    rebuilding, hidden = Rebuilding([]), inputs()
    gc.disable()
    try:
        for op in (torch.tanh, torch.sigmoid, torch.exp, torch.relu, lambda a: a.softmax(-1)):
            out = rebuilding.run(lambda a, op=op: op(a.sin()), (hidden,), {})
            mark = out.grad_fn.metadata["mark"] = Mark()
            mark = weakref.ref(mark)
            del out
            assert mark() is None
    finally:
        gc.enable()


def test_saved_result_of_an_op_is_rebuilt_from_a_stored_input():
    rebuilding, hidden = Rebuilding([]), inputs()
    # sin stores its input, so that tanh of the same needs no result.
    doubled = hidden.cumsum(0)
    out = rebuilding.run(lambda a: a.sin() + a.tanh(), (doubled,), {})
    tanh = out.grad_fn.next_functions[1][0]
    assert tanh.name() == "TanhBackward0"
    assert isinstance(tanh._raw_saved_result.data, Rebuilt)
    ours = torch.autograd.grad(out.sum(), hidden, retain_graph=True)
    assert equal(ours, torch.autograd.grad((doubled.sin() + doubled.tanh()).sum(), hidden))


def test_chain_is_bounded():
    rebuilding, hidden = Rebuilding([]), inputs()

    def chain(a, ops):
        b = a * 1
        c = b.sin()  # stores b
        for _ in range(ops):
            b = b + b
        return b @ b.t() + c @ c.t()

    stored = [
        stored_bytes(nn.Identity(), hidden, lambda f, x, k, n=n: rebuilding.run(chain, (*x, n), {})) for n in (9, 40)
    ]
    assert stored[1] - stored[0] == BYTES


def test_wrong_rules_are_found_out(monkeypatch):
    """What does not come out the same bit for bit, the first time, is stored."""
    monkeypatch.setitem(
        rebuild_rules.RULES, "SiluBackward0", rebuild_rules.Rule(lambda a: F.silu(a) * (1 + 1e-7), ("self",))
    )
    monkeypatch.setitem(rebuild_rules.RULES, "NegBackward0", rebuild_rules.Rule(lambda a: a[:, :1]))
    block, hidden = GatedBlock(), inputs()
    rebuilding = Rebuilding(block.modules())
    _, theirs = gradients(block, hidden)
    for _ in range(2):
        assert equal(gradients(block, hidden, rebuilding.run)[1], theirs)
    assert rebuilding.refused == {"SiluBackward0"}


def test_rules_that_fail_are_found_out(monkeypatch):
    monkeypatch.setitem(
        rebuild_rules.RULES, "SiluBackward0", rebuild_rules.Rule(lambda a: F.silu(a, 1, 2, 3), ("self",))
    )
    block, hidden = GatedBlock(), inputs()
    rebuilding = Rebuilding(block.modules())
    assert equal(gradients(block, hidden, rebuilding.run)[1], gradients(block, hidden)[1])
    assert rebuilding.refused == {"SiluBackward0"}


def test_what_is_refused_does_not_wait_for_values(monkeypatch):
    monkeypatch.setitem(rebuild_rules.RULES, "NegBackward0", rebuild_rules.Rule(torch.abs))
    rebuilding, hidden = Rebuilding([]), inputs()
    for _ in range(2):
        out = rebuilding.run(lambda a: (b := F.silu(a.cumsum(0))).pow(2) + (-b).pow(2), (hidden,), {})
        rebuilt, refused = (node._raw_saved_self.data for node, _ in out.grad_fn.next_functions)
        assert isinstance(refused, Held)
        assert isinstance(rebuilt, Rebuilt)
        torch.autograd.grad(out.sum(), hidden, retain_graph=True)
        assert rebuilt.value is None


def test_missing_names_are_no_error(monkeypatch):
    def gone(node, output):
        raise AttributeError("'MulBackward0' object has no attribute '_saved_self'")

    monkeypatch.setitem(
        rebuild_rules.RULES, "MulBackward0", rebuild_rules.Rule(torch.mul, ("self", "other"), arguments=gone)
    )
    block, hidden = GatedBlock(), inputs()
    rebuilding = Rebuilding(block.modules())
    assert equal(gradients(block, hidden, rebuilding.run)[1], gradients(block, hidden)[1])
    assert "MulBackward0" in rebuilding.refused


def test_without_the_names_all_is_stored(monkeypatch):
    assert rebuild.AVAILABLE
    monkeypatch.setattr(rebuild, "AVAILABLE", False)
    block, hidden = GatedBlock(), inputs()
    rebuilding = Rebuilding(block.modules())
    assert equal(gradients(block, hidden, rebuilding.run)[1], gradients(block, hidden)[1])
    assert rebuilding.tensors == 0


def test_parameters_that_are_sharded_are_not_read():
    block, hidden = GatedBlock(), inputs()
    rebuilding = Rebuilding(block.modules(), from_parameters=False)
    out = rebuilding.run(block, (hidden,), {})
    # As a shard does: after the forward the values are gone, until the module's own backward brings them back.
    silu_product = out.grad_fn.next_functions[1][0].next_functions[0][0]._raw_saved_self
    assert isinstance(silu_product.data, Rebuilt)
    gate = next(n for n in nodes_of(out) if n.name() == "SiluBackward0").next_functions[0][0]
    assert isinstance(gate._raw_saved_self.data, Held)
    assert equal(
        torch.autograd.grad(out.float().square().sum(), [hidden, *block.parameters()]), gradients(block, hidden)[1]
    )


def nodes_of(out):
    found, todo = [], [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.append(node)
            todo += [before for before, _ in node.next_functions]
    return found


def test_hooks_of_others_are_not_called():
    hidden, called = inputs(), []

    def unpack(tensor):
        called.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), unpack):
        product = F.silu(hidden * 2) * hidden
    out = Rebuilding([]).run(lambda a: a.pow(2), (product,), {})
    assert called == []
    ours = torch.autograd.grad(out.sum(), hidden)
    assert equal(ours, torch.autograd.grad((F.silu(hidden * 2) * hidden).pow(2).sum(), hidden))


def test_result_of_a_block_before_is_rebuilt_in_the_next():
    """Across blocks, as in BERT, where a block ends with a norm: the next stores nothing of its input."""
    norm, hidden = nn.LayerNorm(WIDTH), inputs()
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)
    rebuilding = Rebuilding([norm])

    def both(run):
        normed = run(lambda a: norm(a * 2), (hidden,), {})
        return run(lambda a: a @ weight, (normed,), {})

    out = both(rebuilding.run)
    assert isinstance(out.grad_fn._raw_saved_self.data, Rebuilt)
    ours = torch.autograd.grad(out.square().sum(), (hidden, weight))
    theirs = torch.autograd.grad(both(lambda f, a, k: f(*a)).square().sum(), (hidden, weight))
    assert equal(ours, theirs)


def test_checkpoint_within_a_block():
    block, hidden = GatedBlock(), inputs()

    def forward(a):
        return block(checkpoint(block, F.silu(a * 2), use_reentrant=False))

    ours = torch.autograd.grad(Rebuilding(block.modules()).run(forward, (hidden,), {}).sum(), list(block.parameters()))
    assert equal(ours, torch.autograd.grad(forward(hidden).sum(), list(block.parameters())))


def test_autocast_is_not_applied_to_what_is_rebuilt():
    block, hidden = GatedBlock(), inputs()

    def under_autocast(run):
        with torch.autocast("cpu", torch.bfloat16):
            out = run(block, (hidden,), {})
            return torch.autograd.grad(out.float().sum(), [hidden, *block.parameters()])

    assert equal(under_autocast(Rebuilding(block.modules()).run), under_autocast(lambda f, a, k: f(*a)))


def test_rebuilding_is_not_under_autocast_nor_recorded(monkeypatch):
    seen = []

    def silu(a):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return F.silu(a)

    monkeypatch.setitem(rebuild_rules.RULES, "SiluBackward0", rebuild_rules.Rule(silu, ("self",)))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = inputs()
        out = Rebuilding([]).run(lambda a: F.silu(a.cumsum(0)).pow(2), (hidden,), {})
        torch.autograd.grad(out.sum(), hidden, create_graph=True)
    assert seen == [(False, False)] * 2


def test_strides_are_those_that_were_saved():
    rebuilding, hidden = Rebuilding([]), inputs()
    out = rebuilding.run(lambda a: a.cumsum(0).sin().cos().t().clone().pow(2), (hidden,), {})
    packed = out.grad_fn._raw_saved_self.data
    assert isinstance(packed, Rebuilt)
    assert packed.get().stride() == hidden.t().clone().stride() == (1, WIDTH)


def test_leaf_written_within_the_block_is_not_read_for_what_it_was():
    weight, other = torch.ones(WIDTH, requires_grad=True), torch.randn(WIDTH, WIDTH, requires_grad=True)

    def forward(a):
        total = a.cumsum(0).sin() + weight  # which does not save the weight
        with torch.no_grad():
            weight.mul_(2)
        return total @ other

    def grads(run):
        with torch.no_grad():
            weight.fill_(1)
        return torch.autograd.grad(run(forward, (hidden,), {}).sum(), (hidden, other))

    hidden, rebuilding = inputs(), Rebuilding([])
    theirs = grads(lambda f, a, k: f(*a))
    for _ in range(2):
        assert equal(grads(lambda f, a, k: rebuilding.run(f, a, k, [weight])), theirs)


def test_what_was_changed_in_place_before_the_block_is_not_read():
    hidden, rebuilding = inputs(), Rebuilding([])
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)

    def step(run, change):
        gate = hidden.cumsum(0)
        silu = F.silu(gate)  # saves gate, without hooks: outside of blocks
        if change:
            with torch.no_grad():
                gate.zero_()
        return torch.autograd.grad(run(lambda a: a @ weight, (silu,), {}).sum(), weight)

    theirs = step(lambda f, a, k: f(*a), False)
    assert equal(step(rebuilding.run, False), theirs)
    assert equal(step(rebuilding.run, True), theirs)


def test_small_tensors_are_stored():
    rebuilding = Rebuilding([])
    small = torch.randn(255, requires_grad=True)
    out = rebuilding.run(lambda a: F.silu(a.cumsum(0)).pow(2), (small,), {})
    assert isinstance(out.grad_fn._raw_saved_self.data, Held)


def test_stored_tensor_that_changed_is_stored_again():
    rebuilding, hidden = Rebuilding([]), inputs()

    def forward(a):
        b = a.cumsum(0)
        first = b.pow(2)
        with torch.no_grad():
            b.mul_(2)
        return first, b.pow(3)

    _, second = forward(hidden)
    _, ours = rebuilding.run(forward, (hidden,), {})
    assert equal(torch.autograd.grad(ours.sum(), hidden), torch.autograd.grad(second.sum(), hidden))


def test_tensors_of_other_classes_are_stored():
    class Other(torch.Tensor):
        pass

    rebuilding, hidden = Rebuilding([]), inputs()
    out = rebuilding.run(lambda a: F.silu(a.cumsum(0).as_subclass(Other)).pow(2), (hidden,), {})
    assert rebuilding.tensors == 0
    theirs = torch.autograd.grad(F.silu(hidden.cumsum(0)).pow(2).sum(), hidden)
    assert equal(torch.autograd.grad(out.sum(), hidden), theirs)


def test_not_a_number_is_itself():
    rebuilding, hidden = Rebuilding([]), inputs().detach()
    hidden[0, 0] = float("nan")
    hidden.requires_grad_()
    out = rebuilding.run(lambda a: F.silu(a * 2).pow(2), (hidden,), {})
    assert rebuilding.refused == set()
    assert isinstance(out.grad_fn._raw_saved_self.data, Rebuilt)


def test_custom_function_that_reads_what_it_saved_twice():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return a.square()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0] + grad * ctx.saved_tensors[0]

    rebuilding, hidden = Rebuilding([]), inputs()
    out = rebuilding.run(lambda a: Twice.apply(F.silu(a.sin().cos() * 2)), (hidden,), {})
    ours = torch.autograd.grad(out.sum(), hidden)
    assert equal(ours, torch.autograd.grad(Twice.apply(F.silu(hidden.sin().cos() * 2)).sum(), hidden))


def test_two_passes_before_a_backward():
    block = GatedBlock()
    rebuilding = Rebuilding(block.modules())
    one, other = inputs(), inputs().detach().neg().requires_grad_()
    outs = [rebuilding.run(block, (hidden,), {}) for hidden in (one, other)]
    theirs = [torch.autograd.grad(block(hidden).sum(), hidden)[0] for hidden in (one, other)]
    ours = [
        torch.autograd.grad(out.sum(), hidden)[0] for out, hidden in reversed([*zip(outs, (one, other), strict=True)])
    ]
    assert equal(ours[::-1], theirs)


def test_views_that_are_more_than_a_geometry():
    rebuilding, hidden = Rebuilding([]), inputs()

    def forward(a):
        whole = torch.view_as_complex(F.silu(a.cumsum(0)).view(ROWS, -1, 2))
        turned = whole * whole.conj() * torch.polar(torch.ones(()), torch.ones(()))
        return torch.view_as_real(turned).square().sum() + (turned.imag * turned.conj().imag).sum()

    ours = torch.autograd.grad(rebuilding.run(forward, (hidden,), {}), hidden)
    assert equal(ours, torch.autograd.grad(forward(hidden), hidden))


def test_result_that_is_saved_before_what_it_is_made_of():
    """As in CLIP: sigmoid saves its result, and only then the product saves the input."""
    rebuilding, hidden = Rebuilding([]), inputs()

    def forward(a):
        b = a.cumsum(0)
        return (b * torch.sigmoid(1.702 * b)).pow(2)

    assert stored_bytes(nn.Identity(), hidden, lambda f, args, kw: rebuilding.run(forward, args, kw)) == BYTES
    out = rebuilding.run(forward, (hidden,), {})
    theirs = torch.autograd.grad(forward(hidden).sum(), hidden)
    for _ in range(2):
        assert equal(torch.autograd.grad(out.sum(), hidden, retain_graph=True), theirs)


def test_input_that_was_written_meanwhile_is_not_read():
    """Of what was written without autograd's knowledge, nobody can tell whether an op read it before or after."""
    rebuilding, hidden = Rebuilding([]), inputs()

    def forward(a, change, late):
        b = a.cumsum(0)
        c = torch.sigmoid(b) if late else b * 2
        if change:
            with torch.no_grad():
                b.mul_(3)
        return b.pow(2) * c.pow(2)

    for late in (False, True):
        for change in (False, True):
            ours = torch.autograd.grad(rebuilding.run(forward, (hidden, change, late), {}).sum(), hidden)
            assert equal(ours, torch.autograd.grad(forward(hidden, change, late).sum(), hidden))


def two_blocks(one, other, *leaves):
    """Gradients of two functions that share one `Rebuilding`, the first of which vouches for nothing in the second."""
    rebuilding, found = Rebuilding([m for leaf in leaves if isinstance(leaf, nn.Module) for m in leaf.modules()]), []
    parameters = [p for leaf in leaves for p in (leaf.parameters() if isinstance(leaf, nn.Module) else [leaf])]
    for run in (lambda f, a: f(*a), lambda f, a: rebuilding.run(f, a, {}, parameters)):
        hidden = inputs(torch.bfloat16)
        out = run(other, (run(one, (hidden,)).bfloat16(),))
        found.append(torch.autograd.grad(out.float().square().sum(), [hidden, *parameters], allow_unused=True))
    return found


def test_one_norm_does_not_vouch_for_another():
    norm, weight = nn.LayerNorm(WIDTH), torch.randn(WIDTH, WIDTH, requires_grad=True)

    def other(a):
        return F.layer_norm(a.float(), (WIDTH,), norm.weight, norm.bias, 0.3) @ weight

    both = two_blocks(lambda a: norm(a.float()) @ weight, lambda a: norm(a.float()) @ weight + other(a), norm, weight)
    assert equal(*both)


def test_norms_that_share_a_weight_and_differ_in_epsilon():
    one, other = nn.LayerNorm(WIDTH, 1e-5), nn.LayerNorm(WIDTH, 0.5)
    other.weight = one.weight
    both = nn.ModuleList([one, other])
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)
    assert equal(*two_blocks(lambda a: one(a.float()) @ weight, lambda a: other(a.float()) @ weight, both, weight))


def test_one_dtype_does_not_vouch_for_another():
    factor, weight = torch.rand(WIDTH), torch.randn(WIDTH, WIDTH, requires_grad=True)

    def wide(a):
        return ((a.sin() * factor) @ weight).to(torch.bfloat16)

    def narrow(a):
        b = a.sin().clone()
        b.mul_(factor)
        return b @ weight.bfloat16()

    assert equal(*two_blocks(wide, narrow, weight))
    assert equal(*two_blocks(narrow, wide, weight))


def test_write_that_autograd_does_not_record_after_one_without():
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)

    def product(a, writes):
        b = a.sin() * a.cos()
        with torch.no_grad():
            if writes:
                b.clamp_(-0.1, 0.1)
        return (b * b) @ weight.bfloat16()

    assert equal(*two_blocks(lambda a: product(a, False), lambda a: product(a, True), weight))


def test_cast_that_was_written_is_not_narrowed():
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)

    def block(a):
        b = a.cumsum(0).float()
        with torch.no_grad():
            b.mul_(1 / 3)
        return (b * b) @ weight

    assert equal(*two_blocks(block, block, weight))


def test_missing_names_of_results_are_no_error(monkeypatch):
    rule = rebuild_rules.Rule(torch.tanh, arguments=rebuild_rules._read("renamed"))
    monkeypatch.setitem(rebuild_rules.RULES, "TanhBackward0", rule)
    rebuilding, hidden = Rebuilding([]), inputs()
    out = rebuilding.run(lambda a: (b := a.cumsum(0)).tanh() * b, (hidden,), {})
    b = hidden.cumsum(0)
    assert equal(torch.autograd.grad(out.sum(), hidden), torch.autograd.grad((b.tanh() * b).sum(), hidden))
    assert "TanhBackward0" in rebuilding.refused


def test_an_argument_that_was_not_given_is_used_like_any_other():
    # Indexing by `x[:, index]` saves one index and nothing; experts of transformers 4 do so.
    assert NOTHING.use() is None
    assert (NOTHING.uses, NOTHING.is_away, NOTHING.peek()) == (0, False, None)
