"""How much memory training needs, told before it: the base's architecture takes one step on torch's meta device, where
tensors have shapes and types but no bytes."""

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.utils._pytree import tree_leaves
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.adapter import lora_config
from pipeline.parameters import Lora

# Bytes a weight: 4 bits, and with double quantization 8 bits for each 64 weights, 32 for each 256 of those.
NF4 = (4 + 8 / 64 + 32 / 64 / 256) / 8


@dataclass(frozen=True)
class Step:
    """What one device batch is made of, and how it is computed."""

    batch_size: int
    length: int  # tokens of its longest row
    dtype: torch.dtype  # of all arithmetic
    adapter_dtype: torch.dtype
    gradient_checkpointing: bool
    optimizer: str  # adamw_torch, paged_adamw_8bit or paged_adamw_32bit


def meta_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The base made of config.json alone, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)


def training(folder: Path, knobs: Lora, trainable_tokens: list[int], step: Step) -> dict[str, int]:
    """Bytes of `weights`, `adapter` (gradients and optimizer states with it) and `activations` at the peak of a step."""
    model = meta_model(folder, step.dtype)
    weights = nf4_bytes(model)
    largest = max(weight.numel() for weight in linear_weights(model)) * step.dtype.itemsize
    # Under autocast (bfloat16) the adapter computes in bfloat16 too, whatever it is kept in.
    traced = step.dtype if step.dtype == torch.bfloat16 else step.adapter_dtype
    tuned = get_peft_model(model, lora_config(knobs, trainable_tokens), autocast_adapter_dtype=False)
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(traced)
    adapter = sum(2 * weight.numel() * step.adapter_dtype.itemsize + states(weight, step.optimizer) for weight in trained)
    saved, peak = activations(tuned, step)
    return {
        "weights": weights,
        "adapter": adapter,
        "activations": max(saved + head_bytes(tuned, step), peak + largest),
    }


def linear_weights(model: PreTrainedModel) -> list[torch.Tensor]:
    """The weights that are quantized: those of all linear layers but the head."""
    head = model.get_output_embeddings()
    return [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]


def nf4_bytes(model: PreTrainedModel) -> int:
    quantized = sum(weight.numel() for weight in linear_weights(model))
    everything = sum(parameter.numel() for parameter in model.parameters())  # a tied head counts once
    return int(quantized * NF4) + (everything - quantized) * model.dtype.itemsize


def states(weight: torch.Tensor, optimizer: str) -> int:
    """Bytes of AdamW's two moments of a weight; bitsandbytes keeps small tensors in 32 bits."""
    return weight.numel() * (2 if optimizer == "paged_adamw_8bit" and weight.numel() >= 4096 else 8)


def head_bytes(model: Any, step: Step) -> int:
    """Bytes that TRL's fused head needs at once: logits of at most 4096 tokens x 32768 entries of the vocabulary, four
    times where it has no Triton kernel, and the gradients of its input in 32 bits, of a trained head too."""
    head = model.get_output_embeddings()
    tokens = step.batch_size * step.length
    tile = min(tokens, 4096) * min(model.config.vocab_size, 32768) * step.dtype.itemsize
    trained = sum(weight.numel() for weight in head.parameters() if weight.requires_grad)
    return 4 * tile + 4 * (tokens * model.config.hidden_size + trained)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive among those made inside it: `now`, and `peak` so far."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {id(tensor.untyped_storage()) for tensor in known}  # views of these are nothing new
        self.now = self.peak = self.made = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in self.known:
                self.known.add(id(storage))
                self.now += storage.nbytes()
                self.made += storage.nbytes() * (storage.nbytes() < 2**25)
                weakref.finalize(storage, self.freed, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def freed(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size


def activations(model: Any, step: Step) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass, and the most that is alive at once in both."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("fused_on_meta")
    if step.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.empty_like(weight)
    ids = torch.zeros(step.batch_size, step.length, dtype=torch.long, device="meta")
    eager = model.config._attn_implementation == "eager"
    mask = torch.ones(
        step.batch_size, 1, step.length, step.length, dtype=step.dtype if eager else torch.bool, device="meta"
    )
    with LiveBytes([*model.parameters(), *model.buffers(), ids]) as live:
        hidden = model.get_base_model().base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        saved = live.now; print("made", live.made>>20)
        torch.autograd.backward(hidden, torch.empty_like(hidden))
    return saved, live.peak


def fused_on_meta(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As SDPA with a padding mask: heads repeated, the mask in the queries' type, no scores kept. Left to itself, SDPA
    takes the way on meta that keeps them."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bias = torch.zeros_like(attention_mask, dtype=query.dtype)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, attn_mask=bias)[0].transpose(1, 2).contiguous(), None


AttentionInterface.register("fused_on_meta", fused_on_meta)
