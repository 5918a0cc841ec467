"""Uses of Transformers that its documentation does not cover. tests/test_library_internals.py tests each use.

An import of Transformers takes seconds. Only the functions that need Transformers import it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def layers_of(model: Any) -> list[Any]:
    """Return the blocks of the model, which FSDP splits one by one.

    Each architecture names the classes of its blocks for `device_map`:
    https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_utils.py (_no_split_modules)
    """
    return [module for module in model.modules() if type(module).__name__ in model._no_split_modules]


@contextmanager
def first_layers(model: Any, number: int) -> Iterator[None]:
    """Inside the block, `model` computes its first `number` layers alone.

    Each pass reads the number of layers in the configuration:
    https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama/modeling_llama.py
    """
    config = model.config.get_text_config()
    layers = config.num_hidden_layers
    config.num_hidden_layers = number
    try:
        yield
    finally:
        config.num_hidden_layers = layers


def attention_of(model: Any) -> str:
    """Return the name of the model's attention implementation, such as `sdpa` or `eager`.

    The argument `attn_implementation` sets the name. No documented function reads the name:
    https://github.com/huggingface/transformers/blob/main/src/transformers/configuration_utils.py
    """
    return model.config._attn_implementation


def forget_quantization(model: Any) -> None:
    """Let `save_pretrained` save a model that was dequantized, or read from a GGUF file.

    Transformers takes the model for quantized, although its weights are in 16 or 32 bits, would revert what it did to
    the tensors of the files, and has no documented way back:
    https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_utils.py (save_pretrained)
    """
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized, model._weight_conversions = None, False, None


NOT_QUANTIZED = ["prediction_coefs"]  # Gemma 3n changes these weights in place (Gemma3nTextAltUp.predict)


def use_own_quantizer() -> None:
    """Make `load_in_4bit` also quantize experts, one parameter after the other while they are loaded.

    Layers in NOT_QUANTIZED are not quantized. Transformers documents `register_quantizer` for methods with new names.
    Other libraries know this one by its name:
    https://github.com/huggingface/transformers/blob/main/src/transformers/quantizers/quantizer_bnb_4bit.py
    """
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    from pipeline.model.experts import is_experts, quantized_experts

    def are_experts(model: Any, parameter: str) -> bool:
        path, _, name = parameter.rpartition(".")
        return is_experts(model.get_submodule(path), name)

    class Quantize(ConversionOps):
        def __init__(self, quantizer: Any, layers: Any) -> None:
            self.quantizer, self.layers = quantizer, layers

        def convert(self, input_dict: dict[str, Any], model: Any = None, **options: Any) -> dict[str, Any]:
            storage = self.quantizer.quantization_config.bnb_4bit_quant_storage
            result: dict[str, Any] = {}
            for name, value in input_dict.items():  # several, if a tensor of the files becomes several parameters
                if are_experts(model, name):
                    weight = value[0] if isinstance(value, list) else value
                    result[name] = quantized_experts(weight, storage)
                else:
                    result |= self.layers.convert({name: value}, model=model, **options)
            return result

    class Quantizer(Bnb4BitHfQuantizer):
        def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
            return super().param_needs_quantization(model, param_name) or are_experts(model, param_name)

        def get_quantize_ops(self) -> ConversionOps:
            return Quantize(self, super().get_quantize_ops())

        @staticmethod
        def get_modules_to_not_convert(*arguments: Any, **options: Any) -> list[str]:
            return [*Bnb4BitHfQuantizer.get_modules_to_not_convert(*arguments, **options), *NOT_QUANTIZED]

    AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = Quantizer


@contextmanager
def experts_on_meta() -> Iterator[None]:
    """Compute experts without torch's product of groups, which takes only bfloat16 on meta tensors.

    https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/moe.py (_grouped_mm)
    """
    from transformers.integrations import moe

    fits, moe._can_use_grouped_mm = moe._can_use_grouped_mm, lambda *_: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = fits


def names_in_4_bits(model: Any) -> set[str]:
    """Return the names of the layers that `load_in_4bit` quantizes. `model` has no weights, and is changed.

    The quantizer decides: it leaves out the head, layers that are tied to the head, and all that are not plain linear
    layers. The documented way, from_pretrained, would load the weights:
    https://github.com/huggingface/transformers/blob/main/src/transformers/quantizers/auto.py
    """
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    use_own_quantizer()
    AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True)).preprocess_model(model, device_map=None)
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def names_in_files(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Return {parameter of `model`: the tensor of the base's files that Transformers loads into it}.

    `stored` are the names of the tensors. Left out are tensors that the model has no place for, such as further heads,
    and tensors that Transformers puts together or changes, such as experts. A tied head has its embedding's tensor.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {loaded: name for name, (loaded, converted) in loaded_into(model, stored).items() if not converted}
    by_parameter = {id(parameters[loaded]): name for loaded, name in found.items()}
    tied = {name: by_parameter[id(of)] for name, of in parameters.items() if id(of) in by_parameter}
    return tied | found


def loaded_into(model: Any, stored: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Return {tensor of the files: (parameter of `model`, whether Transformers puts tensors together or changes them)}.

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
        loaded, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if loaded not in parameters and name in parameters:  # as convert_and_load_state_dict_in_model
            loaded, converter = name, None
        if loaded in parameters:
            found[name] = (loaded, converter is not None)
    return found


def ended(state: Any) -> bool:
    """Whether training had ended, also by early stopping, when a checkpoint with this TrainerState was saved.

    The documented attributes have only the planned number of steps, and early stopping takes fewer steps:
    https://github.com/huggingface/transformers/blob/main/src/transformers/trainer_callback.py (TrainerControl.state)
    """
    return state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
