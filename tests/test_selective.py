"""Mode `selective` as a whole: the same bits on many architectures, the bytes it stores, and what may go wrong around it.

What one engine does by itself is tested beside it (`test_rebuild`, `test_stored_results`, `test_stored_modules`).
Plain runs are without key/value cache, as in `test_families`.
"""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from more_models import LENGTH, MORE_CASES, SIZED, WIDTH
from test_families import upper_blocks_only, with_lora, without_cache
from tiny_models import CASES, llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError

from ckpt_trainer import checkpointing
from ckpt_trainer.blocks import find_blocks
from ckpt_trainer.flops import FlopCounter
from ckpt_trainer.memory import LiveBytes

EVERY = {**CASES, **MORE_CASES}
TIERS = ("expensive", "matmul", "half_matmul", "attention")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def flags_of(save):
    return {"mode": "full"} if save == "full" else {"mode": "selective", "save": save}


def batch_of(name, dtype=torch.float32):
    batch = EVERY[name].batch()
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def children(model):
    """Every second module directly below a block, to be stored as modules."""
    blocks = [block for block in find_blocks(model) if block.trainable]
    names = {name: None for block in blocks for name, child in block.module.named_children()}
    # A list of modules is never called itself.
    return [f"{name}*" for name in list(names)[::2]]


def train(model, batch, num_steps=2, autocast=None, **flags):
    """What each step gives, by name, from the same start every time: loss, gradients, buffers, random numbers."""
    torch.manual_seed(3)
    found = {}
    with checkpointing(model, **flags) if flags else nullcontext():
        for step in range(num_steps):
            with torch.autocast("cpu", autocast) if autocast else nullcontext():
                loss = model(**batch)["loss"]
            loss.backward()
            found |= {f"{step}: loss": loss.detach(), f"{step}: random numbers": torch.get_rng_state()}
            found |= {f"{step}: {name}": parameter.grad for name, parameter in model.named_parameters()}
            found |= {f"{step}: {name}": buffer.clone() for name, buffer in model.named_buffers()}
            model.zero_grad()
    return found


def different(model, batch, selections, **options):
    """Selection -> what is not bitwise as without us, where there is any."""
    without_cache(model)
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    theirs = train(model, batch, **options)
    wrong = {}
    for key, flags in selections.items():
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(start[name])
        ours = train(model, batch, **options, **flags)
        assert ours.keys() == theirs.keys()
        wrong[key] = [name for name, value in theirs.items() if not equal(value, ours[name])]
    return {key: names for key, names in wrong.items() if names}


def equal(a, b):
    return a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(a, b)


# Too much like others for the time they take.
FP32_ONLY = ("roberta", "albert", "openai_gpt", "gemma3n", "t5", "whisper", "olmo2", "plain_transformer")
EACH = [(name, dtype) for name in EVERY for dtype in DTYPES if dtype == "fp32" or name not in FP32_ONLY]


@pytest.mark.parametrize(("name", "dtype"), EACH)
def test_exact(name, dtype):
    model = EVERY[name].build().to(DTYPES[dtype])
    selections = {save: flags_of(save) for save in TIERS}
    # Each of the two once: half the time.
    selections |= {"ops": flags_of(["aten.*"])} if dtype == "fp32" else {"modules": flags_of(children(model))}
    assert different(model, batch_of(name, DTYPES[dtype]), selections) == {}


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "mixtral", "mamba", "vit", "qwen3_next", "gpt_oss"])
def test_exact_in_mixed_precision(name):
    model = EVERY[name].build()
    selections = {save: flags_of(save) for save in TIERS}
    assert different(model, batch_of(name), selections, autocast=torch.bfloat16) == {}


PARTLY = [(name, with_lora) for name in ("llama", "gpt2", "t5", "mixtral", "phi3", "vit")]
PARTLY += [(name, upper_blocks_only) for name in ("llama", "gpt2", "mixtral", "phi3", "mamba2", "qwen3_next")]


@pytest.mark.parametrize(("name", "trained"), PARTLY)
def test_exact_where_not_all_is_trained(name, trained):
    model = trained(EVERY[name].build())
    selections = {save: flags_of(save) for save in TIERS} | {"modules": flags_of(children(model))}
    # The embedding is frozen, so that no input of the first block requires grad.
    assert different(model, batch_of(name), selections) == {}


PARTS = {
    "vision full, attention of text": {"mode": "none", "modules": {"vision": "full", "text": "selective:attention"}},
    "two tiers": {"modules": {"vision": "selective:expensive", "text": "selective:half_matmul"}},
    "every second": {"mode": "selective", "save": "matmul", "every_n": 2},
    "one block": {"mode": "selective", "modules": {"*layers.1": "selective:mm,attention"}},
}


@pytest.mark.parametrize("name", ["llava", "qwen_vl", "whisper"])
def test_parts_are_exact(name):
    parts = {"every second": PARTS["every second"], "every second, expensive": {"mode": "selective", "every_n": 2}}
    parts = parts if name == "whisper" else {**PARTS, **parts}
    if name == "qwen_vl":
        del parts["one block"]
    assert different(EVERY[name].build(), batch_of(name), parts) == {}


def test_parts_do_what_they_say():
    model = without_cache(CASES["llava"].build())
    with checkpointing(model, **PARTS["vision full, attention of text"]) as state:
        for _ in range(2):
            model(**CASES["llava"].batch()).loss.backward()
    kinds = Counter((block.component, str(state.plan[block.name].short)) for block in find_blocks(model))
    assert kinds == {("vision", "recompute"): 3, ("text", "selective:attention"): 2}
    assert set(state.tally.replays.values()) == {2}


# Bytes and FLOPs


def held_bytes(build, layers, batch, flags, dtype=torch.float32, warm_up=1):
    """Bytes alive when a forward ends: the second, by which what is looked at once and what is learned has its effect."""
    model = without_cache(build(layers)).to(dtype)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    with checkpointing(model, **flags) if flags else nullcontext():
        for _ in range(warm_up):
            model(**batch)["loss"].backward()
        model.zero_grad()
        with LiveBytes() as live:
            out = model(**batch)  # noqa: F841
            return live.current


def bytes_per_block(name, save=None, dtype=torch.float32, warm_up=1):
    """By the difference of two models, so that embeddings, head and loss drop out."""
    build, batch, _ = SIZED[name]
    flags = {} if save is None else flags_of(save)
    more, fewer = (held_bytes(build, layers, batch(), flags, dtype, warm_up) for layers in (4, 2))
    return (more - fewer) / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIZED)
def test_share_of_bytes_that_expensive_stores(name, dtype):
    limit = SIZED[name][2]
    ours, theirs = (bytes_per_block(name, save, DTYPES[dtype]) for save in ("expensive", None))
    assert ours <= limit * theirs, f"{ours / theirs:.3f}"


# Of one block of the sized Llama, in tokens times features: queries and output, keys and values, gate and up, down.
TOKENS, INNER = 2 * LENGTH, 352
ROLES = {"q": WIDTH, "k": WIDTH // 2, "v": WIDTH // 2, "o": WIDTH, "gate": INNER, "up": INNER}


def test_leaner_tiers_store_less():
    stored = {save: bytes_per_block("llama", save) for save in (*TIERS, "full", None)}
    assert stored[None] > stored["matmul"] > stored["half_matmul"] > stored["attention"] > stored["full"]
    assert stored["half_matmul"] < stored["expensive"] < stored[None]
    # The block's input is all that is left, and what attention gives: values, and a number for each head and token.
    assert stored["full"] == 4 * TOKENS * WIDTH
    assert stored["attention"] - stored["full"] == 4 * TOKENS * (WIDTH + 4)
    assert stored["matmul"] - stored["attention"] == 4 * TOKENS * sum(ROLES.values())


def test_the_last_matmul_of_a_block_is_not_stored_from_the_second_step_on():
    first, second = (bytes_per_block("llama", "matmul", warm_up=number) for number in (0, 1))
    assert first - second == 4 * TOKENS * WIDTH


def num_flops(save):
    """FLOPs of the second step."""
    model = without_cache(SIZED["llama"][0](2))
    with checkpointing(model, **flags_of(save)) if save else nullcontext():
        for _ in range(2):
            with FlopCounter() as flops:
                model(**SIZED["llama"][1]())["loss"].backward()
    return flops.total


def test_flops_that_are_replayed():
    plain = num_flops(None)
    extra = {save: (num_flops(save) - plain) / 2 for save in (*TIERS, "full")}
    matmuls = 2 * TOKENS * WIDTH * sum(ROLES.values())
    attention = 4 * TOKENS * LENGTH * WIDTH
    assert extra["full"] == matmuls + attention
    assert extra["attention"] == matmuls
    assert extra["half_matmul"] == pytest.approx(matmuls / 2, rel=0.2)
    assert extra["matmul"] == extra["expensive"] == 0
    # By module, by op, and both.
    wide = 2 * TOKENS * WIDTH * 2 * INNER
    for chosen, replayed in (
        (["mlp.*"], matmuls - wide + attention),
        (["self_attn", "mm"], 0),
        (["mlp.gate_proj", "attention"], matmuls - wide / 2),
    ):
        assert (num_flops(chosen) - plain) / 2 == replayed


# What may go wrong


def small_llama(**options):
    return without_cache(llama(2, dropout=0.0, attn_implementation="eager", **options))


def gradients(model, loss, **options):
    return torch.autograd.grad(loss, list(model.parameters()), **options)


def loss_of(model):
    return model(**batch_of("llama"))["loss"]


def all_equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


SPOTS = {
    "input": lambda block: block.input_layernorm,
    "q_proj": lambda block: block.self_attn.q_proj,
    "gate_proj": lambda block: block.mlp.gate_proj,
    "o_proj": lambda block: block.self_attn.o_proj,
    "down_proj": lambda block: block.mlp.down_proj,
    "norm": lambda block: block.post_attention_layernorm,
    "activation": lambda block: block.mlp.act_fn,
}
# What backward cannot do without, by what is stored.
NEEDED = {
    "expensive": {"input", "gate_proj"},
    "matmul": {"input", "q_proj", "gate_proj"},
    "half_matmul": {"input", "q_proj"},
    "attention": {"input"},
    "aten.*": {"input", "q_proj", "gate_proj", "activation"},
}


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("spot", SPOTS)
@pytest.mark.parametrize("save", NEEDED)
def test_change_in_place_between_forward_and_backward(save, spot, step):
    """Raises as autograd does, or the tensor is not needed and gradients are right; never wrong."""
    model = small_llama()
    theirs = gradients(model, loss_of(model))
    caught = []

    def catch(module, args, output):
        caught.append(args[0] if spot == "input" else output)

    with checkpointing(model, **flags_of(save if save in TIERS else [save])):
        for _ in range(step):
            gradients(model, loss_of(model))
        handle = SPOTS[spot](model.model.layers[0]).register_forward_hook(catch)
        loss = loss_of(model)
        with torch.no_grad():
            caught[0].mul_(2)
        handle.remove()
        try:
            ours = gradients(model, loss)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
        else:
            assert spot not in NEEDED[save]
            assert all_equal(ours, theirs)
        # Nothing of it stays.
        assert all_equal(gradients(model, loss_of(model)), theirs)


def test_change_in_place_of_a_weight_raises():
    model = small_llama()
    with checkpointing(model, mode="selective"):
        loss = loss_of(model)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(model, loss)


@pytest.mark.parametrize("save", [*TIERS, "aten.*", "mlp.*"])
def test_graph_that_is_kept_gives_the_same_twice(save):
    model = small_llama()
    theirs = gradients(model, loss_of(model))
    with checkpointing(model, **flags_of(save if save in TIERS else [save])):
        for _ in range(2):
            loss = loss_of(model)
            for retain_graph in (True, True, False):
                assert all_equal(gradients(model, loss, retain_graph=retain_graph), theirs)


@pytest.mark.parametrize("save", [*TIERS, "aten.*", "mlp.*"])
def test_backward_in_parts(save):
    """What a first, partial backward does not ask for, a second may."""
    model = small_llama()
    lower, upper = list(model.model.layers[0].parameters()), list(model.model.layers[1].parameters())
    theirs = [torch.autograd.grad(loss_of(model), part) for part in (upper, lower)]
    with checkpointing(model, **flags_of(save if save in TIERS else [save])):
        for _ in range(2):
            loss = loss_of(model)
            for part, expected in zip((upper, lower, upper), (*theirs, theirs[0]), strict=True):
                assert all_equal(torch.autograd.grad(loss, part, retain_graph=True), expected)


@pytest.mark.parametrize("save", [*TIERS, "aten.*", "mlp.*"])
def test_double_backward_is_right_or_refused(save):
    model = small_llama()
    once = gradients(model, loss_of(model))

    def penalty_gradients():
        first = gradients(model, loss_of(model), create_graph=True)
        return gradients(model, sum(gradient.square().sum() for gradient in first), allow_unused=True)

    theirs = penalty_gradients()
    with checkpointing(model, **flags_of(save if save in TIERS else [save])):
        for _ in range(2):
            try:
                ours = penalty_gradients()
            except RuntimeError:
                assert save not in TIERS
                continue
            assert all(map(equal, ours, theirs))
        # Then as ever.
        assert all_equal(gradients(model, loss_of(model)), once)


# What of a block is run again, so that a hook on it is.
RUN_AGAIN = {"expensive": 0, "matmul": 1, "half_matmul": 1, "attention": 1}


@pytest.mark.parametrize("save", TIERS)
def test_hooks_inside_a_block(save):
    """They run in the forward, and in a replay where there is one; what they change counts."""
    model, calls = small_llama(), Counter()

    def double(module, args, output):
        calls["norm"] += 1
        return output * 2

    model.model.layers[0].input_layernorm.register_forward_hook(double)
    model.model.layers[0].register_forward_hook(lambda *args: calls.update(["block"]))
    theirs = gradients(model, loss_of(model))
    with checkpointing(model, **flags_of(save)):
        for _ in range(2):
            calls.clear()
            assert all_equal(gradients(model, loss_of(model)), theirs)
            assert calls == {"norm": 1 + RUN_AGAIN[save], "block": 1}


class Reads(nn.Module):
    """Blocks that read something that is not an input, a parameter or a buffer."""

    class Block(nn.Module):
        def __init__(self, read):
            super().__init__()
            self.read = read
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            return x + self.down(torch.nn.functional.silu(self.up(x)) * self.read())

    def __init__(self, read):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(self.Block(read) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return {"loss": x.square().sum()}


def read_gradients(model, change=lambda: None):
    torch.manual_seed(1)
    loss = model(torch.randn(16, 16))["loss"]
    change()
    return gradients(model, loss)


@pytest.mark.parametrize("save", TIERS)
def test_what_a_block_reads_may_change_where_it_is_not_run_again(save):
    """A replay reads what is there then, which the README says; `expensive` has none."""
    numbers = iter(range(1, 1000))
    theirs = read_gradients(Reads(lambda: next(numbers)))
    numbers = iter(range(1, 1000))
    with checkpointing(model := Reads(lambda: next(numbers)), **flags_of(save)):
        assert all_equal(read_gradients(model), theirs) == (save == "expensive")


class Writes(Reads):
    """Blocks that write in place to something before they are done with it, in some steps."""

    class Block(nn.Module):
        def __init__(self, forward):
            super().__init__()
            self.gate, self.scale = nn.Linear(16, 16), nn.Parameter(torch.ones(16))
            self.does, self.writes = forward, False

        def forward(self, x):
            return self.does(self, x)


def writes_weight(block, x):
    total = block.gate(x).cumsum(0).sin() + block.scale  # which does not save the weight
    if block.writes:
        with torch.no_grad():
            block.scale.mul_(2)
    return total * total.exp()


def writes_what_it_made(block, x):
    made = block.gate(x).cumsum(0)
    block.unused = made.pow(2)  # saves it, and its backward is never run
    if block.writes:
        with torch.no_grad():
            made.mul_(2)
    return (-made).pow(2)


def writes_through_a_view(block, x):
    upper, lower = block.gate(x).cumsum(0).unsafe_split(8)
    if block.writes:
        lower[0].mul_(2)
    return torch.cat([lower.t().sin().pow(2).t() * lower, upper[2:].exp().pow(2), upper[:2]])


def counts_in_complex_numbers(block, x):
    pairs = torch.view_as_complex((block.gate(x).sin().cumsum(0) / 16).view(16, 8, 2))
    other = (pairs * (2.0 if block.writes else 1.0)).cumsum(0).conj()
    return torch.view_as_real((other * other * pairs).clone()).flatten(1).pow(2) + pairs.imag.pow(2).sum() / 16


@pytest.mark.parametrize(
    "forward", [writes_weight, writes_what_it_made, writes_through_a_view, counts_in_complex_numbers]
)
def test_a_block_that_begins_to_do_otherwise(forward, monkeypatch):
    """What came out the same in the first step, when it was looked at, is not taken for granted in the second."""
    monkeypatch.setattr("ckpt_trainer.rebuild._SMALL_BYTES", 0)

    def steps(model):
        found = []
        for writes in (False, True, False):
            for block in model.layers:
                block.writes = writes
                with torch.no_grad():
                    block.scale.fill_(1)
            torch.manual_seed(1)
            loss = model(torch.randn(16, 16).requires_grad_())["loss"]
            found.append([loss, *gradients(model, loss, allow_unused=True)])
        return found

    theirs = steps(Writes(forward))
    with checkpointing(model := Writes(forward), mode="selective"):
        ours = steps(model)
    for one, other in zip(ours, theirs, strict=True):
        assert all(map(equal, one, other))


@pytest.mark.parametrize("save", ["matmul", "half_matmul", "attention"])
def test_a_shape_that_changed_in_between_is_an_error(save):
    scale = [torch.ones(1)]
    model = Reads(lambda: torch.cat([scale[0]] * 32) if len(scale) == 1 else 1.0)
    theirs = read_gradients(model)
    with pytest.raises(CheckpointError, match=r"layers\.1"), checkpointing(model, **flags_of(save)):
        read_gradients(model, lambda: scale.append(0))
    scale.pop()
    with checkpointing(model, **flags_of(save)):
        assert all_equal(read_gradients(model), theirs)


@pytest.mark.parametrize("save", [*TIERS, "aten.*", "mlp.*"])
def test_random_numbers_and_buffers_that_a_replay_sees(save):
    """Noise that a block draws itself, and a buffer that it counts up and reads."""

    class Noisy(Reads):
        def __init__(self):
            super().__init__(None)
            for layer in self.layers:
                layer.register_buffer("count", torch.zeros(()))
                layer.read = lambda layer=layer: self.noise(layer)

        def noise(self, layer):
            layer.count += 1
            return layer.count + torch.rand(1, 1) + torch.randn(32).exp()

    def two_steps():
        return [*read_gradients(model), *read_gradients(model), *model.buffers(), torch.get_rng_state()]

    model = Noisy()
    theirs = two_steps()
    model = Noisy()
    save = save if save in TIERS else [{"mlp.*": "up"}.get(save, save)]
    with checkpointing(model, **flags_of(save)):
        assert all_equal(two_steps(), theirs)


@pytest.mark.parametrize("save", [*TIERS, "aten.*", "mlp.*"])
def test_a_dropped_graph_is_freed(save):
    model = small_llama()
    gc.collect()
    gc.disable()
    try:
        with checkpointing(model, **flags_of(save if save in TIERS else [save])):
            loss_of(model).backward()
            model.zero_grad()
            with LiveBytes() as live:
                # Never run backward, half of it, and all.
                loss = loss_of(model)
                del loss
                assert live.current == 0
                loss = loss_of(model)
                torch.autograd.grad(loss, model.lm_head.weight)
                del loss
                assert live.current == 0
                loss = loss_of(model)
                gradients(model, loss)
                assert live.current == loss.nbytes
    finally:
        gc.enable()


@pytest.mark.parametrize("save", [*TIERS, "aten.*", "mlp.*"])
def test_two_forwards_before_a_backward(save):
    model = without_cache(llama(2))
    one = batch_of("llama")
    other = {**one, "input_ids": one["input_ids"].flip(1)}

    def both(order):
        torch.manual_seed(3)
        losses = [model(**batch)["loss"] for batch in (one, other)]
        found = {number: gradients(model, losses[number]) for number in order}
        return [*found[0], *found[1], torch.get_rng_state()]

    theirs = both((0, 1))
    with checkpointing(model, **flags_of(save if save in TIERS else [save])):
        for order in ((0, 1), (1, 0)):
            assert all_equal(both(order), theirs)


@pytest.mark.parametrize("save", [*TIERS, "aten.*", "mlp.*"])
def test_a_step_after_an_exception_is_right(save):
    model = without_cache(llama(2))

    def step():
        torch.manual_seed(3)
        return gradients(model, loss_of(model))

    def fail(module, args):
        raise KeyError("on purpose")

    theirs = step()
    with checkpointing(model, **flags_of(save if save in TIERS else [save])):
        for module in (model.model.layers[1].mlp, model.lm_head, model.model.layers[0].self_attn.k_proj):
            handle = module.register_forward_pre_hook(fail)
            with pytest.raises(KeyError, match="on purpose"):
                step()
            handle.remove()
            assert all_equal(step(), theirs)


@pytest.mark.parametrize("save", TIERS)
def test_evaluation_and_generate_in_between(save):
    model = llama(2)
    prompt = batch_of("llama")["input_ids"][:, :6]

    def look():
        with torch.no_grad():
            loss = loss_of(model.eval())
        tokens = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        model.train()
        return [loss, tokens]

    def step():
        torch.manual_seed(3)
        return gradients(model, loss_of(model))

    seen = look()
    model.config.use_cache = False
    theirs = step()
    model.config.use_cache = True
    with checkpointing(model, **flags_of(save)) as state:
        for _ in range(2):
            assert all_equal(step(), theirs)
            assert all_equal(look(), seen)
        done = "rebuild" if save == "expensive" else "recompute"
        assert set(state.tally.calls) == {"no grad", done}
        assert state.tally.calls[done] == 4
    assert all_equal(look(), seen)
    assert all("forward" not in vars(module) for module in model.modules())


class Modes(TorchDispatchMode):
    """Counts the ops that reach it."""

    def __enter__(self):
        self.ops = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[func._overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


def test_a_replay_runs_no_op_whose_result_is_stored():
    """Also those of which there is no formula for FLOPs."""
    model, counts = without_cache(EVERY["deberta"].build(dropout=0.0)), {}
    for save in (None, "matmul", "aten.*"):
        with checkpointing(model, **flags_of([save] if save == "aten.*" else save)) if save else nullcontext():
            for _ in range(2):
                loss = model(**batch_of("deberta"))["loss"]
                with Modes() as modes:
                    loss.backward()
        counts[save] = modes.ops
    for op in ("aten::addmm", "aten::bmm", "aten::gelu", "aten::native_layer_norm"):
        assert counts["aten.*"][op] == counts[None][op]
    assert counts["matmul"]["aten::addmm"] == counts[None]["aten::addmm"] == 0


def test_compiled_model_is_as_without_us():
    torch._dynamo.reset()
    model = without_cache(llama(1, dropout=0.0))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    theirs = gradients(model, compiled(**batch_of("llama"))["loss"])
    for save in ("expensive", "attention", ["mm"]):
        with checkpointing(compiled, **flags_of(save)):
            for _ in range(2):
                assert all_equal(gradients(model, compiled(**batch_of("llama"))["loss"]), theirs)
