"""What each kind of action stores, moved to the host: on many architectures and with all else that one may ask for, the
bits are those of mode `full`, nothing races, and nothing is left over."""

import gc
import time
from contextlib import nullcontext

import pytest
import torch
from fake_device import FakeStreams
from test_families import upper_blocks_only, with_lora, without_cache
from test_offload_schedules import Device
from test_selective import DTYPES, EVERY, batch_of, children, equal, train
from torch import nn

from ckpt_trainer import checkpointing
from ckpt_trainer.blocks import Block, find_blocks
from ckpt_trainer.install import Installed, Runners, offloading_of
from ckpt_trainer.offload import Offloading
from ckpt_trainer.plan import Action, Plan, Settings
from ckpt_trainer.recompute import Tally

KINDS = ("recompute", "selective:expensive", "selective:matmul", "selective:attention", "modules", "keep")
ROOMY, TINY = 2**22, 3 * 4096


@pytest.fixture
def device(monkeypatch):
    gc.disable()  # What is left over must not wait for it.
    yield Device(monkeypatch)
    gc.enable()


class Model:
    """One model, which starts each time from the same buffers.

    Args:
        name: In `EVERY`.
        change: What to do to it first.
    """

    def __init__(self, name, dtype="fp32", change=lambda model: model):
        self.model = change(without_cache(EVERY[name].build().to(DTYPES[dtype])))
        self.batch = batch_of(name, DTYPES[dtype])
        self._start = {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def train(self, **options):
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self._start[name])
        return train(self.model, self.batch, **options)

    def action(self, kind, place="host"):
        """What a policy returns for each block."""
        return f"selective:{','.join(children(self.model))}@{place}" if kind == "modules" else f"{kind}@{place}"

    @property
    def own(self):
        # What modules cached included.
        held = (value for module in self.model.modules() for value in vars(module).values())
        tensors = (*self.model.parameters(), *self.model.buffers(), *self.batch.values(), *held)
        strided = (value for value in tensors if isinstance(value, torch.Tensor) and value.layout is torch.strided)
        return {tensor.untyped_storage()._cdata for tensor in strided}


def assert_exact(device, model, wanted, moves=True, timing="lazy", **flags):
    fake = device.start(timing)
    flags = {"host_budget": ROOMY, **flags}
    found = model.train(**flags)
    assert found.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not equal(value, found[name])] == []
    wait_for_disk(device)
    device.assert_clean(model)
    assert moves in (fake.num_copies("out") > 0, None)
    moved = {storage._cdata for copy in fake.copies if (storage := copy.source.storage()) is not None}
    blocks = [block.module for block in find_blocks(model.model)]
    stay = [tensor for block in blocks for tensor in (*block.parameters(), *block.buffers())]
    assert moved.isdisjoint(tensor.untyped_storage()._cdata for tensor in stay)
    assert fake.host_bytes <= flags["host_budget"]
    return fake


def wait_for_disk(device):
    """The threads that write and read may hold host memory for a moment longer."""
    deadline = time.monotonic() + 10
    while any(pool.in_use for pool in device.pools) and time.monotonic() < deadline:
        time.sleep(0.001)


# Architectures

EACH = [(name, dtype) for name in EVERY for dtype in DTYPES]


@pytest.mark.parametrize(("name", "dtype"), EACH)
def test_every_architecture(device, name, dtype):
    model, place = Model(name, dtype), list(EVERY).index(name)
    wanted = model.train(mode="full")
    for number, kind in enumerate(KINDS):
        # In half precision two kinds of the six, and little memory or other timing for some architectures.
        if dtype == "bf16" and (number + place) % 3:
            continue
        timing, cap = ("lazy", "random")[(place // 2) % 2], (ROOMY, TINY)[place % 3 == 2]
        flags = {"host_budget": cap, "prefetch": 1 + (number + place) % 2, "moves": True if cap == ROOMY else None}
        assert_exact(device, model, wanted, timing=timing, policy=lambda block, kind=kind: model.action(kind), **flags)


# Models of which not all is trained, and calls of another kind


def lower_half_frozen(model):
    blocks = find_blocks(model)
    for block in blocks[: len(blocks) // 2]:
        block.module.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    return model


PARTLY = [("llama", with_lora), ("llama", upper_blocks_only), ("llama", lower_half_frozen), ("t5", upper_blocks_only)]
PARTLY += [("mixtral", with_lora), ("mixtral", lower_half_frozen)]


@pytest.mark.parametrize(("name", "change"), PARTLY)
def test_not_all_is_trained(device, name, change):
    model = Model(name, change=change)
    wanted = model.train(mode="full")
    for kind in KINDS if name == "llama" else (KINDS[1], KINDS[2], KINDS[5]):
        assert_exact(device, model, wanted, policy=lambda block, kind=kind: model.action(kind))
    assert_exact(device, model, wanted, mode="offload", skip_frozen=False)


def test_frozen_blocks_below_are_not_moved(device):
    model = Model("llama", change=lower_half_frozen)
    fake = device.start()
    with checkpointing(model.model, mode="offload", offload_save="all", host_budget=ROOMY) as state:
        model.model(**model.batch)["loss"].backward()
    assert state.tally.calls == {"no graph": 2, "offload": 2}
    assert fake.num_copies("out") > 0


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral", "vit"])
def test_mixed_precision(device, name):
    model = Model(name)
    wanted = model.train(mode="full", autocast=torch.bfloat16)
    for kind in KINDS if name == "llama" else (KINDS[1], KINDS[2], KINDS[5]):
        policy = lambda block, kind=kind: model.action(kind)  # noqa: E731
        assert_exact(device, model, wanted, policy=policy, autocast=torch.bfloat16)


OFFLOAD = {"mode": "offload"}
OPTIONS = {
    "every second": OFFLOAD | {"every_n": 2},
    "every second, all": OFFLOAD | {"every_n": 2, "offload_save": "all"},
    "segments of two": OFFLOAD | {"segment": 2},
    "segments by themselves": OFFLOAD | {"segment": "sqrt", "host_budget": TINY},
    "reentrant": OFFLOAD | {"use_reentrant": True},
    "all random states": OFFLOAD | {"preserve_rng_state": True},
    "not stopped early": OFFLOAD | {"early_stop": False, "offload_save": "matmul"},
    "input gradients": OFFLOAD | {"input_grads": "always"},
    "pageable": OFFLOAD | {"offload_to": "pageable"},
    "no prefetch": OFFLOAD | {"prefetch": 0, "offload_save": "expensive"},
    "all ahead": OFFLOAD | {"prefetch": 100, "offload_save": "all"},
    "half a tier": OFFLOAD | {"offload_save": "half_matmul"},
    "ops": {"policy": lambda block: "selective:aten.*@host"},
    "ops and modules": {"policy": lambda block: "selective:*mm,attention,*mlp*@host"},
    "other half on the device": {"policy": lambda block: "recompute" if ".1" in block.name else "keep@host"},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_other_flags(device, name, option):
    model = Model(name)
    wanted = model.train(mode="full", use_reentrant=OPTIONS[option].get("use_reentrant", False))
    timing = "lazy" if name == "llama" else "random"
    fake = assert_exact(device, model, wanted, timing=timing, **OPTIONS[option])
    assert fake.pinned == ("pageable" not in option)


def test_segments_store_and_move_fewer_inputs(device):
    model = Model("llama")
    whole, parts = (
        assert_exact(device, model, model.train(mode="full"), mode="offload", segment=length, prefetch=0)
        for length in (1, 2)
    )
    # Of four inputs all but the last leave, and of two that are stored both, since the last block still has the mask.
    assert (whole.num_copies("out"), parts.num_copies("out")) == (2 * 3, 2 * 2)


@pytest.mark.parametrize("name", ["llava", "qwen_vl"])
@pytest.mark.parametrize(
    "modules",
    [
        {"vision": "offload", "text": "full"},
        {"vision": "full", "text": "offload:all"},
        {"vision": "offload:attention", "text": "none"},
        {"vision": "selective:matmul", "text": "offload:expensive"},
    ],
    ids=str,
)
def test_parts_of_a_model(device, name, modules):
    model = Model(name)
    assert_exact(device, model, model.train(mode="full"), mode="none", modules=modules)


MIXED = [
    f"{kind}@{place}"
    for kind in (
        "recompute",
        "selective:expensive",
        "keep",
        "selective:attention",
        "selective:matmul",
        "selective:mlp*",
    )
    for place in ("device", "host", "disk")
]


@pytest.mark.parametrize("cap", [ROOMY, TINY])
@pytest.mark.parametrize("shift", range(0, len(MIXED), 3))
def test_all_kinds_and_places_in_one_plan(device, tmp_path, shift, cap):
    """Neighbours share their input, by other kinds of handles each time."""
    model = Model("llama")
    blocks = [block.name for block in find_blocks(model.model)]
    wanted = model.train(mode="full")
    for step in (1, 5, 7):
        actions = {name: Action.from_text(MIXED[(shift + step * n) % len(MIXED)]) for n, name in enumerate(blocks)}
        flags = {"plan": Plan(actions), "offload_dir": str(tmp_path), "host_budget": cap}
        moves = any(action.place != "device" for action in list(actions.values())[:-1])
        assert_exact(device, model, wanted, moves=moves, **flags)
    assert list(tmp_path.iterdir()) == []


class OnlySome(Offloading):
    """Has nowhere to move to for some of the blocks, as where they are on a device without memory of its own.

    Args:
        there: Parameters of the others.
    """

    def __init__(self, there, *args):
        super().__init__(*args)
        self.there = {id(parameter) for parameter in there}

    def begin(self, tensors, own, to_disk=False):
        return super().begin(tensors, own, to_disk) if any(id(tensor) in self.there for tensor in own) else None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("upper", [False, True])
def test_half_of_a_model_is_where_nothing_can_be_gained(device, monkeypatch, kind, upper):
    model = Model("llama")
    wanted = model.train(mode="full")
    blocks = find_blocks(model.model)[2 * upper :][:2]
    there = [parameter for block in blocks for parameter in block.module.parameters()]
    monkeypatch.setattr("ckpt_trainer.install.Offloading", lambda *args: OnlySome(there, *args))
    assert_exact(device, model, wanted, policy=lambda block: model.action(kind))


# What users do around


@pytest.mark.parametrize("kind", KINDS)
def test_within_hooks_of_the_user(device, kind):
    """Theirs get what blocks do not store."""
    model, packed = Model("llama"), []
    wanted = model.train(mode="full")
    fake = device.start()
    with torch.autograd.graph.save_on_cpu():
        found = model.train(policy=lambda block: model.action(kind), host_budget=ROOMY)
    assert [name for name, value in wanted.items() if not equal(value, found[name])] == []
    device.assert_clean(model)
    assert fake.num_copies("out") > 0
    fake = device.start()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x.shape) or x, lambda x: x):
        found = model.train(policy=lambda block: model.action(kind), host_budget=ROOMY)
    assert [name for name, value in wanted.items() if not equal(value, found[name])] == []
    device.assert_clean(model)
    assert packed


class KeywordBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.register_buffer("gain", torch.linspace(1, 2, 32))

    def forward(self, *, hidden, pair=None, scale=None):
        up = nn.functional.dropout(nn.functional.gelu(self.up(self.norm(hidden)) * self.gain), 0.2)
        return hidden + self.down(up) * scale + (pair[0] if pair else 0)


class KeywordModel(nn.Module):
    """Blocks that get nothing by position, and some of it in a tuple."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(KeywordBlock() for _ in range(4))

    def forward(self, x):
        scale, pair = torch.linspace(0.5, 1.5, 16).expand(8, 16), (x * 2, None)
        for layer in self.layers:
            x = layer(hidden=x, pair=pair, scale=scale)
        return {"loss": x.square().mean()}


class Small:
    """The same as `Model`, of a model written here."""

    def __init__(self, model):
        self.model = model
        self.batch = {"x": torch.randn(8, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)}
        self.own = Model.own.fget(self)

    def train(self, **flags):
        found = train(self.model, self.batch, **flags)
        gradient, self.batch["x"].grad = self.batch["x"].grad, None
        return {**found, "x": gradient}


@pytest.mark.parametrize("kind", ["recompute", "keep", "selective:matmul", "selective:expensive", "selective:up"])
def test_keywords_only(device, kind):
    model = Small(KeywordModel())
    fake = assert_exact(device, model, model.train(mode="full"), policy=lambda block: f"{kind}@host")
    assert len({copy.source for copy in fake.copies if copy.way == "out"}) >= 4


class MixingBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x, mixing, shift):
        return x + mixing @ self.down((self.up(x) + shift).relu())


class Mixing(nn.Module):
    """Blocks that get a sparse tensor, and one that may be of inference mode."""

    def __init__(self, mixing, shift):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(MixingBlock() for _ in range(3))
        self.mixing, self.shift = mixing, shift

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, self.mixing, self.shift)
        return {"loss": x.square().mean()}


def of_plain_tensors(look):
    """The fake device knows no others, and they stay where they are."""
    return lambda fake, tensor: (
        look(fake, tensor) if tensor.layout is torch.strided and not tensor.is_inference() else None
    )


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("convert", [torch.Tensor.to_dense, torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_arguments_of_other_kinds(device, monkeypatch, convert, inference):
    for name in ("made", "used"):
        monkeypatch.setattr(FakeStreams, name, of_plain_tensors(getattr(FakeStreams, name)))
    with torch.inference_mode(inference):
        shift = torch.randn(8, 32)
    mixing = convert(torch.eye(8) * 2)
    model = Small(Mixing(mixing, shift))
    model.own |= {tensor.untyped_storage()._cdata for tensor in (mixing, shift) if tensor.layout is torch.strided}
    wanted = model.train(mode="none")
    # A checkpoint saves all arguments, and those of inference mode cannot be saved.
    for kind in ("keep", "selective:expensive") if inference else ("recompute", *KINDS[1:4], "selective:up", "keep"):
        fake = assert_exact(device, model, wanted, policy=lambda block, kind=kind: f"{kind}@host")
        assert fake.num_copies("out") > 0


class Outer(nn.Module):
    """A block with blocks in it, which saves something before, between and after them."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(16, 16), nn.Linear(16, 16)
        self.inner = nn.ModuleList(Inner() for _ in range(2))

    def forward(self, x):
        y = self.before(x).exp().tanh()
        for inner in self.inner:
            y = inner(y).sin() * y
        return x + self.after(y)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(nn.functional.dropout(nn.functional.silu(self.up(x)), 0.2))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Outer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return {"loss": x.square().mean()}


OUTER = ["recompute@host", "keep@host", "selective:expensive@host", "selective:before@host", "recompute"]


def nested_results(model, batch, plan=None, settings=None):
    """Gradients of two steps, under a plan for outer and inner blocks."""
    torch.manual_seed(3)
    blocks = [
        Block(name, module, name.rpartition(".")[0], "text", False)
        for name, module in model.named_modules()
        if isinstance(module, (Outer, Inner))
    ]
    settings = settings or Settings()
    made = plan and Installed(
        blocks, plan(blocks), settings, Runners(blocks, settings, Tally(), offloading_of(settings))
    )
    results = []
    for _ in range(2):
        with made or nullcontext():
            model(batch)["loss"].backward()
        results += [batch.grad, *(parameter.grad for parameter in model.parameters())]
        batch.grad = None
        model.zero_grad()
    return results


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("inner", ["recompute@host", "keep@host", "selective:matmul@host", "selective:expensive@host"])
def test_a_block_within_a_block(device, outer, inner):
    model = Small(Nested())
    batch = model.batch["x"]
    wanted = nested_results(model.model, batch)

    def plan(blocks):
        actions = {block.name: outer if isinstance(block.module, Outer) else inner for block in blocks}
        return Plan({name: Action.from_text(text) for name, text in actions.items()})

    for timing, cap, prefetch in (("lazy", ROOMY, 1), ("random", TINY, 2)):
        fake = device.start(timing)
        settings = Settings(host_budget=cap, prefetch=prefetch)
        found = nested_results(model.model, batch, plan, settings)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        device.assert_clean(model)
        assert fake.num_copies("out") > 0


# Memory


def peak_of_graph(device, model, kind, place):
    """Bytes that a forward leaves on the device for backward, of what was packed."""
    fake = device.start("eager")
    with checkpointing(model.model, policy=lambda block: model.action(kind, place), host_budget=ROOMY):
        model.model(**model.batch)["loss"].backward()  # by which what is not asked for is known
        model.model.zero_grad()
        loss = model.model(**model.batch)["loss"]
        alive = sum(memory.nbytes for memory in fake.alive("made") if memory.storage()._cdata not in model.own)
        loss.backward()
    return alive, fake.num_copies("out")


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_forward_leaves_on_the_device_does_not_grow_with_the_number_of_blocks(device, kind):
    alive = {}
    for layers in (6, 9):
        model = Model("plain_transformer", change=lambda model, n=layers: type(model)(0.1, n).train())
        alive[layers], _ = peak_of_graph(device, model, kind, "host")
    assert alive[6] == alive[9] > 0


@pytest.mark.parametrize("chosen", ["mlp", "mlp.act_fn", "self_attn", "input_layernorm,mlp.*"])
def test_what_modules_store_does_not_grow_either(device, chosen):
    alive = {}
    for layers in (6, 9):
        model = Model("llama", change=lambda model, n=layers: without_cache(EVERY["llama"].build(n)))
        alive[layers], _ = peak_of_graph(device, model, f"selective:{chosen}", "host")
    assert alive[6] == alive[9] > 0


def test_what_nobody_asked_for_is_given_up_when_the_step_ends(device):
    model = Model("llama")
    fake = device.start()
    with checkpointing(model.model, mode="offload", offload_save="all", host_budget=ROOMY):
        loss = model.model(**model.batch)["loss"]
        block = find_blocks(model.model)[2].module
        torch.autograd.grad(loss, list(block.parameters()), retain_graph=True)
        assert fake.device_bytes > 0
    assert fake.device_bytes == 0
    loss.backward()
