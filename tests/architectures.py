"""Tiny random bases of many architectures, with the names that their files have on the hub."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from families import GEMMA3, QWEN2, SHAPE, gemma, qwen
from safetensors.torch import load_file, save_file

from pipeline.common.errors import UserError
from pipeline.common.parameters.params_yaml import check
from pipeline.export.dry_run import require_mergeable
from tools import twin

TEXT = SHAPE | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "pad_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "depth": 1}
VISION |= {"num_heads": 2, "out_hidden_size": 64, "image_size": 32, "patch_size": 8, "head_dim": 16}
MOE = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
MOE |= {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "first_k_dense_replace": 1, "topk_group": 1}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
LATENT |= {"num_key_value_heads": 4}
LINEAR: dict[str, object] = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16}
LINEAR |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_d_ssm": 128, "mamba_n_groups": 1}
MAMBA |= {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"]}
LAYERWISE = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 512, "num_kv_shared_layers": 0}
PIXTRAL: dict[str, object] = VISION | {"model_type": "pixtral"}

ATTENTION = ["q_proj", "v_proj"]

CONFIGS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "mistral": lambda: hf.MistralConfig(**TEXT),
    "phi3": lambda: hf.Phi3Config(**TEXT),
    "smollm3": lambda: hf.SmolLM3Config(**TEXT),
    "olmo2": lambda: hf.Olmo2Config(**TEXT),
    "olmo3": lambda: hf.Olmo3Config(**TEXT),
    "granite": lambda: hf.GraniteConfig(**TEXT),
    "hunyuan_v1_dense": lambda: hf.HunYuanDenseV1Config(**TEXT),
    "seed_oss": lambda: hf.SeedOssConfig(**TEXT),
    "apertus": lambda: hf.ApertusConfig(**TEXT),
    "glm4": lambda: hf.Glm4Config(**TEXT),
    "exaone4": lambda: hf.Exaone4Config(**TEXT),
    "cohere2": lambda: hf.Cohere2Config(**TEXT),
    "lfm2": lambda: hf.Lfm2Config(**TEXT, **CONVOLUTIONS, block_auto_adjust_ff_dim=False),
    "lfm3": lambda: hf.Lfm3Config(**TEXT, **CONVOLUTIONS),
    "granitemoehybrid": lambda: hf.GraniteMoeHybridConfig(
        **TEXT | {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "num_experts_per_tok": 0},
        **{key: MAMBA[key] for key in ("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups")},
        shared_intermediate_size=128,
    ),
    "nemotron_h": lambda: hf.NemotronHConfig(**TEXT | MAMBA, layers_block_type=["mamba", "attention"]),
    "falcon_h1": lambda: hf.FalconH1Config(**TEXT, **MAMBA),
    "gemma3": lambda: hf.Gemma3Config(
        text_config=TEXT | {"query_pre_attn_scalar": 16}, vision_config=VISION, mm_tokens_per_image=4
    ),
    "gemma4": lambda: hf.Gemma4Config(text_config=TEXT | LAYERWISE, vision_config=VISION, audio_config=None),
    "gemma3n_text": lambda: hf.Gemma3nTextConfig(
        **TEXT | LAYERWISE | {"intermediate_size": [128, 128], "hidden_size_per_layer_input": 256},
        activation_sparsity_pattern=[0.95, 0.95],  # llama.cpp has the numbers of the real models
        laurel_rank=64,
    ),
    "qwen2_5_vl": lambda: hf.Qwen2_5_VLConfig(text_config=TEXT | SECTIONS, vision_config=VISION),
    "qwen3_vl": lambda: hf.Qwen3VLConfig(
        text_config=TEXT | SECTIONS, vision_config=VISION | {"deepstack_visual_indexes": [0]}
    ),
    "qwen3_5": lambda: hf.Qwen3_5Config(text_config=TEXT | LINEAR | SECTIONS, vision_config=VISION),
    "mistral3": lambda: hf.Mistral3Config(text_config=TEXT | {"model_type": "mistral"}, vision_config=PIXTRAL),
    "ministral3": lambda: hf.Mistral3Config(text_config=TEXT | {"model_type": "ministral3"}, vision_config=PIXTRAL),
    "llama4": lambda: hf.Llama4Config(
        text_config=TEXT | MOE | {"intermediate_size_mlp": 128},
        vision_config=VISION | {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
    ),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(**TEXT, **MOE),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**TEXT, **MOE, norm_topk_prob=True),
    "qwen3_next": lambda: hf.Qwen3NextConfig(**TEXT, **MOE, **LINEAR),
    "qwen3_5_moe": lambda: hf.Qwen3_5MoeConfig(text_config=TEXT | LINEAR | SECTIONS | MOE, vision_config=VISION),
    "qwen3_vl_moe": lambda: hf.Qwen3VLMoeConfig(
        text_config=TEXT | SECTIONS | MOE | {"moe_intermediate_size": 128},
        vision_config=VISION | {"deepstack_visual_indexes": [0]},
    ),
    "mixtral": lambda: hf.MixtralConfig(**TEXT, **MOE),
    "phimoe": lambda: hf.PhimoeConfig(**TEXT, **MOE),
    "lfm2_moe": lambda: hf.Lfm2MoeConfig(**TEXT, **MOE, **CONVOLUTIONS, num_dense_layers=1),
    "gpt_oss": lambda: hf.GptOssConfig(**TEXT, **MOE),
    "deepseek_v2": lambda: hf.DeepseekV2Config(**TEXT | MOE | LATENT),
    "deepseek_v3": lambda: hf.DeepseekV3Config(**TEXT | MOE | LATENT),
}


def make(name: str, folder: Path) -> None:
    config = CONFIGS[name]()
    tokenizer = gemma(GEMMA3, folder) if name.startswith("gemma") else qwen(QWEN2)
    end = "<end_of_turn>" if name.startswith("gemma") else tokenizer.eos_token
    config.eos_token_id, config.bos_token_id = tokenizer.convert_tokens_to_ids(end), tokenizer.bos_token_id
    torch.manual_seed(1)
    with_vision = type(config) in hf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind = hf.AutoModelForImageTextToText if with_vision else hf.AutoModelForCausalLM
    kind.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if name == "phi3":  # the converter tells Phi-4 mini from Phi-3 by this class
        rewrite(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    if name == "granitemoehybrid":  # on the hub its layers have other names
        file = folder / "config.json"
        file.write_text(file.read_text().replace("linear_attention", "mamba").replace("full_attention", "attention"))
    if name == "qwen3_5":  # a head that predicts further tokens, which Transformers does not load
        weights = load_file(folder / "model.safetensors")
        weights["mtp.layers.0.mlp.down_proj.weight"] = torch.zeros(64, 128)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite(file: Path, changed: dict[str, object]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changed), encoding="utf-8")


def main() -> None:
    """Print docs/families.md's table: send each base, or those named on the command line, through all stages."""
    parameters = check(Path("params.yaml"))
    print("| architecture | adapter on | merged | LoRA GGUF | merged GGUF |\n| --- | --- | ---: | ---: | ---: |")
    for name in sys.argv[1:] or CONFIGS:
        for targets in ("all-linear", ATTENTION):
            lora = parameters.lora.model_copy(update={"target_modules": targets})
            with tempfile.TemporaryDirectory() as folder:
                make(name, Path(folder))
                try:
                    require_mergeable(Path(folder), lora, [])
                    found = dict(twin.through_all_stages(Path(folder), parameters.model_copy(update={"lora": lora})))
                    files = [f"twin: {file}" for file in ("merged", "adapter-f16.gguf", "model-f16.gguf")]
                    cells = [found[file].split()[1] if file in found else "none" for file in files]
                    on = targets if targets == "all-linear" else "attention"
                    print(f"| `{name}` | {on} | {' | '.join(cells)} |", flush=True)
                    break
                except UserError as refusal:
                    print(f"| `{name}` | {targets} | {refusal} |", file=sys.stderr, flush=True)
                    reason = refusal
        else:
            print(f"| `{name}` | | refused: {reason} | | |", flush=True)


if __name__ == "__main__":
    main()
