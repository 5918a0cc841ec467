"""Configures the LoRA adapter, and checks that the base supports the configuration."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from pipeline.common.errors import UserError
from pipeline.common.parameters.lora import Lora
from pipeline.model.peft_internals import give_head_a_bias, targets_parameters

EMBEDDINGS = ("embed_tokens", "lm_head")  # the matrices with one row per token


def lora_config(lora: Lora, trainable_tokens: list[int]) -> LoraConfig:
    """PEFT's configuration. `trainable_tokens` are ids of tokens whose embeddings are also trained.

    A name in modules_to_save matches the end of a module path: norm matches every norm.
    """
    rows_of = [name for name in EMBEDDINGS if name not in lora.modules_to_save]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=list(lora.modules_to_save) or None,  # a copy, because PEFT changes the list
        trainable_token_indices=dict.fromkeys(rows_of, trainable_tokens) if trainable_tokens and rows_of else None,
        ensure_weight_tying=not rows_of,
    )


def require_possible(lora: Lora, model: PreTrainedModel) -> None:
    """Check that this base supports such an adapter. `model` may be quantized, or without weights (device "meta").

    Raises:
        UserError: lora.target_modules has a name that is not a linear layer of a block (llama.cpp fails with an adapter
            on tied embeddings), or includes experts in one tensor, which cannot be merged; lora.modules_to_save has a
            name that is not another layer, or only one of two tied matrices.
    """
    head = model.get_output_embeddings()
    linear, others = set[str](), set[str]()
    for path, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            is_linear = isinstance(module, torch.nn.Linear) and module is not head
            (linear if is_linear else others).add(path.rpartition(".")[2])
    targets = [] if lora.target_modules == "all-linear" else lora.target_modules
    require_among("lora.target_modules", targets, linear)
    if targets_parameters(lora_config(lora, []), model):
        raise UserError(
            "lora.target_modules includes the experts of base.model, and an adapter on experts cannot be merged: name "
            "only layers of the attention, such as [q_proj, v_proj], or choose a base without experts"
        )
    require_among("lora.modules_to_save", lora.modules_to_save, others)
    if model.config.tie_word_embeddings and len(set(EMBEDDINGS) & set(lora.modules_to_save)) == 1:
        raise UserError(
            f"lora.modules_to_save: {' and '.join(EMBEDDINGS)} are one matrix in this base: name both, or neither"
        )


def require_among(parameter: str, names: list[str], known: set[str]) -> None:
    if unknown := sorted(set(names) - known):
        raise UserError(f"{parameter}: {', '.join(unknown)} not among this base's {', '.join(sorted(known))}")


def with_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """`model` with a new adapter, for training with TRL."""
    config.ensure_weight_tying &= model.config.tie_word_embeddings  # PEFT warns if nothing is tied
    tuned = get_peft_model(model, config)
    give_head_a_bias(tuned)
    return tuned
