"""Which blocks are found: by name, stack and component, in real architectures, wrapped ones and made-up ones."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import CASES, HIDDEN, PlainTransformer, llama, plain_transformer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ckpt_trainer.blocks import find_blocks, largest_groups

# case -> (stack, number of blocks, component), in order
HF_LAYERS = {
    "llama": [("model.layers", 4, "text")],
    "gpt2": [("transformer.h", 3, "text")],
    "bert": [("bert.encoder.layer", 3, "text")],
    "roberta": [("roberta.encoder.layer", 2, "text")],
    "vit": [("vit.layers", 3, "vision")],
    "t5": [("encoder.block", 3, "text"), ("decoder.block", 2, "text")],
    "whisper": [("model.encoder.layers", 3, "audio"), ("model.decoder.layers", 2, "text")],
    "mixtral": [("model.layers", 4, "text")],
    "gemma3n": [("model.layers", 4, "text")],
    "llava": [("model.vision_tower.encoder.layers", 3, "vision"), ("model.language_model.layers", 2, "text")],
    "qwen_vl": [("model.visual.blocks", 3, "vision"), ("model.language_model.layers", 2, "text")],
    "mamba": [("backbone.layers", 3, "text")],
    "wav2vec2_conformer": [
        ("wav2vec2_conformer.feature_extractor.conv_layers", 2, "audio"),
        ("wav2vec2_conformer.encoder.layers", 3, "audio"),
    ],
    "swin": [("swin.encoder.layers.0.blocks", 2, "vision"), ("swin.encoder.layers.1.blocks", 2, "vision")],
}
if transformers.__version__.startswith("4."):
    HF_LAYERS["vit"] = [("vit.encoder.layer", 3, "vision")]
    HF_LAYERS["llava"][0] = ("model.vision_tower.vision_model.encoder.layers", 3, "vision")
    HF_LAYERS["swin"] = [("swin.encoder.layers", 2, "vision")]  # there the stages are HF layers, the blocks are not
SIBLINGS = {
    "convnextv2": [(f"convnextv2.encoder.stages.{i}.layers", n, "vision") for i, n in enumerate((2, 3, 2))],
    "openai_gpt": [("transformer.h", 3, "text")],
    "albert": [("albert.encoder.albert_layer_groups", 1, "text")],
    "residual_net": [("stage1", 2, "text"), ("stage2", 2, "text")],
    "plain_transformer": [("blocks", 4, "text")],
}


def names(model):
    return [block.name for block in find_blocks(model)]


def numbered(stack, n):
    return [f"{stack}.{i}" for i in range(n)]


@pytest.mark.parametrize("name", CASES)
def test_blocks_of_case(name):
    model = CASES[name].build()
    expected = {**HF_LAYERS, **SIBLINGS}[name]

    blocks = find_blocks(model)

    assert [b.name for b in blocks] == [block for stack, n, _ in expected for block in numbered(stack, n)]
    assert [b.stack for b in blocks] == [stack for stack, n, _ in expected for _ in range(n)]
    assert [b.component for b in blocks] == [component for _, n, component in expected for _ in range(n)]
    assert all(b.native == (name in HF_LAYERS) for b in blocks)
    assert all(model.get_submodule(b.name) is b.module for b in blocks)


@pytest.mark.parametrize("name", CASES)
def test_every_case_trains_a_step(name):
    model, again = CASES[name].build(), CASES[name].build()
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    loss = model(**CASES[name].batch())["loss"]
    loss.backward()

    gradients = [p.grad for block in find_blocks(model) for p in block.module.parameters()]
    assert loss.isfinite()
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_trainable_follows_requires_grad():
    block = find_blocks(llama(num_layers=2))[0]
    assert block.trainable
    block.module.requires_grad_(False)
    assert not block.trainable
    block.module.mlp.up_proj.weight.requires_grad_(True)
    assert block.trainable


@pytest.mark.parametrize("name", ["llama", "gpt2", "plain_transformer", "convnextv2", "llava"])
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_prefixes_of_wrappers_are_removed(name, wrap):
    model = CASES[name].build()
    wrapped = wrap(model)
    assert names(wrapped) == names(model)
    assert [b.module for b in find_blocks(wrapped)] == [b.module for b in find_blocks(model)]


def test_wrapped_in_distributed_data_parallel(tmp_path):
    model = plain_transformer()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(torch.compile(model))
        assert names(wrapped) == numbered("blocks", 4)
    finally:
        torch.distributed.destroy_process_group()


def test_blocks_compiled_one_by_one():
    model = llama(num_layers=2)
    layers = list(model.model.layers)
    for i, layer in enumerate(layers):
        model.model.layers[i] = torch.compile(layer)
    blocks = find_blocks(model)
    assert [b.name for b in blocks] == numbered("model.layers", 2)
    assert [b.module for b in blocks] == layers


def test_attributes_named_like_prefixes_are_kept():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.ModuleDict({"base_model": PlainTransformer()})

    assert names(Holder()) == numbered("module.base_model.blocks", 4)
    assert names(nn.DataParallel(Holder())) == numbered("module.base_model.blocks", 4)


@pytest.mark.parametrize("name", ["llama", "bert", "llava", "whisper", "mixtral"])
def test_lora_changes_no_name(name):
    model = CASES[name].build()
    before = [(b.name, b.component) for b in find_blocks(model)]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert [(b.name, b.component) for b in find_blocks(adapted)] == before
    assert all(b.trainable for b in find_blocks(adapted))


@pytest.mark.parametrize("bias", ["none", "all"])
def test_lora_on_top_layers_of_plain_model(bias):
    targets = [f"blocks.{i}.{linear}" for i in (6, 7) for linear in ("query", "up")]
    config = LoraConfig(r=2, target_modules=targets, bias=bias)
    model = get_peft_model(plain_transformer(num_layers=8), config)
    assert names(model) == numbered("blocks", 8)
    if bias == "none":
        assert [b.trainable for b in find_blocks(model)] == [False] * 6 + [True] * 2


def test_lora_in_one_layer_of_two():
    """With a class that has no other equal siblings: without looking through the adapter there would be no group."""
    model = get_peft_model(plain_transformer(num_layers=2), LoraConfig(r=2, target_modules=["blocks.1.up"]))
    assert names(model) == numbered("blocks", 2)


def test_adapter_inside_a_plain_module():
    holder = nn.Module()
    holder.writer = get_peft_model(llama(num_layers=2), LoraConfig(r=2, target_modules=["q_proj"]))
    assert names(holder) == numbered("writer.model.layers", 2)


class Layer(GradientCheckpointingLayer):
    def __init__(self, width=HIDDEN):
        super().__init__()
        self.linear = nn.Linear(width, width)


class Stage(GradientCheckpointingLayer):
    """An HF layer with HF layers inside, and `rest` parameters of its own."""

    def __init__(self, rest):
        super().__init__()
        self.blocks = nn.ModuleList([Layer(), Layer()])
        self.rest = nn.Linear(rest, rest)


def test_of_nested_hf_layers_the_inner_where_they_hold_most():
    assert names(nn.Sequential(Stage(8), Stage(8))) == ["0.blocks.0", "0.blocks.1", "1.blocks.0", "1.blocks.1"]


def test_of_nested_hf_layers_the_outer_where_it_holds_most():
    assert names(nn.Sequential(Stage(64), Stage(64))) == ["0", "1"]


class Wide(nn.Module):
    """A layer of experts or heads, all alike."""

    def __init__(self, experts=4):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(experts))


def test_experts_and_heads_are_no_blocks():
    assert names(nn.Sequential(Wide(), Wide())) == ["0", "1"]
    heads = nn.ModuleDict({"body": plain_transformer(), "heads": nn.ModuleList(nn.Linear(32, 32) for _ in range(8))})
    assert names(heads) == numbered("body.blocks", 4)


def test_unequal_layer_of_a_block_class_is_a_block():
    """The dense first layers of a sparse model; were they searched further, their experts would be found."""
    assert names(nn.Sequential(Wide(3), Wide(), Wide())) == ["0", "1", "2"]


def test_unequal_stages_are_searched_for_their_layers():
    def stage(width, first):
        return nn.ModuleList([nn.ModuleDict({"conv": nn.Conv2d(c, width, 1)}) for c in (first, width, width)])

    found = find_blocks(nn.Sequential(stage(8, 4), stage(16, 8)))
    assert [b.name for b in found] == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]
    assert {b.stack for b in found} == {"0", "1"}


def test_unequal_siblings_are_no_blocks():
    """Same class, but no two alike: a list of parts, not a stack of layers."""
    assert names(nn.ModuleList(nn.ModuleDict({"linear": nn.Linear(n, n)}) for n in (8, 16, 32))) == []


def test_siblings_of_two_classes_are_no_group():
    class Other(Wide):
        pass

    assert names(nn.Sequential(Wide(2), Other(2))) == ["0.experts.0", "0.experts.1", "1.experts.0", "1.experts.1"]


def test_sequential_is_no_block_class():
    """Equal blocks written as `nn.Sequential` say nothing about what else is a `nn.Sequential`, such as a stage."""
    small = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
    stage = nn.Sequential(Wide(), Wide())
    assert names(nn.ModuleDict({"small": small, "stages": nn.ModuleList([stage, nn.Sequential(nn.Linear(4, 4))])})) == [
        *numbered("small", 2),
        *numbered("stages.0", 2),
    ]


def test_trainability_and_dtype_do_not_matter():
    model = plain_transformer(num_layers=2)
    model.blocks[0].requires_grad_(False).bfloat16()
    assert names(model) == numbered("blocks", 2)


def test_small_groups_are_no_blocks():
    small = nn.ModuleList(nn.ModuleDict({"linear": nn.Linear(4, 4)}) for _ in range(3))
    assert names(nn.ModuleDict({"table": nn.Embedding(1000, 64), "small": small})) == []
    assert len(names(nn.ModuleDict({"table": nn.Embedding(10, 64), "small": small}))) == 3


def test_siblings_beside_hf_layers_are_found():
    """Florence, Idefics2: a tower that HF cannot checkpoint, next to one that it can."""
    model = nn.ModuleDict({"vision_tower": plain_transformer(), "language_model": llama(num_layers=2)})
    blocks = find_blocks(model)
    assert [(b.name, b.native, b.component) for b in blocks] == [
        *((name, False, "vision") for name in numbered("vision_tower.blocks", 4)),
        *((name, True, "text") for name in numbered("language_model.model.layers", 2)),
    ]


def test_siblings_inside_or_around_hf_layers_are_no_blocks():
    class Rich(GradientCheckpointingLayer):
        def __init__(self):
            super().__init__()
            self.wide = Wide()

    around = nn.ModuleList(nn.ModuleDict({"layer": Rich()}) for _ in range(2))
    assert names(around) == ["0.layer", "1.layer"]


def test_a_module_used_twice_is_one_block():
    layer = Layer()
    assert names(nn.ModuleDict({"first": nn.Sequential(layer), "second": nn.Sequential(layer)})) == ["first.0"]


def test_single_block_counts_only_where_nothing_else_is_found():
    one = nn.ModuleList([Wide(1)])
    assert names(nn.ModuleDict({"one": one})) == ["one.0"]
    assert names(nn.ModuleDict({"one": one, "many": plain_transformer()})) == numbered("many.blocks", 4)
    assert names(nn.ModuleDict({"one": one, "table": nn.Embedding(1000, 64)})) == []


def test_order_is_that_of_named_modules():
    model = nn.ModuleDict({"a": plain_transformer(num_layers=2), "b": Layer(), "c": plain_transformer(num_layers=2)})
    found = names(model)
    assert found == [name for name, _ in model.named_modules() if name in found]
    assert len(found) == 5


def test_components_of_audio_and_vision_decoders():
    """A model that hears and writes, whose decoder does not say so itself; and one that only sees."""
    size = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 32}
    hears = transformers.Speech2TextModel(transformers.Speech2TextConfig(**size, **heads))
    assert [b.component for b in find_blocks(hears)] == ["audio"] * 2 + ["text"] * 2
    vit = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    vit |= {"image_size": 32, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 2}
    sees = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(**vit, decoder_num_attention_heads=2, decoder_intermediate_size=16)
    )
    assert [b.component for b in find_blocks(sees)] == ["vision"] * 4


def test_components_of_joined_models():
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    vision, text = transformers.ViTConfig(**size, image_size=32), transformers.BertConfig(**size, vocab_size=32)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    blocks = find_blocks(transformers.VisionEncoderDecoderModel(config))
    assert [b.component for b in blocks] == ["vision"] * 2 + ["text"] * 2


class PartConfig(transformers.PretrainedConfig):
    model_type = "part"


class Part(transformers.PreTrainedModel):
    config_class = PartConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList([Layer(), Layer()])


class Whole(transformers.PreTrainedModel):
    """Names of attributes say nothing; what is given to which part does."""

    config_class = PartConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second, self.third = Part(config.audio_config), Part(config.text_config), Layer()
        self.fourth = Part(config.encoder_config)


def test_components_from_the_parts_of_a_config():
    config = PartConfig()
    config.audio_config, config.text_config, config.encoder_config = PartConfig(), PartConfig(), PartConfig()
    config.encoder_config.model_type = "some_speech_plus"
    blocks = find_blocks(Whole(config))
    assert [b.component for b in blocks] == ["audio"] * 2 + ["text"] * 3 + ["audio"] * 2


def test_base_model_is_not_judged_by_its_name():
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.VisualBertForPreTraining(transformers.VisualBertConfig(**size, vocab_size=32))
    assert [(b.name, b.component) for b in find_blocks(model)] == [
        ("visual_bert.encoder.layer.0", "text"),
        ("visual_bert.encoder.layer.1", "text"),
    ]


def test_vision_part_without_text_part():
    """GIT: its config has a part for vision and none for text, which is the model itself."""
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.GitConfig(**size, vocab_size=32, vision_config={**size, "image_size": 32})
    blocks = {b.name: b.component for b in find_blocks(transformers.GitForCausalLM(config))}
    assert blocks["git.image_encoder.vision_model.encoder.layers.0"] == "vision"
    assert blocks["git.encoder.layer.0"] == "text"


def test_model_without_blocks():
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "head": nn.Linear(4, 2)})
    assert find_blocks(model) == []
    assert largest_groups(model) == [("net", 3), ("", 2)]
    assert largest_groups(model, limit=1) == [("net", 3)]
