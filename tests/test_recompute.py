"""One block replayed: the same losses, gradients and buffers as the block left alone, whatever it does inside."""

import gc
import random
import weakref

import pytest
import torch
from torch import nn

from ckpt_trainer.block_state import BlockState
from ckpt_trainer.recompute import Replayable, Tally, Variant

VARIANTS = {"non-reentrant": Variant(), "reentrant": Variant(use_reentrant=True)}
both = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def replayable(module, variant=VARIANTS["non-reentrant"]):
    return Replayable("block", tuple(module.parameters()), BlockState(module), variant, Tally())


class Mlp(nn.Module):
    def __init__(self, dropout=0.0, width=8):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(torch.relu(self.up(x))))


def seeded(build):
    torch.manual_seed(0)
    return build()


def gradients(module, *inputs):
    return [x.grad for x in inputs] + [parameter.grad for parameter in module.parameters()]


def equal(left, right):
    assert len(left) == len(right)
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(left, right, strict=True))


def run(build, call, variant=None, steps=3):
    """Loss, gradients, buffers and the state of the random numbers after some steps, replayed if a variant is given."""
    module = seeded(build)
    x = torch.randn(4, 8, requires_grad=True)
    block = variant and replayable(module, variant)
    losses = []
    for _ in range(steps):
        output = block.run(module.forward, *call(x)) if block else module(*call(x)[0], **call(x)[1])
        loss = output.square().sum()
        loss.backward()
        losses.append(loss.detach())
    if block:
        assert block.tally.replays == {"block": steps}
    return losses, gradients(module, x), list(module.buffers()), [torch.get_rng_state()]


def assert_exact(build, call, variant):
    for kept, replayed in zip(run(build, call), run(build, call, variant), strict=True):
        assert equal(kept, replayed)


def positional(x):
    return (x,), {}


@both
def test_dropout_draws_the_same_mask(variant):
    assert_exact(lambda: Mlp(dropout=0.5), positional, variant)


class DrawsUnseen(Mlp):
    """Draws random numbers without any module or rate that says so."""

    def forward(self, x):
        return super().forward(x) * torch.rand(())


@both
def test_random_numbers_without_a_dropout_module(variant):
    assert_exact(DrawsUnseen, positional, variant)


class StartsLater(Mlp):
    """Draws random numbers and writes a buffer from its second forward on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.calls = 0

    def forward(self, x):
        self.calls += torch.is_grad_enabled() and not self.replaying()
        if self.calls > 1:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
            x = x * (1 + 0.5 * torch.randn_like(x))
        return super().forward(x - self.mean)

    def replaying(self):
        return torch._C._current_graph_task_id() != -1


def test_what_begins_after_the_first_forward_is_seen():
    assert_exact(StartsLater, positional, VARIANTS["non-reentrant"])


class PythonRandom(Mlp):
    def forward(self, x):
        return super().forward(x) * random.random()


@both
def test_python_random_numbers(variant):
    random.seed(3)
    kept = run(PythonRandom, positional)
    random.seed(3)
    for left, right in zip(kept, run(PythonRandom, positional, variant), strict=True):
        assert equal(left, right)


@pytest.mark.parametrize(
    ("build", "wanted", "kept"),
    [(Mlp, None, 0), (lambda: Mlp(0.1), None, 1), (lambda: Mlp(0.1).eval(), None, 0), (DrawsUnseen, None, 1),
     (lambda: Mlp(0.1), False, 0), (Mlp, True, 1)],
)  # fmt: skip
def test_random_state_is_kept_where_numbers_are_drawn_and_only_there(build, wanted, kept):
    module = build()
    state = BlockState(module, wanted)
    for _ in range(2):
        with state.remember([torch.device("cpu")]) as before:
            module(torch.ones(2, 8))
        assert sum(device == torch.device("cpu") for device, _ in before.random) == kept


class Normed(Mlp):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8, momentum=0.3)

    def forward(self, x):
        return super().forward(self.norm(x))


class CountsCalls(Mlp):
    """Its output depends on a buffer that it changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class ReplacesBuffer(CountsCalls):
    def forward(self, x):
        self.calls = self.calls * 0.5 + 1
        return Mlp.forward(self, x) * self.calls


class FillsBuffer(Mlp):
    """A buffer that is empty before the first forward, and one that is registered in it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", None)

    def forward(self, x):
        now = x.detach().mean(0)
        if self.mean is None:
            self.mean = now
            self.register_buffer("late", torch.zeros(8))
        else:
            self.mean = 0.9 * self.mean + 0.1 * now
            self.late += now
        return super().forward(x - self.mean + self.late)


class RegistersBuffer(Mlp):
    def forward(self, x):
        if "late" not in self._buffers:
            self.register_buffer("late", torch.ones(8))
            return super().forward(x)
        return super().forward(x * self.late * 2)


def spectral():
    module = Mlp()
    nn.utils.parametrizations.spectral_norm(module.up)
    return module


@both
@pytest.mark.parametrize("build", [Normed, CountsCalls, ReplacesBuffer, FillsBuffer, RegistersBuffer, spectral])
def test_buffers_are_updated_once_and_replayed_as_they_were(variant, build):
    assert_exact(build, positional, variant)


def test_a_graph_that_is_kept_replays_twice_from_the_same_buffers():
    def twice(replay):
        module = seeded(CountsCalls)
        x = torch.ones(4, 8, requires_grad=True)
        block = replayable(module)
        for _ in range(2):
            output = block.run(module.forward, (x,), {}) if replay else module(x)
            loss = output.square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
        return [*gradients(module, x), module.calls]

    assert equal(twice(False), twice(True))


class TakesKeywords(Mlp):
    def forward(self, x, scale=None, pair=None):
        return super().forward(x * scale) + pair[0] * pair[1][0]


@both
def test_tensors_in_keywords_and_tuples_get_gradients(variant):
    scale, first, second = (torch.randn(8, requires_grad=True) for _ in range(3))
    results = []
    for chosen in (None, variant):
        for tensor in (scale, first, second):
            tensor.grad = None
        result = run(TakesKeywords, lambda x: ((x,), {"scale": scale, "pair": (first, (second,))}), chosen)
        results.append([*result[0], *result[1], scale.grad, first.grad, second.grad])
    assert equal(*results)
    assert all(tensor.grad is not None for tensor in (scale, first, second))


@both
def test_autocast_replays_in_the_same_precision(variant):
    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return run(lambda: Mlp(0.3), positional, chosen)

    chosen = None
    kept = call()
    chosen = variant
    for left, right in zip(kept, call(), strict=True):
        assert equal(left, right)


class DictCache:
    """Stands for the key/value caches of transformers: known by its class name."""

    def __init__(self):
        self.seen = []


class Caches(Mlp):
    def forward(self, x, past_key_values=None):
        past_key_values.seen.append(1)
        return super().forward(x)


@both
def test_a_call_with_a_cache_is_kept_and_counted(variant):
    module, cache = Caches(), DictCache()
    block = replayable(module, variant)
    block.run(module.forward, (torch.ones(1, 8),), {"past_key_values": cache}).sum().backward()
    assert cache.seen == [1]
    assert block.tally.calls == {"got a key/value cache": 1}


class SideChannel(Mlp):
    def forward(self, x, shared):
        shared["donor"] = self.up(x)
        return super().forward(x)


def test_values_passed_through_a_dict_keep_their_gradients():
    def grads(replay):
        module, shared = seeded(SideChannel), {}
        block = replayable(module)
        x = torch.ones(4, 8, requires_grad=True)
        output = block.run(module.forward, (x,), {"shared": shared}) if replay else module(x, shared)
        (output.sum() + shared["donor"].square().sum()).backward()
        return gradients(module, x)

    assert equal(grads(False), grads(True))


def test_reentrant_refuses_a_block_that_is_handed_a_dict():
    module = SideChannel()
    with pytest.raises(ValueError, match="checkpointing_use_reentrant=True gives wrong gradients here: block 'block'"):
        replayable(module, VARIANTS["reentrant"]).run(module.forward, (torch.ones(1, 8),), {"shared": {}})


class Nested(Mlp):
    def forward(self, x):
        y = super().forward(x)
        return {"y": y, "more": (y.square(), None, "text")}


@both
def test_nested_outputs_keep_their_structure_and_gradients(variant):
    def grads(chosen):
        module = seeded(Nested)
        x = torch.ones(4, 8, requires_grad=True)
        output = replayable(module, chosen).run(module.forward, (x,), {}) if chosen else module(x)
        assert output["more"][1:] == (None, "text")
        (output["y"].sum() + output["more"][0].sum()).backward()
        return gradients(module, x)

    assert equal(grads(None), grads(variant))


@both
def test_trainable_block_with_frozen_input_gets_its_gradients(variant):
    module = Mlp()
    block = replayable(module, variant)
    block.run(module.forward, (torch.ones(2, 8),), {}).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert block.tally.calls == {"recompute": 1}


@both
def test_nothing_to_train_runs_without_a_graph(variant):
    module = Mlp().requires_grad_(False)
    block = replayable(module, variant)
    assert not block.run(module.forward, (torch.ones(2, 8),), {}).requires_grad
    assert block.tally.calls == {"no graph": 1}


@both
def test_frozen_block_passes_gradients_on(variant):
    module = Mlp().requires_grad_(False)
    x = torch.ones(2, 8, requires_grad=True)
    block = replayable(module, variant)
    block.run(module.forward, (x,), {}).sum().backward()
    assert x.grad is not None
    assert block.tally.calls == {"recompute": 1}


@both
def test_without_gradients_the_block_runs_plainly(variant):
    module = Mlp()
    block = replayable(module, variant)
    with torch.no_grad():
        block.run(module.forward, (torch.ones(2, 8),), {})
    assert block.tally.calls == {"no grad": 1}


def test_required_input_gradient_reaches_a_frozen_block_and_allows_changes_in_place():
    class InPlace(Mlp):
        def forward(self, x):
            return super().forward(x.mul_(2))

    module = InPlace().requires_grad_(False)
    block = replayable(module, Variant(require_input_grad=True))
    assert block.run(module.forward, (torch.ones(2, 8),), {}).requires_grad


@both
def test_two_forwards_before_a_backward_and_in_any_order(variant):
    def grads(chosen):
        module = seeded(lambda: Normed())
        block = chosen and replayable(module, chosen)
        xs = [torch.randn(4, 8, requires_grad=True) for _ in range(3)]
        outputs = [block.run(module.forward, (x,), {}) if block else module(x) for x in xs]
        for place in (2, 0, 1):
            outputs[place].square().sum().backward()
        return [*gradients(module, *xs), *module.buffers()]

    assert equal(grads(None), grads(variant))


@both
def test_a_dropped_graph_frees_what_it_held(variant):
    module = TakesKeywords()
    x = torch.randn(4, 8, requires_grad=True)
    scale = x * 2
    arguments = {"scale": scale, "pair": (x, (x,))}
    output = replayable(module, variant).run(module.forward, (x,), arguments)
    alive = weakref.ref(scale.untyped_storage())
    del scale, arguments
    gc.collect()
    assert alive() is not None  # the graph needs it for the replay
    del output
    gc.collect()
    assert alive() is None


def test_an_exception_in_forward_leaves_the_block_usable():
    class Fails(Mlp):
        fail = True

        def forward(self, x):
            if self.fail:
                raise KeyboardInterrupt
            return super().forward(x)

    module = Fails()
    block = replayable(module)
    x = torch.ones(2, 8, requires_grad=True)
    with pytest.raises(KeyboardInterrupt):
        block.run(module.forward, (x,), {})
    module.fail = False
    block.run(module.forward, (x,), {}).sum().backward()
    assert x.grad is not None


def test_changing_an_input_in_place_is_an_error_and_not_a_wrong_gradient():
    module = Mlp()
    x = torch.ones(2, 8, requires_grad=True) * 1
    output = replayable(module).run(module.forward, (x,), {})
    with torch.no_grad():
        x.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_quantized_weights_in_buffers_are_not_copied():
    class Quantized(CountsCalls):
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(2**18, dtype=torch.int32))
            self.register_buffer("index", torch.zeros(8, dtype=torch.int32))

    module = Quantized()
    assert set(BlockState(module)._copies(module)) == {"calls", "index"}


def test_a_large_buffer_that_is_first_written_later_is_an_error_and_not_a_wrong_gradient():
    class Later(Mlp):
        write = False

        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.zeros(2**15))

        def forward(self, x):
            if self.write:
                self.table += 1
            return super().forward(x) + self.table[0]

    module = Later()
    block = replayable(module)
    x = torch.ones(2, 8, requires_grad=True)
    block.run(module.forward, (x,), {}).sum().backward()
    module.write = True
    with pytest.raises(RuntimeError, match=r"buffer 'table' of Later \(131072 bytes\) was written in place"):
        block.run(module.forward, (x,), {})


class Appends(Mlp):
    def forward(self, x, history):
        history.append(x.detach() * 2)
        return super().forward(x * sum(history))


def test_a_list_that_the_block_appends_to_is_appended_to_once_by_each_forward():
    def twice(replay):
        module, history = seeded(Appends), [torch.ones(8)]
        x = torch.ones(4, 8, requires_grad=True)
        loss = (replayable(module).run(module.forward, (x, history), {}) if replay else module(x, history)).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        assert len(history) == 2
        return gradients(module, x)

    assert equal(twice(False), twice(True))
