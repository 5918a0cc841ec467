"""The shapes of the models of the recipes, with which memory is estimated without a download."""

from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4Config,
    Lfm2Config,
    LlamaConfig,
    Mistral3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen3_5Config,
    Qwen3Config,
    SmolLM3Config,
)

from bench.gpu_case import MODELS, config

LFM2_ATTENTION = [2, 5, 8, 10, 12, 14]  # layers; the others are convolutions
LFM2 = {"layer_types": ["full_attention" if i in LFM2_ATTENTION else "conv" for i in range(16)]}


def numbers(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    """A part of a model with several parts."""
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads, "num_heads": heads, "depth": layers} | more


def qwen3_5(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, linear: int, vision: dict[str, Any], tied: bool
) -> PreTrainedConfig:
    linear_heads = {"linear_num_key_heads": 16, "linear_num_value_heads": linear}
    text = numbers(hidden, inner, layers, heads, num_key_value_heads=kv_heads, head_dim=256, **linear_heads)
    tying = {"tie_word_embeddings": tied}
    return Qwen3_5Config(text_config=text | tying, vision_config=vision | {"out_hidden_size": hidden}, **tying)


def gemma_4(hidden: int, inner: int, layers: int, kv_heads: int, period: int, **more: Any) -> PreTrainedConfig:
    kinds = [("sliding_attention" if (i + 1) % period else "full_attention") for i in range(layers)]
    text = numbers(hidden, inner, layers, 8, num_key_value_heads=kv_heads, layer_types=kinds, **more)
    vision = numbers(768, 3072, 16, 12, num_key_value_heads=12, head_dim=64)
    return Gemma4Config(text_config=text, vision_config=vision)


def ministral_3(hidden: int, inner: int, layers: int, tied: bool) -> PreTrainedConfig:
    text = numbers(hidden, inner, layers, 32, num_key_value_heads=8, head_dim=128, vocab_size=131_072)
    vision = numbers(1024, 4096, 24, 16, model_type="pixtral")
    tying = {"tie_word_embeddings": tied}
    return Mistral3Config(text_config=text | tying | {"model_type": "ministral3"}, vision_config=vision, **tying)


# As in the config.json of each model on the hub.
SHAPES = {
    "qwen2.5-0.5b": MODELS["Qwen2.5 0.5B"],
    "qwen2.5-7b": MODELS["Qwen2.5 7B"],
    "qwen3-0.6b": config(Qwen3Config, 151_936, 1024, 3072, 28, 16, 8, head_dim=128, tie_word_embeddings=True),
    "qwen3-1.7b": config(Qwen3Config, 151_936, 2048, 6144, 28, 16, 8, head_dim=128, tie_word_embeddings=True),
    "qwen3-4b": config(Qwen3Config, 151_936, 2560, 9728, 36, 32, 8, head_dim=128, tie_word_embeddings=True),
    "qwen3-4b-2507": config(Qwen3Config, 151_936, 2560, 9728, 36, 32, 8, head_dim=128, tie_word_embeddings=True),
    "qwen3-8b": config(Qwen3Config, 151_936, 4096, 12_288, 36, 32, 8, head_dim=128, tie_word_embeddings=False),
    "qwen3.5-0.8b": qwen3_5(1024, 3584, 24, 8, 2, 16, numbers(768, 3072, 12, 12), tied=True),
    "qwen3.5-2b": qwen3_5(2048, 6144, 24, 8, 2, 16, numbers(1024, 4096, 24, 16), tied=True),
    "qwen3.5-4b": qwen3_5(2560, 9216, 32, 16, 4, 32, numbers(1024, 4096, 24, 16), tied=True),
    "qwen3.5-9b": qwen3_5(4096, 12_288, 32, 16, 4, 32, numbers(1152, 4304, 27, 16), tied=False),
    "llama-3.2-1b": config(LlamaConfig, 128_256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True),
    "llama-3.2-3b": config(LlamaConfig, 128_256, 3072, 8192, 28, 24, 8, tie_word_embeddings=True),
    "llama-3.1-8b": MODELS["Llama 3.1 8B"],
    "gemma-2-2b": config(Gemma2Config, 256_000, 2304, 9216, 26, 8, 4, head_dim=256, query_pre_attn_scalar=256),
    "gemma-2-9b": MODELS["Gemma 2 9B"],
    "gemma-3-270m": config(Gemma3TextConfig, 262_144, 640, 2048, 18, 4, 1, head_dim=256, sliding_window=512),
    "gemma-3-1b": config(Gemma3TextConfig, 262_144, 1152, 6912, 26, 4, 1, head_dim=256, sliding_window=512),
    "gemma-3-4b": Gemma3Config(
        text_config=numbers(2560, 10_240, 34, 8, num_key_value_heads=4, head_dim=256, sliding_window=1024),
        vision_config=numbers(1152, 4304, 27, 16, image_size=896, patch_size=14),
    ),
    "gemma-4-e2b": gemma_4(1536, 6144, 35, 1, 5, num_kv_shared_layers=20, use_double_wide_mlp=True),
    "gemma-4-e4b": gemma_4(2560, 10_240, 42, 2, 6, num_kv_shared_layers=18),
    "lfm2.5-350m": config(Lfm2Config, 65_536, 1024, 6656, 16, 16, 8, **LFM2),
    "lfm2.5-1.2b": config(Lfm2Config, 65_536, 2048, 12_288, 16, 32, 8, **LFM2),
    "smollm3-3b": config(SmolLM3Config, 128_256, 2048, 11_008, 36, 16, 4, tie_word_embeddings=True),
    "ministral-3-3b": ministral_3(3072, 9216, 26, tied=True),
    "ministral-3-8b": ministral_3(4096, 14_336, 34, tied=False),
    "phi-4-mini": config(Phi3Config, 200_064, 3072, 8192, 32, 24, 8, tie_word_embeddings=True),
}
