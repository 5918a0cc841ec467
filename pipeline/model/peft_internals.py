"""What this project uses of PEFT beyond its documentation. tests/test_library_internals.py tests each use."""

from functools import partial

import torch
from peft import LoraConfig, PeftModel
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel


def targets_parameters(config: LoraConfig, model: PreTrainedModel) -> bool:
    """Whether PEFT trains parameters that are no layers, as where a base has the experts of a block in one tensor.

    `get_peft_model` finds out when it builds the adapter, which for a large base is too late. PEFT documents no way to
    ask before: https://github.com/huggingface/peft/blob/main/src/peft/utils/transformers_weight_conversion.py
    """
    try:
        convert_peft_config_for_transformers(config, model, conversions=None)  # as get_peft_model does
    except ValueError:  # gate_proj is named without up_proj, which are one tensor
        return True
    return bool(config.target_parameters)


def give_head_a_bias(model: PeftModel) -> None:
    """TRL reads the head's bias. PEFT's wrapper of a head with trained tokens has no such attribute.

    https://github.com/huggingface/trl/blob/main/trl/trainer/utils.py (add_fused_lm_head)
    https://github.com/huggingface/peft/blob/main/src/peft/utils/other.py (TrainableTokensWrapper)
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.register_parameter("bias", None)


def load_adapters_as_saved(model: PeftModel) -> None:
    """Keep the type of a checkpoint's adapter. PEFT loads an adapter in float32 unless `autocast_adapter_dtype` is
    false, and Transformers' trainer, which loads checkpoints, does not pass the argument on.

    https://github.com/huggingface/transformers/blob/main/src/transformers/trainer.py (_load_from_checkpoint)
    """
    model.load_adapter = partial(model.load_adapter, autocast_adapter_dtype=False)


def adapter_weights(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """What is trained, but for DoRA's magnitudes, which stay in float32. PEFT documents no way to tell the two apart
    but their names: https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/dora.py"""
    return {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and "lora_magnitude_vector" not in name
    }
