"""Configures the LoRA adapter, and checks that the base supports the configuration."""

import re
from dataclasses import replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from pipeline.common.errors import UserError
from pipeline.common.parameters.lora import Lora
from pipeline.model.peft_internals import give_head_a_bias, targets_parameters
from pipeline.model.skeleton import text_model

# Linear layers to which llama.cpp applies no adapter:
# https://github.com/ggml-org/llama.cpp/blob/master/src/models/gemma4.cpp (project_per_layer_inputs)
RUN_ALONE = (".per_layer_model_projection",)
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
        UserError: TRL cannot train the base; lora.target_modules names something that is not a linear layer of a block
            (llama.cpp fails with an adapter on tied embeddings), or experts, which cannot be merged;
            lora.modules_to_save has a name that is not another layer, or only one of two tied matrices.
    """
    if model.base_model is model:  # such as Llama 4
        raise UserError(
            f"base.model: {type(model).__name__} has no text model apart from its head in Transformers, and TRL needs "
            "one: choose another base.model"
        )
    head = model.get_output_embeddings()
    linear, others, excluded = set[str](), set[str](), without_adapter(model)
    for path, module in model.named_modules():
        if list(module.parameters(recurse=False)) and (module is head or not re.fullmatch(excluded or "", path)):
            is_linear = isinstance(module, torch.nn.Linear) and module is not head
            (linear if is_linear else others).add(path.rpartition(".")[2])
    targets = [] if lora.target_modules == "all-linear" else lora.target_modules
    require_among("lora.target_modules", targets, linear)
    config = lora_config(lora, [])
    config.exclude_modules = excluded
    if targets and targets_parameters(config, model):
        raise UserError(
            "lora.target_modules names the experts of base.model, and an adapter on experts cannot be merged: set "
            "lora.target_modules to all-linear, or name layers of the attention, such as [q_proj, v_proj]"
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
    """`model` with a new adapter, for training with TRL.

    Raises:
        UserError: PEFT does not support such an adapter on this base.
    """
    config.ensure_weight_tying &= model.config.tie_word_embeddings  # PEFT warns if nothing is tied
    config.exclude_modules = without_adapter(model)
    if config.target_modules == "all-linear" and targets_parameters(config, model):
        config.target_modules = beside_experts(config, model)
    try:
        tuned = get_peft_model(model, config)
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"PEFT refuses the adapter: {reason}: set lora.target_modules to other layers") from None
    give_head_a_bias(tuned)
    return tuned


def beside_experts(config: LoraConfig, model: PreTrainedModel) -> list[str]:
    """The names of linear layers, without names that PEFT takes for experts.

    Shared experts have such names too. An adapter on them alone could not be loaded with PEFT.
    """
    head = model.get_output_embeddings()
    layers = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    return [name for name in sorted(layers) if not targets_parameters(replace(config, target_modules=[name]), model)]


def without_adapter(model: PreTrainedModel) -> str | None:
    """A pattern for PEFT of the modules that get no adapter; None if there are none.

    These are all modules outside the text model, such as a vision tower; linear layers of a class of their own, because
    some routers of experts return more than a product; and layers that llama.cpp would run without their adapter.
    """
    linear = [(path, module) for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    patterns = [re.escape(path) for path, layer in linear if not is_plain(layer) or path.endswith(RUN_ALONE)]
    if text := text_model(model):
        patterns.append(rf"(?!{re.escape(text)}).*")
    return "|".join(patterns) or None


def is_plain(layer: torch.nn.Linear) -> bool:
    """Whether a linear layer computes a plain product, as those of torch and bitsandbytes do."""
    kind = type(layer)
    return not kind.__module__.startswith("transformers.") or kind.__name__ == "FalconLinear"
