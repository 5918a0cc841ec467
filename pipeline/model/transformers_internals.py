"""Uses of Transformers that its documentation does not cover. tests/test_library_internals.py tests each use.

An import of Transformers takes seconds. Only the functions that need Transformers import it.
"""

from collections.abc import Iterable
from typing import Any


def layers_of(model: Any) -> list[Any]:
    """Return the blocks of the model, which FSDP splits one by one.

    Each architecture names the classes of its blocks for `device_map`:
    https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_utils.py (_no_split_modules)
    """
    return [module for module in model.modules() if type(module).__name__ in model._no_split_modules]


def attention_of(model: Any) -> str:
    """Return the name of the model's attention implementation, such as `sdpa` or `eager`.

    The argument `attn_implementation` sets the name. No documented function reads the name:
    https://github.com/huggingface/transformers/blob/main/src/transformers/configuration_utils.py
    """
    return model.config._attn_implementation


def forget_quantization(model: Any) -> None:
    """Let `save_pretrained` save a model that was read from a GGUF file.

    Transformers takes the model for quantized, although its weights are in 32 bits, and has no documented way back:
    https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_utils.py (save_pretrained)
    """
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False


def names_in_4_bits(model: Any) -> set[str]:
    """Return the names of the layers that `load_in_4bit` quantizes. `model` has no weights, and is changed.

    The quantizer decides: it leaves out the head, layers that are tied to the head, and all that are not plain linear
    layers. The documented way, from_pretrained, would load the weights:
    https://github.com/huggingface/transformers/blob/main/src/transformers/quantizers/auto.py
    """
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True)).preprocess_model(model, device_map=None)
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def names_in_files(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Return {parameter of `model`: the tensor of the base's files that Transformers loads into it}.

    `stored` are the names of the tensors. Left out are tensors that the model has no place for, such as further heads,
    and tensors that Transformers puts together or changes, such as experts. A tied head has its embedding's tensor.

    Files may have other names than the model, and no documented function tells them:
    https://github.com/huggingface/transformers/blob/main/src/transformers/core_model_loading.py
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for name in stored:
        loaded, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if loaded not in parameters and name in parameters:  # as convert_and_load_state_dict_in_model
            loaded, converted = name, None
        if loaded in parameters and converted is None:
            found[loaded] = name
    by_parameter = {id(parameters[loaded]): name for loaded, name in found.items()}
    tied = {name: by_parameter[id(of)] for name, of in parameters.items() if id(of) in by_parameter}
    return tied | found


def ended(state: Any) -> bool:
    """Whether training had ended, also by early stopping, when a checkpoint with this TrainerState was saved.

    The documented attributes have only the planned number of steps, and early stopping takes fewer steps:
    https://github.com/huggingface/transformers/blob/main/src/transformers/trainer_callback.py (TrainerControl.state)
    """
    return state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
