"""The LoRA adapter: what it is to be, and what can be made of it."""

from typing import Any

from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from transformers import PreTrainedModel

from pipeline.parameters import Lora
from pipeline.refusal import Refused


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


def require_possible(knobs: Lora, model: PreTrainedModel) -> None:
    """Raises Refused if a name is no quantized linear layer's: a typo, the head, or the embeddings.

    An adapter on the head or the embeddings of a model that ties them makes llama.cpp fail.
    """
    known = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    names = knobs.target_modules
    if names != "all-linear" and (unknown := sorted(set(names) - known)):
        raise Refused(f"lora.target_modules: {', '.join(unknown)} not among this base's {', '.join(sorted(known))}")


def no_gguf_lora(adapter_config: dict[str, Any]) -> str | None:
    """Why llama.cpp can have no LoRA file of an adapter with this adapter_config.json; None if it can."""
    if adapter_config.get("use_dora"):
        return "llama.cpp knows no DoRA"
    return None
