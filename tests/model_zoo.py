"""Small models of real architectures, built from their own configurations: MODELS, name -> function.

A function returns the model as its library makes it, initialised; under `torch.device("meta")` it makes the
model that training at scale starts from. `recipe` initialises a model again, by its library's own entry.
Nothing is downloaded. No test is here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

DECODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TOWERS = {"text_config": ENCODER | {"eos_token_id": 2, "projection_dim": 32}, "vision_config": VISION}
BART = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
SPEECH = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 32,
    "conv_dim": (32, 32),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "codevector_dim": 32,
    "proj_codevector_dim": 32,
}

# The name of the class, and its configuration.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_positions": 64},
    ),
    "llama": ("LlamaForCausalLM", DECODER),
    "mistral": ("MistralForCausalLM", DECODER),
    "mixtral": ("MixtralForCausalLM", DECODER | {"num_local_experts": 4}),
    "qwen2": ("Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3ForCausalLM", DECODER | {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", DECODER | {"num_experts": 4, "moe_intermediate_size": 32}),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        DECODER
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "gemma2": ("Gemma2ForCausalLM", DECODER),
    "gemma3": ("Gemma3ForCausalLM", DECODER),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        DECODER
        | LATENT
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
            "head_dim": 8,
        },
    ),
    "gpt_oss": ("GptOssForCausalLM", DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("Phi3ForCausalLM", DECODER),
    "olmo2": ("Olmo2ForCausalLM", DECODER),
    "falcon": ("FalconForCausalLM", ENCODER),
    "bloom": ("BloomForCausalLM", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512}),
    "opt": (
        "OPTForCausalLM",
        ENCODER | {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", ENCODER),
    "mamba": (
        "MambaForCausalLM",
        {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "state_size": 8},
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "vocab_size": 512,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 2,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 512},
    ),
    "bart": ("BartForConditionalGeneration", BART | {"vocab_size": 512, "max_position_embeddings": 64}),
    "bert": ("BertForMaskedLM", ENCODER),
    "roberta": ("RobertaForMaskedLM", ENCODER),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        ENCODER | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16},
    ),
    "xlnet": (
        "XLNetLMHeadModel",
        {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96, "vocab_size": 512},
    ),
    "electra": ("ElectraForMaskedLM", ENCODER | {"embedding_size": 32}),
    "albert": ("AlbertForMaskedLM", ENCODER | {"embedding_size": 32}),
    "vit": ("ViTForImageClassification", VISION),
    "dinov2": ("Dinov2ForImageClassification", VISION),
    "swin": (
        "SwinForImageClassification",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 32,
            "depths": [1, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 2, 1]},
    ),
    "clip": ("CLIPModel", TOWERS | {"projection_dim": 32}),
    "siglip": ("SiglipModel", TOWERS),
    "whisper": (
        "WhisperForConditionalGeneration",
        BART
        | {
            "vocab_size": 512,
            "num_mel_bins": 20,
            "max_source_positions": 40,
            "max_target_positions": 40,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", SPEECH),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "basic"},
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {
            "hidden_sizes": [16, 32, 32, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 32,
        },
    ),
    "rt_detr": (
        "RTDetrForObjectDetection",
        {
            "backbone_config": {
                "model_type": "rt_detr_resnet",
                "embedding_size": 16,
                "hidden_sizes": [16, 32, 32, 64],
                "depths": [1, 1, 1, 1],
                "layer_type": "basic",
                "out_features": ["stage2", "stage3", "stage4"],
            },
            "backbone": None,
            "encoder_hidden_dim": 32,
            "encoder_in_channels": [32, 32, 64],
            "encoder_ffn_dim": 64,
            "d_model": 32,
            "decoder_in_channels": [32, 32, 32],
            "decoder_ffn_dim": 64,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "num_queries": 20,
        },
    ),
}
TORCHTITAN = ("llama3", "qwen3", "deepseek_v3", "gpt_oss")
TIMM: dict[str, dict[str, Any]] = {
    "resnet50": {},
    "vit_tiny_patch16_224": {"depth": 2},
    "convnext_atto": {},
    "cait_xxs24_224": {"depth": 2},
    "eva02_tiny_patch14_224": {"depth": 2},
    "swin_tiny_patch4_window7_224": {"embed_dim": 48, "depths": (1, 1, 2, 1)},
}


def transformers_model(cls: str, options: dict[str, Any]) -> nn.Module:
    made = getattr(importlib.import_module("transformers"), cls)
    return made(made.config_class(**options))


def torchtitan_model(name: str) -> nn.Module:
    """The library's own model for debugging, of two layers."""
    module = importlib.import_module(f"torchtitan.models.{name}")
    config = module.model_registry("debugmodel").model
    config.layers = config.layers[:2]
    for layer in config.layers:
        layer.attention.rope.max_seq_len = 512
    if name == "gpt_oss":
        for layer in config.layers:
            layer.moe.routed_experts.inner_experts.hidden_dim = 96
    model = config.build()
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.init_states()
    return model


def timm_model(name: str, options: dict[str, Any]) -> nn.Module:
    return importlib.import_module("timm").create_model(name, **options)


def diffusers_unet() -> nn.Module:
    return importlib.import_module("diffusers").UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(transformers_model, *entry) for name, entry in TRANSFORMERS.items()},
    **{f"torchtitan {name}": partial(torchtitan_model, name) for name in TORCHTITAN},
    **{f"timm {name.split('_')[0]}": partial(timm_model, name, options) for name, options in TIMM.items()},
    "diffusers unet": diffusers_unet,
}


def recipe(model: nn.Module) -> None:
    """Run the model's own initialisation again, as its library would."""
    if hasattr(model, "init_states"):  # torchtitan
        model.init_states()
        return
    for part in model.modules():
        part.__dict__.pop("_is_hf_initialized", None)
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            tensor.__dict__.pop("_is_hf_initialized", None)
    if not isinstance(model, transformers_class()):
        for part in model.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    if hasattr(model, "init_weights"):
        model.init_weights()
    elif hasattr(model, "_init_weights"):
        model.apply(model._init_weights)


def transformers_class() -> Any:
    """The class of all models of transformers, where it is there."""
    module = sys.modules.get("transformers")
    return module.PreTrainedModel if module else ()
