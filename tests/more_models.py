"""More architectures, each with blocks written in a way that those of `tiny_models` are not.

Every case builds under transformers 4.57 and 5.23, or is left out where the class does not exist.
`sized` builds models whose activations are large enough for their bytes to be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import (
    _DECODER,
    _ENCODER,
    _VISION,
    CLASSES,
    HIDDEN,
    IMAGE_TOKEN,
    VOCABULARY,
    Case,
    _bert_dropout,
    _image_batch,
    _new,
    _normal,
    _sequence_to_sequence_batch,
    _text_batch,
)
from torch import Tensor, nn

_SMALL = {**_DECODER, "num_hidden_layers": 2}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}


def qwen3(dropout: float = 0.1) -> nn.Module:
    return _new("Qwen3ForCausalLM", "Qwen3Config", **_SMALL, head_dim=8, attention_dropout=dropout)


def qwen3_moe(dropout: float = 0.1) -> nn.Module:
    options = {**_SMALL, **_EXPERTS, "head_dim": 8, "decoder_sparse_step": 1, "output_router_logits": True}
    return _new("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **options, attention_dropout=dropout)


def qwen3_next(dropout: float = 0.1) -> nn.Module:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
    options = {**_SMALL, **_EXPERTS, **linear, "head_dim": 8, "shared_expert_intermediate_size": 16}
    layers = ["linear_attention", "full_attention"]
    return _new("Qwen3NextForCausalLM", "Qwen3NextConfig", **options, layer_types=layers, attention_dropout=dropout)


def gemma3(dropout: float = 0.1) -> nn.Module:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 8}
    return _new("Gemma3ForCausalLM", "Gemma3TextConfig", **_SMALL, **layers, attention_dropout=dropout)


def deepseek_v3(dropout: float = 0.1) -> nn.Module:
    latent = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    options = {**_SMALL, **latent, **experts, "num_key_value_heads": 4, "moe_intermediate_size": 16}
    return _new("DeepseekV3ForCausalLM", "DeepseekV3Config", **options, attention_dropout=dropout)


def phi3(dropout: float = 0.1) -> nn.Module:
    return _new("Phi3ForCausalLM", "Phi3Config", **_SMALL, attention_dropout=dropout, resid_pdrop=dropout)


def opt(dropout: float = 0.1) -> nn.Module:
    size = {key: value for key, value in _SMALL.items() if key not in ("intermediate_size", "num_key_value_heads")}
    drops = {"dropout": dropout, "attention_dropout": dropout}
    return _new("OPTForCausalLM", "OPTConfig", **size, **drops, ffn_dim=64, word_embed_proj_dim=HIDDEN)


def bloom(dropout: float = 0.1) -> nn.Module:
    size = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": 2, "n_head": 4}
    return _new("BloomForCausalLM", "BloomConfig", **size, **_TOKENS, hidden_dropout=dropout, attention_dropout=dropout)


def gpt_neox(dropout: float = 0.1) -> nn.Module:
    size = {key: value for key, value in _SMALL.items() if key != "num_key_value_heads"}
    return _new("GPTNeoXForCausalLM", "GPTNeoXConfig", **size, hidden_dropout=dropout, attention_dropout=dropout)


def falcon(dropout: float = 0.1) -> nn.Module:
    size = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
    kind = {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}
    drops = {"hidden_dropout": dropout, "attention_dropout": dropout}
    return _new("FalconForCausalLM", "FalconConfig", **size, **kind, **drops, **_TOKENS)


def cohere(dropout: float = 0.1) -> nn.Module:
    return _new("CohereForCausalLM", "CohereConfig", **_SMALL, use_qk_norm=True, attention_dropout=dropout)


def olmo2(dropout: float = 0.1) -> nn.Module:
    return _new("Olmo2ForCausalLM", "Olmo2Config", **_SMALL, attention_dropout=dropout)


def llama4(dropout: float = 0.1) -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "head_dim": 8}
    layers = {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 8}
    options = {**_SMALL, **experts, **layers, "intermediate_size_mlp": 64, "no_rope_layers": [1, 0]}
    return _new("Llama4ForCausalLM", "Llama4TextConfig", **options, attention_dropout=dropout)


def gpt_oss(dropout: float = 0.1) -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8}
    options = {**_SMALL, **experts, "layer_types": ["sliding_attention", "full_attention"]}
    return _new("GptOssForCausalLM", "GptOssConfig", **options, attention_dropout=dropout)


def mamba2(dropout: float = 0.1) -> nn.Module:
    size = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "state_size": 8, "num_hidden_layers": 2, "expand": 2}
    heads = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
    return _new("Mamba2ForCausalLM", "Mamba2Config", **size, **heads, **_TOKENS)  # has no dropout


def distilbert(dropout: float = 0.1) -> nn.Module:
    size = {"vocab_size": VOCABULARY, "dim": HIDDEN, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "pad_token_id": 0}
    drops = {"dropout": dropout, "attention_dropout": dropout}
    return _new("DistilBertForMaskedLM", "DistilBertConfig", **size, **drops, max_position_embeddings=64)


def deberta(dropout: float = 0.1) -> nn.Module:
    options = {**_ENCODER, "num_hidden_layers": 2, "relative_attention": True, "position_buckets": 8}
    kind = {"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm"}
    return _new("DebertaV2ForMaskedLM", "DebertaV2Config", **options, **kind, **_bert_dropout(dropout))


def modernbert(dropout: float = 0.1) -> nn.Module:
    drops = dict.fromkeys(("embedding_dropout", "attention_dropout", "mlp_dropout"), dropout)
    options = {**_ENCODER, "num_hidden_layers": 2, "global_attn_every_n_layers": 2, "local_attention": 8}
    tokens = {"cls_token_id": 1, "sep_token_id": 2}
    return _new("ModernBertForMaskedLM", "ModernBertConfig", **options, **tokens, **drops)


def bart(dropout: float = 0.1) -> nn.Module:
    size = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "max_position_embeddings": 64}
    size |= dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    size |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    size |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64)
    drops = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), dropout)
    return _new("BartForConditionalGeneration", "BartConfig", **size, **drops, **_TOKENS, decoder_start_token_id=2)


def siglip(dropout: float = 0.1) -> nn.Module:
    vision = {key: value for key, value in _VISION.items() if key != "num_labels"}
    towers = {"vision_config": {**vision, "attention_dropout": dropout}, "num_labels": CLASSES}
    return _new("SiglipForImageClassification", "SiglipConfig", **towers)


_FOUND = (
    ("qwen3", qwen3, _text_batch, "norms on the heads of queries and keys"),
    ("qwen3_moe", qwen3_moe, _text_batch, "experts, and a loss on their router"),
    ("qwen3_next", qwen3_next, _text_batch, "gated delta-net, a scan in a loop, with shared and routed experts"),
    ("gemma3", gemma3, _text_batch, "norm weights plus one, sliding windows, tanh"),
    ("deepseek_v3", deepseek_v3, _text_batch, "latent attention, groups of experts"),
    ("phi3", phi3, _text_batch, "fused projections that are split, dropout on residuals"),
    ("opt", opt, _text_batch, "relu, biases, dropout by function"),
    ("bloom", bloom, _text_batch, "alibi, a gelu with a backward of its own, attention by baddbmm"),
    ("gpt_neox", gpt_neox, _text_batch, "parallel residual, rotary on a part of each head"),
    ("falcon", falcon, _text_batch, "one key head for all queries"),
    ("cohere", cohere, _text_batch, "parallel residual, norms without bias, also on heads"),
    ("olmo2", olmo2, _text_batch, "norms after attention and feed-forward"),
    ("llama4", llama4, _text_batch, "chunked attention, complex rotary, experts in every second block"),
    ("gpt_oss", gpt_oss, _text_batch, "attention sinks, clamped activations, biases of experts"),
    ("mamba2", mamba2, _text_batch, "state-space scan in chunks"),
    ("distilbert", distilbert, _text_batch, "encoder without token types"),
    ("deberta", deberta, _text_batch, "attention made of matmuls with relative positions"),
    ("modernbert", modernbert, _text_batch, "encoder with rotary and local attention"),
    ("bart", bart, _sequence_to_sequence_batch, "norms after the residual, in two stacks"),
    ("siglip", siglip, _image_batch, "vision tower with another tanh"),
)

# Left out where this transformers has no such class.
MORE_CASES = {
    name: Case(name, build, batch, why)
    for name, build, batch, why in _FOUND
    if any(hasattr(transformers, word) for word in build.__code__.co_consts if str(word).endswith("Config"))
}


# The width and the number of tokens at which what is small does not count.
WIDTH, LENGTH = 128, 64

_WIDE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 352, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, **_TOKENS,
}  # fmt: skip
_WIDE_ENCODER: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4
}  # fmt: skip
_WIDE_VISION = {**_WIDE_ENCODER, "image_size": 64, "patch_size": 8}


def _wide_text(length: int = LENGTH) -> dict[str, Tensor]:
    tokens = torch.randint(3, IMAGE_TOKEN, (2, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens.clone()}


def _wide_image() -> dict[str, Tensor]:
    return {"pixel_values": _normal(2, 3, 64, 64), "labels": torch.tensor([1, 3])}


def _wide_sound() -> dict[str, Tensor]:
    return {"input_features": _normal(2, 8, 2 * LENGTH), "labels": _wide_text()["labels"]}


def _wide_llava() -> dict[str, Tensor]:
    batch = {**_wide_text(2 * LENGTH), "pixel_values": _normal(2, 3, 64, 64)}
    batch["input_ids"][:, 1 : 1 + LENGTH] = IMAGE_TOKEN
    return batch


def _wide_qwen_vl() -> dict[str, Tensor]:
    batch = {**_wide_text(), "pixel_values": _normal(128, 3 * 2 * 4 * 4)}
    batch["image_grid_thw"] = torch.tensor([[1, 8, 8], [1, 8, 8]])
    batch["input_ids"][:, 1:17] = IMAGE_TOKEN
    if int(transformers.__version__.split(".")[0]) >= 5:
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).long()
    return batch


def _causal(kind: str, config: str = "", **options: Any) -> Callable[[int], nn.Module]:
    config = config or f"{kind}Config"
    return lambda layers: _new(f"{kind}ForCausalLM", config, **{**_WIDE, **options}, num_hidden_layers=layers)


def _wide_lora(layers: int) -> nn.Module:
    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(_causal("Llama")(layers), config).train()


def _wide_bert(layers: int) -> nn.Module:
    options = {**_WIDE_ENCODER, "vocab_size": VOCABULARY, "num_hidden_layers": layers}
    return _new("BertForMaskedLM", "BertConfig", **options)


def _wide_t5(layers: int) -> nn.Module:
    size = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 32, "d_ff": 4 * WIDTH, "num_heads": 4}
    numbers = {"num_layers": layers, "num_decoder_layers": layers, "decoder_start_token_id": 0}
    return _new("T5ForConditionalGeneration", "T5Config", **size, **numbers)


def _wide_whisper(layers: int) -> nn.Module:
    size = {"vocab_size": VOCABULARY, "d_model": WIDTH, "num_mel_bins": 8, "dropout": 0.1}
    size |= dict.fromkeys(("encoder_layers", "decoder_layers"), layers)
    size |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    size |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 4 * WIDTH)
    lengths = {"max_source_positions": LENGTH, "max_target_positions": LENGTH, "decoder_start_token_id": 1}
    return _new("WhisperForConditionalGeneration", "WhisperConfig", **size, **lengths, **_TOKENS)


def _wide_vit(layers: int) -> nn.Module:
    return _new("ViTForImageClassification", "ViTConfig", **_WIDE_VISION, num_hidden_layers=layers, num_labels=CLASSES)


def _wide_gpt2(layers: int) -> nn.Module:
    size = {"vocab_size": VOCABULARY, "n_positions": 128, "n_embd": WIDTH, "n_layer": layers, "n_head": 4}
    return _new("GPT2LMHeadModel", "GPT2Config", **size, bos_token_id=1, eos_token_id=2)


def _wide_towers(vision_layers: int, text_layers: int) -> nn.Module:
    return _new(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        vision_config=transformers.CLIPVisionConfig(**_WIDE_VISION, num_hidden_layers=vision_layers),
        text_config=transformers.LlamaConfig(**_WIDE, num_hidden_layers=text_layers),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )


def _wide_qwen_towers(vision_layers: int, text_layers: int) -> nn.Module:
    text = {key: value for key, value in _WIDE.items() if key != "head_dim"}
    rope = {"type": "default", "rope_type": "default", "mrope_section": [4, 6, 6]}
    vision = {"depth": vision_layers, "hidden_size": WIDTH, "intermediate_size": 352, "num_heads": 4}
    patches = {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1], "spatial_merge_size": 2}
    return _new(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        text_config={**text, "num_hidden_layers": text_layers, "rope_scaling": rope},
        vision_config={**vision, **patches, "out_hidden_size": WIDTH},
        image_token_id=IMAGE_TOKEN,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )


# Name -> (a model with so many layers, its batch, the share of bytes that `expensive` may store).
SIZED: dict[str, tuple[Callable[[int], nn.Module], Callable[[], dict[str, Tensor]], float]] = {
    "llama": (_causal("Llama"), _wide_text, 0.65),
    "qwen3": (_causal("Qwen3"), _wide_text, 0.65),
    "mixtral": (_causal("Mixtral", num_local_experts=4), _wide_text, 0.65),
    "gemma3": (_causal("Gemma3", "Gemma3TextConfig", sliding_window=32), _wide_text, 0.65),
    "llava, vision": (lambda layers: _wide_towers(layers, 1), _wide_llava, 0.65),
    "llava, text": (lambda layers: _wide_towers(1, layers), _wide_llava, 0.65),
    "qwen_vl, vision": (lambda layers: _wide_qwen_towers(layers, 1), _wide_qwen_vl, 0.65),
    "qwen_vl, text": (lambda layers: _wide_qwen_towers(1, layers), _wide_qwen_vl, 0.65),
    "bert": (_wide_bert, _wide_text, 0.75),
    "t5": (_wide_t5, _wide_text, 0.75),
    "whisper": (_wide_whisper, _wide_sound, 0.75),
    "vit": (_wide_vit, _wide_image, 0.75),
    "gpt2": (_wide_gpt2, _wide_text, 0.75),
    "llama with lora": (_wide_lora, _wide_text, 0.75),
}
