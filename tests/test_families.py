"""Whole models under `checkpointing`: what one architecture does differently must not change a bit of what it learns.

The reference is the same model alone on the same seed. It runs without key/value cache, as every checkpointed step does:
a cache changes the memory layout of keys and values, and with it the order in which kernels add, hence the last bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import CASES, HIDDEN, IMAGE_TOKEN, VOCABULARY
from torch import Tensor, nn
from torch.nn import functional as F

from ckpt_trainer import checkpointing
from ckpt_trainer.blocks import find_blocks
from ckpt_trainer.memory import SavedBytes

STEPS = 2  # a buffer that was updated twice in the first step shows in the second

# ALBERT applies its one block three times; all others call each block once per step.
CALLS_PER_BLOCK = {"albert": 3}
# peft wraps models of transformers only.
WITH_LORA = [name for name in CASES if name not in ("residual_net", "plain_transformer")]

# Reentrant recompute computes the gradients of each call of a block in a backward of its own. What several calls share,
# the states that an encoder hands to decoder blocks or ALBERT's one block, then gets their gradients added in another
# order: equal but for rounding. All other models are equal in bits.
ADDED_IN_ANOTHER_ORDER = ("t5", "whisper", "albert")
REFUSED_REENTRANT = {
    "mixtral": "output_router_logits=True",
    "gemma3n": "num_kv_shared_layers=2",
}


def fully(model: nn.Module) -> nn.Module:
    return model


def with_lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    kind = model.config.model_type
    config = LoraConfig(
        # peft refuses Mamba's out_proj, which its kernel reads as a weight, and dropout on experts.
        target_modules=["in_proj", "x_proj", "dt_proj"] if kind == "mamba" else "all-linear",
        lora_dropout=0.0 if kind == "mixtral" else 0.1,
        init_lora_weights=False,  # at the usual zeros half of the gradients are zero, whatever goes wrong
        r=2,
    )
    return get_peft_model(model, config).train()


def upper_blocks_only(model: nn.Module) -> nn.Module:
    """Embeddings and the first block of each stack frozen, and all that lies outside of blocks."""
    model.requires_grad_(False)
    for block in find_blocks(model):
        if not block.name.endswith(".0") or block.stack.endswith("albert_layer_groups"):
            block.module.requires_grad_(True)
    return model


TRAINED = {"full": fully, "lora": with_lora, "frozen": upper_blocks_only}
EACH = [(name, trained) for name in CASES for trained in TRAINED if trained != "lora" or name in WITH_LORA]
each = pytest.mark.parametrize(("name", "trained"), EACH)


@dataclass(frozen=True)
class Result:
    """What some steps gave, and what they took.

    Args:
        values: Losses, gradients of parameters, buffers and the state of the random numbers, by name.
        saved_bytes: Held for backward at the end of the last forward, parameters and buffers excluded.
        calls: Calls of blocks by what was done.
        replays: Replays by block.
        left: What is found on the model afterwards.
    """

    values: dict[str, Tensor | None]
    saved_bytes: int
    calls: Counter[str]
    replays: Counter[str]
    left: list[Any]


def without_cache(model: nn.Module) -> nn.Module:
    for config in configs(model):
        config.use_cache = False
    return model


def autocast(dtype: torch.dtype | None) -> Any:
    return torch.autocast("cpu", dtype) if dtype else nullcontext()


def run(
    model: nn.Module, batch: dict[str, Any], dtype: torch.dtype | None = None, steps: int = STEPS, **flags: Any
) -> Result:
    """Train some steps, under `checkpointing` if there are flags."""
    torch.manual_seed(3)
    values: dict[str, Tensor | None] = {}
    tally = None
    with checkpointing(model, **flags) if flags else nullcontext() as state:
        tally = state and state.tally
        for step in range(steps):
            with SavedBytes(model) as saved, autocast(dtype):
                loss = model(**batch)["loss"]
            saved_bytes = saved.bytes
            loss.backward()
            values[f"loss of step {step}"] = loss.detach()
    values |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    values |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    values["random state"] = torch.get_rng_state()
    counted = (tally.calls, tally.replays) if tally else (Counter(), Counter())
    return Result(values, saved_bytes, *counted, footprint(model))


@cache
def alone(name: str, trained: str, dtype: torch.dtype | None = None) -> Result:
    return run(without_cache(TRAINED[trained](CASES[name].build())), CASES[name].batch(), dtype)


def checkpointed(name: str, trained: str, dtype: torch.dtype | None = None, **flags: Any) -> Result:
    model = TRAINED[trained](CASES[name].build())
    caches, buffers = use_cache(model), dict(model.named_buffers())
    result = run(model, CASES[name].batch(), dtype, **{"mode": "full", **flags})
    assert use_cache(model) == caches
    # The same objects, not only the same values: a replay writes to copies.
    assert all(buffer is buffers[key] for key, buffer in model.named_buffers())
    return result


def footprint(model: nn.Module) -> list[Any]:
    """All that checkpointing may leave behind on modules. Some models put hooks on themselves in their first forward."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        (name, set(vars(module)), [len(vars(module)[key]) for key in hooks]) for name, module in model.named_modules()
    ]


def use_cache(model: nn.Module) -> list[Any]:
    return [getattr(part, "use_cache", "absent") for part in configs(model)]


def configs(model: nn.Module) -> list[Any]:
    own = [module.config for module in model.modules() if hasattr(module, "config")]
    return [*own, *(part for config in own for part in vars(config).values() if hasattr(part, "to_dict"))]


def different(left: Result, right: Result, tolerance: float = 0.0) -> list[str]:
    """Names of the values that differ, by more than `tolerance` times their largest."""
    assert left.values.keys() == right.values.keys()
    return [name for name, value in left.values.items() if not same(value, right.values[name], tolerance)]


def same(a: Tensor | None, b: Tensor | None, tolerance: float = 0.0) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or (tolerance > 0 and bool((a - b).abs().max() <= tolerance * a.abs().max()))


def num_calls(name: str) -> int:
    """Calls of blocks in all steps."""
    return STEPS * CALLS_PER_BLOCK.get(name, 1) * len(find_blocks(CASES[name].build()))


def num_no_graph(name: str, trained: str) -> int:
    """Calls below the first trainable parameter: where it is in the second block, those of the first."""
    # wav2vec2 itself makes the sound it gets require grad.
    return STEPS if trained == "frozen" and name not in ("albert", "wav2vec2_conformer") else 0


def assert_replayed(name: str, trained: str, result: Result, no_graph: int) -> None:
    expected = {"recompute": num_calls(name) - no_graph, "no graph": no_graph}
    assert result.calls == {key: number for key, number in expected.items() if number}
    each_block = STEPS * CALLS_PER_BLOCK.get(name, 1)
    skipped = {block.name for block in find_blocks(CASES[name].build())[:1] if no_graph}
    names = {block.name for block in find_blocks(CASES[name].build())} - skipped
    assert result.replays == dict.fromkeys(names, each_block)


@each
def test_exact(name, trained):
    ours, reference = checkpointed(name, trained), alone(name, trained)
    assert different(ours, reference) == []
    assert_replayed(name, trained, ours, num_no_graph(name, trained))
    assert ours.saved_bytes < reference.saved_bytes
    assert ours.left == reference.left


@each
def test_reentrant_is_exact_or_refused(name, trained):
    if name in REFUSED_REENTRANT:
        with pytest.raises(ValueError, match=REFUSED_REENTRANT[name]):
            checkpointed(name, trained, use_reentrant=True)
        return
    ours, reference = checkpointed(name, trained, use_reentrant=True), alone(name, trained)
    assert different(ours, reference, 1e-5 if name in ADDED_IN_ANOTHER_ORDER else 0.0) == []
    assert_replayed(name, trained, ours, num_no_graph(name, trained))
    assert ours.saved_bytes < reference.saved_bytes
    assert ours.left == reference.left


@each
def test_input_gradients_that_nobody_needs_change_nothing(name, trained):
    ours = checkpointed(name, trained, input_grads="always")
    assert different(ours, alone(name, trained)) == []
    assert_replayed(name, trained, ours, 0)


# case, settings, the blocks that are replayed by component: their numbers in their stacks
PARTS = [
    ("llava", {"every_n": 2}, {"vision": [0, 2], "text": [0]}),
    ("llava", {"modules": {"vision": "none"}}, {"text": [0, 1]}),
    ("llava", {"modules": {"text": "none"}}, {"vision": [0, 1, 2]}),
    ("llava", {"mode": "none", "modules": {"vision": "full"}}, {"vision": [0, 1, 2]}),
    ("qwen_vl", {"every_n": 3}, {"vision": [0], "text": [0]}),
    ("qwen_vl", {"modules": {"vision": "none"}, "every_n": 2}, {"text": [0]}),
    ("qwen_vl", {"modules": {"text": "none"}}, {"vision": [0, 1, 2]}),
    ("whisper", {"every_n": 2}, {"audio": [0, 2], "text": [0]}),
    ("whisper", {"modules": {"audio": "none"}}, {"text": [0, 1]}),
    ("whisper", {"modules": {"*decoder.layers.1": "none", "text": "full"}}, {"audio": [0, 1, 2], "text": [0]}),
    ("t5", {"every_n": 2}, {"text": [0, 2, 0]}),
    ("t5", {"modules": {"decoder*": "none"}}, {"text": [0, 1, 2]}),
    ("gemma3n", {"every_n": 2}, {"text": [0, 2]}),
    ("gemma3n", {"modules": {"model.layers.[23]": "none"}}, {"text": [0, 1]}),
    ("convnextv2", {"every_n": 2}, {"vision": [0, 0, 2, 0]}),
]


@pytest.mark.parametrize("trained", ["full", "frozen"])
@pytest.mark.parametrize(("name", "flags", "expected"), PARTS, ids=str)
def test_parts_of_a_model_are_exact_and_counted_by_stack(name, flags, expected, trained):
    ours = checkpointed(name, trained, **flags)
    assert different(ours, alone(name, trained)) == []
    replayed: dict[str, list[int]] = {}
    for block in find_blocks(CASES[name].build()):
        if block.name in ours.replays:
            replayed.setdefault(block.component, []).append(int(block.name.rpartition(".")[2]))
    if trained == "frozen" and (first := find_blocks(CASES[name].build())[0].component) in expected:
        expected = {**expected, first: expected[first][1:]}
    assert replayed == {component: numbers for component, numbers in expected.items() if numbers}
    assert set(ours.replays.values()) == {STEPS}


@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5", "mixtral", "llava", "mamba", "gemma3n"])
def test_exact_in_mixed_precision(name, trained):
    ours = checkpointed(name, trained, torch.bfloat16)
    assert different(ours, alone(name, trained, torch.bfloat16)) == []
    assert_replayed(name, trained, ours, 0)
    assert different(ours, alone(name, trained)) != []  # it was another precision


@pytest.mark.parametrize("name", CASES)
def test_evaluation_is_left_alone(name):
    model = CASES[name].build().eval()
    batch = CASES[name].batch()
    with torch.no_grad():
        expected = without_cache(CASES[name].build()).eval()(**batch)
        with checkpointing(model) as state:
            found = model(**batch)
    assert torch.equal(found["loss"], expected["loss"])
    assert torch.equal(found["logits"], expected["logits"])
    assert not state.tally.replays
    assert set(state.tally.calls) == {"no grad"}


@pytest.mark.parametrize("name", CASES)
def test_gradients_in_evaluation_mode(name):
    """Some train so, to keep running statistics and dropout still."""
    model, batch = CASES[name].build().eval(), CASES[name].batch()
    ours = run(model, batch, mode="full")
    assert different(ours, run(without_cache(CASES[name].build()).eval(), batch)) == []
    assert ours.replays.total() == num_calls(name)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "whisper", "llava", "mamba", "gemma3n"])
def test_generate_gives_the_same_tokens_within_and_after(name, training):
    batch = {key: value for key, value in CASES[name].batch().items() if key != "labels"}

    def tokens(model: nn.Module) -> Tensor:
        return model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)

    expected = tokens(CASES[name].build(dropout=0.0).train(training))
    model = CASES[name].build(dropout=0.0).train(training)
    with checkpointing(model) as state:
        model(**CASES[name].batch())["loss"].backward()
        replays = state.tally.replays.copy()
        assert torch.equal(tokens(model), expected)
        assert state.tally.replays == replays
    assert torch.equal(tokens(model), expected)


# What some train instead of weights: soft prompts, or an image against a frozen model.
@pytest.mark.parametrize("flags", [{}, {"use_reentrant": True}, {"input_grads": "always"}], ids=str)
@pytest.mark.parametrize("trained", ["full", "lora", "nothing"])
@pytest.mark.parametrize(
    ("name", "key"),
    [("llama", "inputs_embeds"), ("gpt2", "inputs_embeds"), ("bert", "inputs_embeds"), ("mamba", "inputs_embeds"),
     ("t5", "inputs_embeds"), ("mixtral", "inputs_embeds"), ("vit", "pixel_values"), ("convnextv2", "pixel_values"),
     ("whisper", "input_features"), ("residual_net", "pixel_values")],
)  # fmt: skip
def test_an_input_that_requires_grad_gets_it(name, key, trained, flags):
    if (name in REFUSED_REENTRANT and flags.get("use_reentrant")) or (trained == "lora" and name not in WITH_LORA):
        return

    def gradient(**flags: Any) -> tuple[Tensor | None, Result]:
        model = without_cache(CASES[name].build())
        model = model.requires_grad_(False) if trained == "nothing" else TRAINED[trained](model)
        batch = CASES[name].batch()
        if key == "inputs_embeds":
            batch[key] = torch.randn(*batch.pop("input_ids").shape, HIDDEN, generator=torch.Generator().manual_seed(4))
        batch[key].requires_grad_()
        result = run(model, batch, **flags)
        return batch[key].grad, result

    (expected, reference), (found, ours) = gradient(), gradient(mode="full", **flags)
    tolerance = 1e-5 if flags.get("use_reentrant") and name in ADDED_IN_ANOTHER_ORDER else 0.0
    assert expected is not None
    assert same(expected, found, tolerance)
    assert different(ours, reference, tolerance) == []
    assert ours.replays.total() == num_calls(name)


class InPlace(nn.Module):
    """Changes in place what its embeddings gave, as blt, git and udop do, and what its blocks give."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.linear(x).relu_(), 0.1, self.training).add_(x)

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(self.Block() for _ in range(3))
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embeddings(input_ids)
        x[:, 0] = 1.0
        x += torch.arange(x.shape[1]).unsqueeze(-1)
        for layer in self.layers:
            x = layer(x).mul_(0.9)
        return {"loss": F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


def git() -> nn.Module:
    size = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = transformers.GitVisionConfig(**size, image_size=32, patch_size=16)
    config = transformers.GitConfig(
        vision_config=vision.to_dict(), **size, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1
    )
    return transformers.GitForCausalLM(config).train()


def seeded(build: Callable[[], nn.Module], trained: str) -> nn.Module:
    torch.manual_seed(0)
    return TRAINED[trained](build())


def text(length: int) -> dict[str, Tensor]:
    rows = torch.randint(3, IMAGE_TOKEN, (2, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": rows, "labels": rows}


@pytest.mark.parametrize("flags", [{}, {"input_grads": "always"}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("trained", ["full", "frozen", "lora"])
@pytest.mark.parametrize("build", [InPlace, git])
def test_models_that_change_their_embeddings_in_place(build, trained, flags):
    if build is InPlace and trained == "lora":
        return
    batch = text(8)
    if build is git:
        batch["pixel_values"] = CASES["vit"].batch()["pixel_values"]
    reference = run(without_cache(seeded(build, trained)), batch)
    ours = run(seeded(build, trained), batch, mode="full", **flags)
    assert different(ours, reference) == []
    assert ours.replays


class Conditioned(nn.Module):
    """Its blocks share tensors that it computes and hands to them as keywords, alone and in tuples."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x: Tensor, *, shift: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
            return x + gates[0] * F.dropout(self.linear(x + shift), 0.1, self.training) + gates[1]

    def __init__(self, changes_keyword: bool = False) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, HIDDEN)
        self.shift, self.gate = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.layers = nn.ModuleList(self.Block() for _ in range(3))
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        self.changes_keyword = changes_keyword

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embeddings(input_ids)
        shift, gates = self.shift(x), (self.gate(x).sigmoid(), self.gate(x).tanh())
        for layer in self.layers:
            x = layer(x, shift=shift, gates=gates)
            if self.changes_keyword:
                shift += 1
        return {"loss": F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


@pytest.mark.parametrize(
    ("flags", "tolerance"), [({}, 0.0), ({"use_reentrant": True}, 1e-5), ({"input_grads": "always"}, 0.0)], ids=str
)
def test_tensors_that_blocks_share_as_keywords(flags, tolerance):
    reference = run(seeded(Conditioned, "full"), text(8))
    ours = run(seeded(Conditioned, "full"), text(8), mode="full", **flags)
    assert different(ours, reference, tolerance) == []
    assert ours.replays == {f"layers.{number}": STEPS for number in range(3)}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_keyword_that_is_changed_in_place_is_an_error_and_not_a_wrong_gradient(use_reentrant):
    model = seeded(lambda: Conditioned(changes_keyword=True), "full")
    run(model, text(8))  # alone it is no error: nothing keeps the old value
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(model, text(8), mode="full", use_reentrant=use_reentrant)


@pytest.mark.parametrize("flags", [{}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED_REENTRANT])
def test_passes_that_overlap(name, flags):
    """Two forwards before a backward, one that is dropped, one without gradients, and backwards in another order."""

    def overlapping(**flags: Any) -> Result:
        model, batch = without_cache(CASES[name].build()), CASES[name].batch()
        torch.manual_seed(3)
        with checkpointing(model, **flags) if flags else nullcontext() as state:
            losses = [model(**batch)["loss"] for _ in range(3)]
            del losses[2]
            with torch.no_grad():
                model(**batch)
            losses[1].backward()
            losses[0].backward()
            model(**batch)["loss"].backward()
        values = {key: parameter.grad for key, parameter in model.named_parameters()}
        values |= dict(model.named_buffers()) | {"random state": torch.get_rng_state()}
        return Result(values, 0, Counter(), state.tally.replays if state else Counter(), [])

    tolerance = 1e-5 if flags.get("use_reentrant") and name in ADDED_IN_ANOTHER_ORDER else 0.0
    ours = overlapping(mode="full", **flags)
    assert different(ours, overlapping(), tolerance) == []
    assert set(ours.replays.values()) == {3 * CALLS_PER_BLOCK.get(name, 1)}


def steps_with_a_change(build: Callable[[], nn.Module], change: Callable[[nn.Module], Any], **flags: Any) -> Result:
    """One step, then a change of the model by its user, then another step."""
    model = seeded(build, "full")
    batch = text(8) if isinstance(model, Scheduled) else CASES["residual_net"].batch()
    torch.manual_seed(3)
    with checkpointing(model, **flags) if flags else nullcontext() as state:
        for step in range(2):
            model(**batch)["loss"].backward()
            if step == 0:
                change(model)
    values = {key: parameter.grad for key, parameter in model.named_parameters()}
    values |= dict(model.named_buffers()) | {"random state": torch.get_rng_state()}
    return Result(values, 0, Counter(), state.tally.replays if state else Counter(), [])


class Scheduled(InPlace):
    """Its blocks read the rate of their dropout from a config, as attention does that hands it to a function."""

    class Block(nn.Module):
        config: Any

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            return x + F.dropout(self.linear(x), self.config.hidden_dropout, self.training)

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig(hidden_dropout=0.0)
        for layer in self.layers:
            layer.config = self.config


def frozen_statistics() -> nn.Module:
    model = CASES["residual_net"].build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


@pytest.mark.parametrize(
    ("build", "change"),
    [(frozen_statistics, nn.Module.train), (Scheduled, lambda model: setattr(model.config, "hidden_dropout", 0.5))],
    ids=["batch norm", "rate in a config"],
)
def test_what_starts_to_change_or_to_draw_after_the_first_step(build, change):
    reference, ours = steps_with_a_change(build, change), steps_with_a_change(build, change, mode="full")
    assert different(ours, reference) == []
    assert ours.replays


@pytest.mark.parametrize(("input_grads", "requires_grad"), [("auto", False), ("always", True)])
def test_frozen_embeddings_require_grad_where_asked(input_grads, requires_grad):
    model, seen = upper_blocks_only(CASES["llama"].build()), []
    with checkpointing(model, input_grads=input_grads):
        # Put on after ours, so it sees what ours makes of the output.
        look = model.get_input_embeddings().register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
        model(**CASES["llama"].batch())
        look.remove()
    assert seen == [requires_grad]
