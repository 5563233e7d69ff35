"""Models small enough to train a step in a test, one for each way in which architectures differ, built without network.

Every case builds under transformers 4.57 and 5.23. Building seeds torch, so two builds of one case are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 64
IMAGE_TOKEN = 60
HIDDEN = 32
CLASSES = 5


@dataclass(frozen=True)
class Case:
    """One architecture.

    Args:
        name: Key in `CASES`.
        build: `build(dropout=0.1)` returns the model in fp32 and in training mode.
        batch: One batch with labels, so that `model(**batch)["loss"]` exists.
        why: What is special about it.
    """

    name: str
    build: Callable[..., nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    why: str


def text_dataset(n: int, length: int = 12) -> list[dict[str, Tensor]]:
    """`n` rows of tokens with labels, for a `Trainer` of a causal language model."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, IMAGE_TOKEN, (length,), generator=generator) for _ in range(n)]
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def tokenizer() -> Any:
    """A tokenizer of words and single letters, for trainers that want text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *["the", "cat", "sat", "on", "a", "mat"]]
    vocabulary = {word: place for place, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _text_batch() -> dict[str, Tensor]:
    rows = text_dataset(2)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, -3:] = 0
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
    batch["labels"][1, -3:] = -100
    return {**batch, "attention_mask": mask}


def _sequence_to_sequence_batch() -> dict[str, Tensor]:
    return {**_text_batch(), "labels": torch.stack([row["labels"] for row in text_dataset(2, length=7)])}


def _image_batch() -> dict[str, Tensor]:
    return {"pixel_values": _normal(2, 3, 32, 32), "labels": torch.tensor([1, 3])}


def _whisper_batch() -> dict[str, Tensor]:
    return {"input_features": _normal(2, 8, 40), "labels": text_dataset(1, length=14)[0]["labels"].view(2, 7)}


def _speech_batch() -> dict[str, Tensor]:
    return {"input_values": _normal(2, 800), "labels": text_dataset(1, length=6)[0]["labels"].view(2, 3)}


def _with_image_tokens(number: int) -> dict[str, Tensor]:
    batch = _text_batch()
    batch["input_ids"][:, 1 : 1 + number] = IMAGE_TOKEN
    batch["labels"][:, 1 : 1 + number] = -100
    return batch


def _llava_batch() -> dict[str, Tensor]:
    return {**_with_image_tokens(4), "pixel_values": _normal(2, 3, 32, 32)}


def _qwen_vl_batch() -> dict[str, Tensor]:
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])  # frames, rows and columns of patches; four patches make one token
    batch = {**_with_image_tokens(4), "pixel_values": _normal(32, 3 * 2 * 4 * 4), "image_grid_thw": grid}
    forward = transformers.Qwen2_5_VLForConditionalGeneration.forward
    if "mm_token_type_ids" in signature(forward).parameters:  # wanted by transformers 5, unknown to 4
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).long()
    return batch


def _plain_text_batch() -> dict[str, Tensor]:
    return {name: value for name, value in _text_batch().items() if name != "attention_mask"}


_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER: dict[str, Any] = {name: value for name, value in _DECODER.items() if name != "num_key_value_heads"}
_VISION: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
    "num_labels": CLASSES,
}


def _new(model_class: str, config_class: str, /, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    made = getattr(transformers, config_class)(**config)
    return getattr(transformers, model_class)(made).train()


def llama(num_layers: int = 4, *, dropout: float = 0.1, **config: Any) -> nn.Module:
    """A Llama of `num_layers` layers; keyword arguments go to its config."""
    options = {**_DECODER, "num_hidden_layers": num_layers, "attention_dropout": dropout, **config}
    return _new("LlamaForCausalLM", "LlamaConfig", **options)


def gpt2(dropout: float = 0.1) -> nn.Module:
    size = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": HIDDEN, "n_layer": 3, "n_head": 4}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return _new("GPT2LMHeadModel", "GPT2Config", **size, **tokens, **_gpt_dropout(dropout))


def openai_gpt(dropout: float = 0.1) -> nn.Module:
    size = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": HIDDEN, "n_layer": 3, "n_head": 4}
    return _new("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", **size, **_gpt_dropout(dropout))


def _gpt_dropout(dropout: float) -> dict[str, float]:
    return {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}


def _bert_dropout(dropout: float) -> dict[str, float]:
    return {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}


def bert(dropout: float = 0.1) -> nn.Module:
    return _new("BertForMaskedLM", "BertConfig", **{**_ENCODER, "num_hidden_layers": 3}, **_bert_dropout(dropout))


def roberta(dropout: float = 0.1) -> nn.Module:
    options = {**_ENCODER, "num_hidden_layers": 2, **_bert_dropout(dropout)}
    return _new("RobertaForMaskedLM", "RobertaConfig", **options)


def albert(dropout: float = 0.1) -> nn.Module:
    options = {**_ENCODER, "num_hidden_layers": 3, "embedding_size": 16, **_bert_dropout(dropout)}
    return _new("AlbertForMaskedLM", "AlbertConfig", **options)


def vit(dropout: float = 0.1) -> nn.Module:
    return _new("ViTForImageClassification", "ViTConfig", **_VISION, **_bert_dropout(dropout))


def swin(dropout: float = 0.1) -> nn.Module:
    size = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "window_size": 4, "num_labels": CLASSES}
    stages = {"depths": [2, 2], "num_heads": [2, 4]}
    return _new(
        "SwinForImageClassification", "SwinConfig", **size, **stages, drop_path_rate=dropout, **_bert_dropout(dropout)
    )


def convnextv2(dropout: float = 0.1) -> nn.Module:
    stages = {"hidden_sizes": [8, 16, 32], "depths": [2, 3, 2], "num_stages": 3, "num_labels": CLASSES}
    return _new(
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        **stages,
        image_size=32,
        patch_size=2,
        drop_path_rate=dropout,
    )


def t5(dropout: float = 0.1) -> nn.Module:
    size = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return _new("T5ForConditionalGeneration", "T5Config", **size, **tokens, num_decoder_layers=2, dropout_rate=dropout)


def whisper(dropout: float = 0.1) -> nn.Module:
    size = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "num_mel_bins": 8, "encoder_layers": 3, "decoder_layers": 2}
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    widths = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64)
    lengths = {"max_source_positions": 20, "max_target_positions": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    drops = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), dropout)
    return _new(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        **{**size, **heads, **widths, **lengths, **tokens, **drops},
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def mixtral(dropout: float = 0.1) -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    return _new("MixtralForCausalLM", "MixtralConfig", **_DECODER, **experts, attention_dropout=dropout)


def gemma3n(dropout: float = 0.1) -> nn.Module:
    options = {
        **_DECODER,
        "intermediate_size": [64] * 4,
        "head_dim": 8,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    }
    return _new("Gemma3nForCausalLM", "Gemma3nTextConfig", **options, attention_dropout=dropout)


def mamba(dropout: float = 0.1) -> nn.Module:
    size = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "state_size": 4, "num_hidden_layers": 3}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return _new("MambaForCausalLM", "MambaConfig", **size, **tokens)  # has no dropout


def llava(dropout: float = 0.1) -> nn.Module:
    vision = {**_VISION, "num_hidden_layers": 3, "attention_dropout": dropout}
    return _new(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**{**_DECODER, "num_hidden_layers": 2, "attention_dropout": dropout}),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,  # by default the last vision layer is not used and would get no gradient
    )


def qwen_vl(dropout: float = 0.1) -> nn.Module:
    text = {**_DECODER, "num_hidden_layers": 2, "attention_dropout": dropout}
    text["rope_scaling"] = {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]}
    vision = {"depth": 3, "hidden_size": HIDDEN, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": HIDDEN}
    patches = {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [2], "spatial_merge_size": 2}
    return _new(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        text_config=text,
        vision_config={**vision, **patches},
        image_token_id=IMAGE_TOKEN,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )


def wav2vec2_conformer(dropout: float = 0.1) -> nn.Module:
    names = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
    options = {
        **{name: value for name, value in _ENCODER.items() if name != "max_position_embeddings"},
        **dict.fromkeys((*names, "conformer_conv_dropout"), dropout),
        "num_hidden_layers": 3,
        "conv_dim": [16, 16],
        "conv_kernel": [8, 4],
        "conv_stride": [4, 4],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
        "conv_depthwise_kernel_size": 3,
        "layerdrop": 0.0,
        "apply_spec_augment": False,
        "ctc_loss_reduction": "mean",
        "ctc_zero_infinity": True,
    }
    return _new("Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig", **options)


class ResidualBlock(nn.Module):
    """Convolution, batch norm and a shortcut, with a downsample where the width changes."""

    def __init__(self, width_in: int, width: int, dropout: float):
        super().__init__()
        stride = 1 if width_in == width else 2
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.downsample = nn.Conv2d(width_in, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(F.relu(self.norm1(self.conv1(x))))
        return F.relu(self.dropout(self.norm2(inner)) + self.downsample(x))


class ResidualNet(nn.Module):
    """A plain module with batch norm; no class of transformers in it."""

    def __init__(self, dropout: float = 0.1):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.stage1 = nn.Sequential(ResidualBlock(8, 8, dropout), ResidualBlock(8, 8, dropout))
        self.stage2 = nn.Sequential(ResidualBlock(8, 16, dropout), ResidualBlock(16, 16, dropout))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.stage2(self.stage1(self.stem(pixel_values))).mean((2, 3)))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class PlainBlock(nn.Module):
    """A decoder layer written by hand; called with keywords too, and returns a tuple, as many models do."""

    def __init__(self, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.query, self.key, self.value = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.up, self.down = nn.Linear(HIDDEN, 64), nn.Linear(64, HIDDEN)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, scale: float = 1.0) -> tuple[Tensor]:
        x = self.norm1(hidden)
        attended = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), is_causal=True)
        hidden = hidden + self.dropout(attended) * scale
        return (hidden + self.dropout(self.down(F.gelu(self.up(self.norm2(hidden))))),)


class PlainTransformer(nn.Module):
    """A language model that is no class of transformers."""

    def __init__(self, dropout: float = 0.1, num_layers: int = 4):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(PlainBlock(dropout) for _ in range(num_layers))
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            (hidden,) = block(hidden, scale=0.5)
        logits = self.head(hidden)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


def residual_net(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return ResidualNet(dropout).train()


def plain_transformer(dropout: float = 0.1, num_layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return PlainTransformer(dropout, num_layers).train()


_CASES = (
    Case("llama", llama, _text_batch, "the common decoder"),
    Case("gpt2", gpt2, _text_batch, "positional arguments, learned positions, dropout in every block"),
    Case("bert", bert, _text_batch, "encoder"),
    Case("roberta", roberta, _text_batch, "encoder, positions computed from the padding"),
    Case("vit", vit, _image_batch, "pixels, which need no gradient"),
    Case("t5", t5, _sequence_to_sequence_batch, "two stacks; a position bias goes from the first block to the others"),
    Case("whisper", whisper, _whisper_batch, "sound to text"),
    Case("mixtral", mixtral, _text_batch, "experts; a loss on router logits that are captured inside the blocks"),
    Case("gemma3n", gemma3n, _text_batch, "upper blocks use keys and values that lower blocks left for them"),
    Case("llava", llava, _llava_batch, "vision tower and language model"),
    Case("qwen_vl", qwen_vl, _qwen_vl_batch, "vision tower over packed patches"),
    Case("mamba", mamba, _text_batch, "no attention"),
    Case("convnextv2", convnextv2, _image_batch, "no HF layers; stages of unequal width"),
    Case("openai_gpt", openai_gpt, _text_batch, "no HF layers"),
    Case("wav2vec2_conformer", wav2vec2_conformer, _speech_batch, "batch norm inside HF layers"),
    Case("albert", albert, _text_batch, "one block applied several times"),
    Case("swin", swin, _image_batch, "HF layers inside HF layers"),
    Case("residual_net", residual_net, _image_batch, "plain module with batch norm"),
    Case("plain_transformer", plain_transformer, _plain_text_batch, "plain module"),
)

CASES = {case.name: case for case in _CASES}
