"""Segments: the input of every k-th block is stored, the others are rebuilt, and no bit of a gradient changes."""

import gc
from collections import Counter

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from test_families import without_cache
from test_recompute import Mlp, equal
from tiny_models import CASES
from torch import nn

from ckpt_trainer.block_state import BlockState
from ckpt_trainer.blocks import find_blocks
from ckpt_trainer.flops import FlopCounter
from ckpt_trainer.install import Installed, Runners
from ckpt_trainer.memory import LiveBytes, SavedBytes
from ckpt_trainer.plan import KEEP, RECOMPUTE, Plan, Settings
from ckpt_trainer.recompute import Replayable, Tally, Variant
from ckpt_trainer.segments import Segments, segment_length

CHANGED = "modified by an inplace operation"


@pytest.mark.parametrize(
    ("setting", "number", "length"),
    [(1, 9, 1), (4, 9, 4), ("sqrt", 1, 1), ("sqrt", 2, 1), ("sqrt", 9, 3), ("sqrt", 32, 6), ("sqrt", 0, 1)],
)
def test_length_of_a_segment(setting, number, length):
    assert segment_length(setting, number) == length


@pytest.mark.parametrize("setting", [0, -1, "4", "root", 2.0, True, None])
def test_what_is_no_length(setting):
    with pytest.raises(ValueError, match="neither a number from 1 on nor 'sqrt'"):
        segment_length(setting, 9)


# -- Chains of small blocks --------------------------------------------------------------------------------------------


class Chain:
    """Some blocks, replayed in segments, or kept where no length is given."""

    def __init__(self, length=None, num=6, build=lambda: Mlp(0.5)):
        torch.manual_seed(0)
        self.modules = nn.ModuleList(build() for _ in range(num))
        self.tally = Tally()
        segments = Segments(length) if length else None
        self.blocks = [
            Replayable(str(i), tuple(m.parameters()), BlockState(m), Variant(), self.tally, segments=segments)
            for i, m in enumerate(self.modules)
        ]
        self.length = length
        self.x = torch.randn(4, 8, requires_grad=True)
        self.seen = []

    def block(self, index, *args, **kwargs):
        module = self.modules[index]
        if self.length is None:
            return module(*args, **kwargs)
        return self.blocks[index].run(module.forward, args, kwargs)

    def forward(self, x=None, between=lambda index, x: x):
        x = self.x * 1 if x is None else x
        for index in range(len(self.modules)):
            x = between(index, self.block(index, x))
        return x

    def gradients(self):
        return [self.x.grad] + [parameter.grad for parameter in self.modules.parameters()]

    @property
    def rebuilt(self):
        return "".join(str(self.tally.rebuilt_inputs[str(i)]) for i in range(len(self.modules)))


def assert_same(do, length=3, **options):
    """`do(chain)` gives the same gradients, buffers, outputs and random numbers in segments as without."""
    results, chains = [], []
    for each in (None, length):
        chain = Chain(each, **options)
        outputs = do(chain) or []
        results.append([*chain.gradients(), *chain.modules.buffers(), *outputs, torch.get_rng_state()])
        chains.append(chain)
    assert any(gradient is not None and gradient.any() for gradient in chains[0].gradients())
    assert equal(*results)
    return chains[1]


def step(chain, **options):
    output = chain.forward(**options)
    output.square().sum().backward()
    return [output.detach()]


def two_steps(chain):
    return [*step(chain), *step(chain)]


@pytest.mark.parametrize(
    ("length", "rebuilt"), [(1, "000000"), (2, "202020"), (3, "220220"), (4, "222020"), (6, "222220"), (9, "222220")]
)
def test_all_but_the_last_of_a_segment_run_once_more(length, rebuilt):
    chain = assert_same(two_steps, length)
    assert chain.rebuilt == rebuilt
    assert chain.tally.replays == {str(i): 2 for i in range(6)}
    assert chain.tally.calls == {"recompute": 12}


class Normed(Mlp):
    def __init__(self):
        super().__init__(0.1)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return super().forward(self.norm(x))


def test_buffers_are_updated_once():
    assert_same(two_steps, build=Normed)


class Counting(Mlp):
    """What it gives depends on a buffer that it writes and that was another one in each forward before."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return super().forward(x) * (1 + 0.1 * self.count)


def test_buffers_and_modes_are_those_of_the_forward():
    def overlapping(chain):
        first = chain.forward()
        second = chain.forward()
        chain.modules.eval()
        (first + second).sum().backward()

    assert_same(overlapping, build=Counting)
    assert_same(overlapping)


class LooksAtGradMode(Mlp):
    """As some kernels do: another way where no gradient is due, here with other bits."""

    def forward(self, x):
        hidden = self.up(x)
        return super().forward(x) * (1 if torch.is_grad_enabled() and hidden.requires_grad else 0.9)


def test_blocks_run_again_with_gradients_on():
    chain = assert_same(step, build=LooksAtGradMode)
    assert chain.rebuilt == "110110"


class InputNeedsGrad(Mlp):
    def forward(self, x):
        return super().forward(x) * (1 if x.requires_grad else 0.9)


def test_a_rebuilt_input_requires_grad_as_it_did():
    def frozen_below(chain):
        chain.modules[0].requires_grad_(False)
        chain.forward(chain.x.detach()).sum().backward()

    assert_same(frozen_below, build=InputNeedsGrad)
    assert_same(step, build=InputNeedsGrad)


class Detaches(InputNeedsGrad):
    def forward(self, x):
        hidden = super().forward(x)
        return hidden.detach(), hidden.sum()


def test_a_rebuilt_input_requires_no_grad_where_it_did_not():
    def detached(chain):
        x, total = chain.x * 1, 0
        for index in range(6):
            x, number = chain.block(index, x)
            total = total + number
        total.backward()

    assert assert_same(detached, build=Detaches).rebuilt == "110110"


class Penalized(Mlp):
    """Takes a gradient within its forward."""

    def forward(self, x):
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(torch.tanh(self.up(point)).sum(), point)
        return super().forward(x) + slope


def test_a_gradient_within_a_block():
    assert_same(step, build=Penalized)


class Tuple(Mlp):
    def forward(self, x, bias=None):
        bias = x.sum() if bias is None else bias
        return super().forward(x) * bias, bias


class Dict(Mlp):
    def forward(self, x):
        return {"hidden": super().forward(x), "other": x.sum()}


def test_outputs_of_several_tensors():
    def hand_on_both(chain):
        x, bias = chain.x * 1, None
        for index in range(6):
            x, bias = chain.block(index, x, bias=bias)
        x.sum().backward()

    assert assert_same(hand_on_both, build=Tuple).rebuilt == "110110"

    def by_name(chain):
        x = chain.x * 1
        for index in range(6):
            x = chain.block(index, x)["hidden"]
        x.sum().backward()

    assert assert_same(by_name, build=Dict).rebuilt == "110110"


class Twice(Mlp):
    def forward(self, x, *, residual):
        return super().forward(x) * residual


def test_an_input_that_is_given_twice():
    def twice(chain):
        x = chain.x * 1
        for index in range(6):
            x = chain.block(index, x, residual=x)
        x.sum().backward()

    assert assert_same(twice, build=Twice).rebuilt == "110110"


# -- Where a chain breaks ----------------------------------------------------------------------------------------------


def replaced(index, x):
    return x * 2 if index == 1 else x


def written(index, x):
    return x.mul_(2) if index == 1 else x


def written_without_grad(index, x):
    if index == 1:
        with torch.no_grad():
            x.view(-1)[3] = 5
    return x


def viewed(index, x):
    return x.view_as(x) if index == 1 else x


@pytest.mark.parametrize("between", [replaced, written, written_without_grad, viewed])
def test_what_changes_a_hidden_state_between_blocks_begins_a_segment(between):
    chain = assert_same(lambda chain: step(chain, between=between))
    assert chain.rebuilt == "101100"


def test_a_block_that_is_kept_begins_a_segment():
    def keep_two(chain):
        x = chain.x * 1
        for index in range(6):
            x = chain.modules[index](x) if index in (1, 4) else chain.block(index, x)
        x.sum().backward()

    assert assert_same(keep_two).rebuilt == "001000"


def test_a_block_without_graph_begins_a_segment():
    def frozen_below(chain):
        chain.modules[:2].requires_grad_(False)
        chain.forward(chain.x.detach()).sum().backward()

    chain = assert_same(frozen_below)
    assert chain.rebuilt == "001100"
    assert chain.tally.calls == {"no graph": 2, "recompute": 4}


def test_hooks_that_replace_or_change_the_hidden_state():
    hooks = [lambda module, args, out: out * 2, lambda module, args, out: out.mul_(2), lambda module, args, out: None]
    rebuilt = []
    for hook in hooks:
        results = []
        for kind in (KEEP, RECOMPUTE):
            torch.manual_seed(0)
            model = nn.Sequential(*(Mlp(0.1) for _ in range(6)))
            blocks = find_blocks(model)
            tally = Tally()
            model[1].register_forward_hook(hook)
            plan = Plan(dict.fromkeys((block.name for block in blocks), kind))
            with Installed(
                blocks, plan, Settings("full", segment=3), Runners(blocks, Settings("full", segment=3), tally)
            ):
                model(torch.randn(4, 8)).sum().backward()
            results.append([parameter.grad for parameter in model.parameters()])
        assert equal(*results)
        rebuilt.append(sum(tally.rebuilt_inputs.values()))
    assert rebuilt == [3, 3, 4]


class Skips(Mlp):
    skipped = False

    def forward(self, x):
        return x if self.skipped else super().forward(x)


def test_a_block_that_returns_its_input():
    def skip_some(chain):
        chain.modules[1].skipped = chain.modules[2].skipped = True
        return step(chain)

    assert_same(skip_some, build=Skips)


# -- Changes in place of what backward needs ---------------------------------------------------------------------------


def kept_output(chain, index, outputs):
    chain.forward(between=lambda i, x: outputs.append(x) or x)
    return outputs[index]


@pytest.mark.parametrize("index", [0, 1, 2, 4])
@pytest.mark.parametrize("through_view", [False, True])
def test_an_input_changed_after_its_use_raises_as_autograd_does(index, through_view):
    chain, outputs = Chain(3), []
    hidden = kept_output(chain, index, outputs)
    loss = outputs[-1].sum()
    if through_view:
        hidden = hidden.detach().view(-1)
        outputs.clear()
    with torch.no_grad():
        hidden.mul_(2)
    with pytest.raises(RuntimeError, match=CHANGED):
        loss.backward()


class WritesItsInput(Mlp):
    def forward(self, x):
        return super().forward(x.mul_(2))


@pytest.mark.parametrize("length", [1, 3])
def test_a_block_that_writes_its_input_raises_as_autograd_does(length):
    chain = Chain(length, build=WritesItsInput)
    with pytest.raises(RuntimeError, match=CHANGED):
        step(chain)


class Scaled(Mlp):
    def forward(self, x, scale):
        return super().forward(x) * scale


@pytest.mark.parametrize("when", [0, 1, 2])
def test_another_input_changed_after_its_use_raises_as_autograd_does(when):
    chain = Chain(3, num=3, build=Scaled)
    scales = [torch.full((8,), 2.0) for _ in range(3)]
    x = chain.x * 1
    for index, scale in enumerate(scales):
        x = chain.block(index, x, scale)
    scales[when].mul_(2)
    with pytest.raises(RuntimeError, match=CHANGED):
        x.sum().backward()


# -- Graphs in unusual order -------------------------------------------------------------------------------------------


def test_a_graph_that_is_kept():
    def twice(chain):
        loss = chain.forward().square().sum()
        loss.backward(retain_graph=True)
        loss.backward()

    assert assert_same(twice).rebuilt == "220220"


def test_second_derivatives():
    def penalty(chain):
        (slope,) = torch.autograd.grad(chain.forward().square().sum(), chain.x, create_graph=True)
        slope.square().sum().backward()

    assert_same(penalty)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_before_a_backward(order):
    def both(chain):
        losses = [chain.forward().square().sum() for _ in range(2)]
        for index in order:
            losses[index].backward()

    assert assert_same(both).rebuilt == "220220"


def test_passes_that_alternate_between_blocks():
    def alternating(chain):
        x = y = chain.x * 1
        for index in range(6):
            x, y = chain.block(index, x), chain.block(index, y)
        (x * y).sum().backward()

    assert_same(alternating)


@pytest.mark.parametrize("index", [0, 1, 2, 3, 4])
def test_backward_from_the_middle(index):
    def partial(chain):
        outputs = []
        hidden = kept_output(chain, index, outputs)
        hidden.square().sum().backward(retain_graph=True)
        outputs[-1].square().sum().backward()

    assert_same(partial)


def test_backward_of_one_part_only():
    def one_part(chain):
        outputs = []
        hidden = kept_output(chain, 3, outputs)
        (gradient,) = torch.autograd.grad(outputs[-1].sum(), hidden, retain_graph=True)
        outputs[-1].square().sum().backward()
        return [gradient]

    assert_same(one_part)


class Failing(Mlp):
    fails = False

    def forward(self, x):
        if self.fails:
            raise KeyboardInterrupt
        return super().forward(x * torch.rand(()))


def test_an_exception_in_a_forward():
    def fail_once(chain):
        chain.modules[4].fails = True
        with pytest.raises(KeyboardInterrupt):
            chain.forward()
        chain.modules[4].fails = False
        return step(chain)

    assert assert_same(fail_once, build=Failing).rebuilt == "110110"


def test_an_exception_in_an_extra_forward():
    chain = Chain(3, build=Failing)
    loss = chain.forward().sum()
    before = torch.get_rng_state()
    chain.modules[4].fails = True
    with pytest.raises(KeyboardInterrupt):
        loss.backward(retain_graph=True)
    assert chain.rebuilt == "000110"
    assert torch.equal(before, torch.get_rng_state())
    chain.modules[4].fails = False
    chain.x.grad = None
    chain.modules.zero_grad()
    loss.backward()
    expected = Chain(None, build=Failing)
    expected.forward().sum().backward()
    assert equal(chain.gradients(), expected.gradients())


@pytest.mark.parametrize("end", ["dropped", "backward", "partial", "kept", "failed"])
def test_everything_is_freed_without_the_garbage_collector(end):
    gc.collect()
    gc.disable()
    try:
        with LiveBytes() as live:
            chain = Chain(3, build=Failing)
            chain.x.grad = torch.zeros_like(chain.x)
            for parameter in chain.modules.parameters():
                parameter.grad = torch.zeros_like(parameter)
            start = live.current
            finish(chain, end)
            del chain.x.grad
            assert live.current == start - chain.x.nbytes
    finally:
        gc.enable()


def finish(chain, end):
    outputs = []
    hidden = kept_output(chain, 4, outputs)
    loss = outputs[-1].sum()
    outputs.clear()
    if end == "partial":
        torch.autograd.grad(loss, hidden, retain_graph=True)
    elif end == "failed":
        chain.modules[1].fails = True
        with pytest.raises(KeyboardInterrupt):
            loss.backward()
    elif end != "dropped":
        loss.backward(retain_graph=end == "kept")


def test_nothing_is_owned_between_passes():
    chain = Chain(3)
    output = chain.forward()
    link = chain.blocks[0].segments._last.link
    assert link() is not None
    del output
    assert link() is None


# -- Precision ---------------------------------------------------------------------------------------------------------


def test_autocast_of_the_forward():
    def mixed(chain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = chain.forward().float().square().sum()
        loss.backward()

    assert assert_same(mixed).rebuilt == "110110"


def test_another_precision_begins_a_segment():
    def mixed(chain):
        x = chain.x * 1
        with torch.autocast("cpu", torch.bfloat16):
            for index in range(6):
                with torch.autocast("cpu", torch.bfloat16, enabled=index != 4):
                    x = chain.block(index, x)
        x.float().square().sum().backward()

    assert assert_same(mixed).rebuilt == "110000"


def test_casts_of_weights_are_freed_after_each_extra_forward():
    peaks = []
    for length in (2, 6):
        torch.manual_seed(0)
        chain = Chain(length, build=lambda: Mlp(width=64))
        x = torch.randn(1, 64)
        with LiveBytes(chain.modules) as live, torch.autocast("cpu", torch.bfloat16):
            loss = chain.forward(x).float().sum()
        torch.clear_autocast_cache()
        start = live.current
        with live:
            live.reset_peak()
            torch.autograd.grad(loss, chain.modules[5].down.bias)
        peaks.append(live.peak - start)
    assert peaks[1] - peaks[0] < 64 * 128 * 2  # of four blocks more, less than one matrix of weights


# -- Whole models ------------------------------------------------------------------------------------------------------


def lora(model):
    config = LoraConfig(target_modules="all-linear", lora_dropout=0.1, init_lora_weights=False, r=2)
    torch.manual_seed(1)
    return get_peft_model(model, config).train()


def no_change(model):
    return model


def train(case, change, segment=None, steps=2):
    """Losses, gradients, buffers and random numbers after some steps; in segments if a length is given."""
    model = without_cache(change(case.build(dropout=0.1)))
    blocks, tally = find_blocks(model), Tally()
    kind = KEEP if segment is None else RECOMPUTE
    settings = Settings("full", segment=segment or 1)
    plan = Plan(dict.fromkeys((b.name for b in blocks), kind))
    installed = Installed(blocks, plan, settings, Runners(blocks, settings, tally))
    torch.manual_seed(7)
    losses = []
    for _ in range(steps):
        with installed:
            loss = model(**case.batch())["loss"]
            loss.backward()
        losses.append(loss.detach())
    gradients = [parameter.grad for parameter in model.parameters()]
    return [*losses, *gradients, *model.buffers(), torch.get_rng_state()], tally


# Rebuilt inputs of one step with segments of two: of stacks that hand a hidden state from block to block, half.
REBUILT = {
    "llama": 2, "gpt2": 1, "bert": 1, "vit": 1, "t5": 2, "whisper": 2, "mixtral": 2, "gemma3n": 2, "qwen_vl": 2,
    "convnextv2": 3, "wav2vec2_conformer": 2, "albert": 1, "openai_gpt": 1, "residual_net": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", REBUILT)
def test_architectures_are_exact(name):
    kept, _ = train(CASES[name], no_change)
    rebuilt, tally = train(CASES[name], no_change, segment=2)
    assert equal(kept, rebuilt)
    assert sum(tally.rebuilt_inputs.values()) == 2 * REBUILT[name]


def test_lora_with_dropout_is_exact():
    kept, _ = train(CASES["llama"], lora)
    rebuilt, tally = train(CASES["llama"], lora, segment="sqrt")
    assert equal(kept, rebuilt)
    assert sum(tally.rebuilt_inputs.values()) == 4


LAYERS, INPUT_BYTES = 16, 4 * 32 * 64 * 4  # layers; batch, tokens, hidden size, bytes of a number


def llama16():
    torch.manual_seed(0)
    config = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, **heads)).train()


def measure(segment):
    """Bytes held at the end of forward by the allocator's and by autograd's count, the peak, and FLOPs of a step."""
    model, tally = llama16(), Tally()
    blocks = find_blocks(model)
    plan = Plan(dict.fromkeys((block.name for block in blocks), RECOMPUTE))
    settings = Settings("full", segment=segment)
    installed = Installed(blocks, plan, settings, Runners(blocks, settings, tally))
    ids = torch.randint(64, (4, 32))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with installed, LiveBytes(model, ids) as live:
        start = live.current
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        held = live.current - start
        loss.backward()
        peak = live.peak - start
    with installed, FlopCounter() as flops:
        tally.counter = flops
        with SavedBytes(model) as saved:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        stored = saved.bytes
        loss.backward()
    return held, peak, stored, flops.total, tally


def test_what_segments_save_and_cost():
    full = measure(1)
    (one_forward,) = set(full[4].block_flops.values())
    # length -> inputs stored, most inputs there at once (stored and rebuilt), blocks run once more
    for length, (stored, most, extra) in {2: (8, 9, 8), 4: (4, 7, 12), "sqrt": (4, 7, 12), 16: (1, 16, 15)}.items():
        held, peak, saved, flops, tally = measure(length)
        assert full[0] - held == (LAYERS - stored) * INPUT_BYTES
        assert full[2] - saved == (LAYERS - stored) * INPUT_BYTES
        assert full[1] - peak == (LAYERS - most) * INPUT_BYTES
        assert flops - full[3] == extra * one_forward
        assert tally.replays == Counter(dict.fromkeys(full[4].replays, 2))
        assert sum(tally.rebuilt_inputs.values()) == 2 * extra


def test_an_outer_hook_gets_what_is_stored_and_nothing_twice():
    chain, packed = Chain(3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        output = chain.forward()
    empty = torch.Size([0])
    assert packed == [torch.Size([4, 8]), empty, empty] * 2
    output.sum().backward()
