"""The LoRA adapter: what it is to be."""

from peft import LoraConfig

from pipeline.parameters import Lora


def lora_config(knobs: Lora, trainable_tokens: list[int]) -> LoraConfig:
    """PEFT's configuration; `trainable_tokens` are the ids of tokens whose embeddings are trained too."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=knobs.r,
        lora_alpha=knobs.alpha,
        lora_dropout=knobs.dropout,
        target_modules=knobs.target_modules,
        use_rslora=knobs.use_rslora,
        use_dora=knobs.use_dora,
        modules_to_save=knobs.modules_to_save or None,
        trainable_token_indices=trainable_tokens or None,
    )
