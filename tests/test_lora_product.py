"""LoRA's own product: the results of PEFT's, in fewer operations."""

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.training.lora_product import use_lora_product

INPUT = torch.arange(24).reshape(2, 12)
PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}


def tuned(dtype: torch.dtype, in_nf4: bool = False, bias: bool = False, **lora: Any) -> PeftModel:
    """A small model with an adapter in float32 whose matrices have random numbers."""
    torch.manual_seed(1)
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, attention_bias=bias)).to(dtype)
    if in_nf4:
        for name, layer in list(base.model.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                new = bnb.nn.LinearNF4(layer.in_features, layer.out_features, layer.bias is not None, dtype)
                new.load_state_dict(layer.state_dict())
                base.model.set_submodule(name, new.to("cpu"))
        base.is_loaded_in_4bit = True
    model = get_peft_model(base, LoraConfig(**PLAIN, **lora))
    change(model, lambda weight: torch.nn.init.normal_(weight, std=0.1))
    return model.train()


def change(model: PeftModel, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for name, weight in model.named_parameters():
        if "lora_A" in name or "lora_B" in name or "q_proj.base_layer.bias" in name:
            how(weight.data)


def results(model: PeftModel) -> list[torch.Tensor]:
    """The logits of a batch, and the gradients of the adapter and of the embedding."""
    model.zero_grad()
    model.get_input_embeddings().weight.requires_grad_()
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=model.get_base_model().dtype == torch.bfloat16):
        outputs = model(input_ids=INPUT, labels=INPUT)
    outputs.loss.backward()
    return [outputs.logits.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)]


@pytest.mark.parametrize("in_nf4", [True, False])
@pytest.mark.parametrize(
    "lora", [{}, {"bias": True}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str
)
def test_results_and_gradients_are_those_of_peft(in_nf4: bool, lora: dict[str, Any]) -> None:
    model = tuned(torch.float32, in_nf4, **lora)
    expected = results(model)
    use_lora_product(model, torch.float32)
    found = results(model)
    assert len(found) > 28
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_in_16_bits_the_adapter_is_that_of_the_last_step_and_results_are_as_precise_as_those_of_peft() -> None:
    exact, peft, own = tuned(torch.float32), tuned(torch.bfloat16), tuned(torch.bfloat16)
    use_lora_product(own, torch.bfloat16)
    results(own)
    for model in (exact, peft, own):
        change(model, lambda weight: weight.mul_(1.5))
    true, other, found = results(exact), results(peft), results(own)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in other]
    assert distance(found, true) < 1.1 * distance(other, true)


def distance(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The mean over tensors, as a share of their size."""
    return sum(float((one - other).norm() / other.norm()) for one, other in zip(some, others, strict=True)) / len(some)


@pytest.mark.parametrize("in_nf4", [True, False])
def test_each_layer_has_results_of_the_type_that_peft_gives_them(in_nf4: bool) -> None:
    model = tuned(torch.bfloat16, in_nf4, modules_to_save=["norm"])
    expected = types(model)
    use_lora_product(model, torch.bfloat16)
    assert types(model) == expected


def types(model: PeftModel) -> list[torch.dtype]:
    """The types of the results of all layers with LoRA, in the order of their calls."""
    found: list[torch.dtype] = []
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    hooks = [layer.register_forward_hook(lambda *call: found.append(call[-1].dtype)) for layer in layers]
    results(model)
    for hook in hooks:
        hook.remove()
    assert len(found) == 14
    return found


def test_a_step_has_a_fifth_fewer_operations() -> None:
    peft, own = (tuned(torch.bfloat16, in_nf4=True) for _ in range(2))
    use_lora_product(own, torch.bfloat16)
    assert operations(own) < 0.8 * operations(peft)


def operations(model: PeftModel) -> int:
    with Count() as count:
        results(model)
    return count.operations


class Count(TorchDispatchMode):
    operations = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += not operation.is_view
        return operation(*args, **(kwargs or {}))


def test_a_disabled_adapter_changes_nothing() -> None:
    model = tuned(torch.float32)
    use_lora_product(model, torch.float32)
    with model.disable_adapter(), torch.no_grad():
        found = model(input_ids=INPUT).logits
        torch.testing.assert_close(found, model.unload()(input_ids=INPUT).logits)
