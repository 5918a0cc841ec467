"""Uses of PEFT that its documentation does not cover. tests/test_library_internals.py tests each use."""

from copy import deepcopy
from functools import partial

import torch
from peft import LoraConfig, PeftModel
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel


def targets_parameters(config: LoraConfig, model: PreTrainedModel) -> bool:
    """Whether PEFT trains parameters that are not layers, for example if one tensor has all experts of a block.

    `get_peft_model` finds this when it builds the adapter. For a large base that is too late. PEFT documents no way to
    find it earlier: https://github.com/huggingface/peft/blob/main/src/peft/utils/transformers_weight_conversion.py
    """
    config = deepcopy(config)
    try:
        convert_peft_config_for_transformers(config, model, conversions=None)  # as get_peft_model does
    except ValueError:  # `config` names gate_proj without up_proj, but both are one tensor
        return True
    return bool(config.target_parameters)


def give_head_a_bias(model: PeftModel) -> None:
    """Give the head a `bias` of None, which TRL reads. PEFT's wrapper of a head with trained tokens has no `bias`.

    https://github.com/huggingface/trl/blob/main/trl/trainer/utils.py (add_fused_lm_head)
    https://github.com/huggingface/peft/blob/main/src/peft/utils/other.py (TrainableTokensWrapper)
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.register_parameter("bias", None)


def load_adapters_as_saved(model: PeftModel) -> None:
    """Make `model` load an adapter in the type of its checkpoint.

    PEFT loads an adapter in float32 unless `autocast_adapter_dtype` is false. Transformers' trainer loads checkpoints
    without this argument.

    https://github.com/huggingface/transformers/blob/main/src/transformers/trainer.py (_load_from_checkpoint)
    """
    model.load_adapter = partial(model.load_adapter, autocast_adapter_dtype=False)


def adapter_weights(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return the trained weights by name, without DoRA's magnitudes, which stay in float32.

    PEFT documents no other way to recognize the magnitudes than their names:
    https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/dora.py
    """
    return {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and "lora_magnitude_vector" not in name
    }
