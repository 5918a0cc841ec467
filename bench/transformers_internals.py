"""Uses of Transformers and bitsandbytes in the benchmarks that their documentation does not cover.

tests/test_library_internals.py tests the use.
"""

import copy

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer, HfQuantizer

from pipeline.model.loading import nf4


def random_nf4(shape: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model with random weights, quantized as `pipeline.model.loading.load_quantized` quantizes a base.

    The weights are made one at a time: only one of the tensors to quantize is in 16 bits on the device at any time. The
    documented way, from_pretrained, needs the weights in files, which take 16 GB for 8 B parameters:
    https://github.com/huggingface/transformers/blob/main/src/transformers/quantizers/base.py
    """
    model, quantizer = empty_nf4(shape, device, dtype)
    torch.manual_seed(1)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if module is model.get_output_embeddings() and model.config.tie_word_embeddings:
                continue
            values = torch.empty(weight.shape, dtype=dtype, device=device)
            if weight.ndim == 2:
                values.normal_(std=0.02)
            else:  # of a norm, which Gemma adds 1 to, or a bias
                values.fill_(0 if name == "bias" or shape.model_type == "gemma2" else 1)
            if isinstance(weight, bnb.nn.Params4bit):
                new = bnb.nn.Params4bit(values, requires_grad=False, **weight.__dict__).to(device)
            else:
                new = torch.nn.Parameter(values)
            setattr(module, name, new)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    model.tie_weights()
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model.eval()


def empty_nf4(shape: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> tuple[PreTrainedModel, HfQuantizer]:
    """Return a model whose weights have no bytes yet, and its quantizer."""
    quantizer = AutoHfQuantizer.from_config(nf4(dtype), pre_quantized=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(shape), dtype=dtype)
    quantizer.preprocess_model(model, dtype=dtype, device_map={"": device})
    model.tie_weights()
    return model, quantizer


def fake_nf4(shape: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of `random_nf4` with fake weights, inside a FakeTensorMode. Its weights in NF4 are plain
    parameters, because those of bitsandbytes cannot be fake."""
    with unset_fake_temporarily():
        model, quantizer = empty_nf4(shape, device, dtype)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            values = torch.empty(weight.shape, dtype=dtype, device=device)
            if isinstance(weight, bnb.nn.Params4bit):
                values, module.quant_state = bnb.functional.quantize_4bit(
                    values, quant_type="nf4", compress_statistics=True
                )
            new = torch.nn.Parameter(values, requires_grad=False)
            if isinstance(weight, bnb.nn.Params4bit):
                vars(new).update(vars(weight) | {"quant_state": module.quant_state, "bnb_quantized": True})
            module._parameters[name] = new
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    model.tie_weights()
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model.eval()
