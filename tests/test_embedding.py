"""What lies in RAM beside a GPU: the same numbers, and nothing of it on the GPU."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.autograd.graph import save_on_cpu
from transformers import modeling_utils

from bench.gpu_case import TINY
from bench.transformers_internals import random_nf4
from pipeline.common.parameters.params_yaml import check
from pipeline.model.adapter import lora_config, with_adapter
from pipeline.model.embedding import keep_in_ram

CPU = torch.device("cpu")


def adapted(family: str, tokens: list[int]) -> PeftModel:
    torch.manual_seed(1)
    model = random_nf4(TINY[family], CPU, torch.float32)
    return with_adapter(model, lora_config(check(Path("params.yaml")).lora, tokens))


def loss_and_gradients(model: PeftModel) -> list[torch.Tensor]:
    model.enable_input_require_grads()
    ids = torch.arange(32).view(2, 16)
    loss = model(ids, labels=ids).loss
    loss.backward()
    return [loss, *(weight.grad for weight in model.parameters() if weight.requires_grad)]


def test_a_model_learns_the_same_with_its_embedding_in_ram_and_nothing_moves_it_from_there() -> None:
    there, here = adapted("Llama", []), adapted("Llama", [])
    keep_in_ram(here)
    for one, other in zip(loss_and_gradients(there), loss_and_gradients(here), strict=True):
        assert torch.equal(one, other)
    shape = TINY["Llama"]
    embedding = shape.vocab_size * shape.hidden_size
    assert sum(map(torch.numel, there.parameters())) - sum(map(torch.numel, here.parameters())) == embedding
    assert here.get_input_embeddings().to("meta").weight.device == CPU


@pytest.mark.parametrize(("family", "tokens"), [("Qwen", []), ("Gemma", []), ("Llama", [5])])
def test_an_embedding_that_is_the_head_too_or_is_trained_stays(family: str, tokens: list[int]) -> None:
    model = adapted(family, tokens)
    before = model.get_input_embeddings()
    keep_in_ram(model)
    assert model.get_input_embeddings() is before


def test_a_model_learns_the_same_with_its_checkpoints_in_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    offloaded = list[torch.Size]()

    def unpinned(pin_memory: bool, device_type: str) -> save_on_cpu:
        hooks = save_on_cpu(pin_memory=False, device_type=device_type)
        pack = hooks.pack_hook

        def counted(saved: torch.Tensor) -> object:
            offloaded.append(saved.shape)
            return pack(saved)

        hooks.pack_hook = counted
        return hooks

    monkeypatch.setattr(modeling_utils, "save_on_cpu", unpinned)  # without a GPU no memory can be pinned
    there, here = adapted("Llama", []).train(), adapted("Llama", []).train()
    there.activation_checkpointing_enable()
    here.activation_checkpointing_enable(offload=True)
    for one, other in zip(loss_and_gradients(there), loss_and_gradients(here), strict=True):
        assert torch.equal(one, other)
    assert offloaded.count(torch.Size([2, 16, TINY["Llama"].hidden_size])) == TINY["Llama"].num_hidden_layers
