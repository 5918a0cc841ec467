"""Estimates how much memory training needs, before training starts.

The architecture of the base, built from config.json alone, takes one step on torch's meta device. Tensors on the meta
device have shapes and types, but no bytes.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, AutoConfig, PreTrainedModel

from pipeline.common.parameters.lora import Lora
from pipeline.common.parameters.train import Train
from pipeline.model.adapter import lora_config, with_adapter
from pipeline.model.bitsandbytes_internals import quantize_on_meta
from pipeline.model.embedding import only_looked_up
from pipeline.model.experts import names_of_experts
from pipeline.model.free_memory import free_memory
from pipeline.model.loading import (
    KEPT,
    keeps_dequantized,
    pick_attention,
    pick_optimizer,
)
from pipeline.model.skeleton import skeleton
from pipeline.model.transformers_internals import attention_of, experts_on_meta, first_layers, layers_of
from pipeline.training.gradient_checkpointing import pick_checkpointing, pick_offloading
from pipeline.training.liger_internals import liger_on_meta, uses_liger
from pipeline.training.lora_product import use_lora_product
from pipeline.training.processes import is_sharded, share_of_step
from pipeline.training.torch_internals import Alive, fused_on_meta, unpadded_on_meta

# Bytes per weight: 4 bits, and with double quantization an 8-bit scale per 64 weights and 32 bits per 256 scales.
NF4 = (4 + 8 / 64 + 32 / 64 / 256) / 8
NF4_EXPERTS = (4 + 32 / 64) / 8  # without double quantization
# Copies of a parameter with experts while it is loaded: its experts, joined in two steps; and, on a CPU, quantized.
# Measured on a CPU.
QUANTIZING = {"cpu": 8, "cuda": 3}
# Bytes of a process before it has a model: libraries (measured), and on a GPU the CUDA context (assumed, too high).
PROCESS = {"cpu": 600 * 2**20, "cuda": 1400 * 2**20}
# glibc does not give back all memory of freed tensors below KEPT bytes. Measured: it keeps this share of the bytes of
# all such tensors that a forward pass makes.
HOLES = 0.25


def saved_dtype(folder: Path) -> torch.dtype:
    """Return the type of the weights in the base's files, as config.json declares it."""
    return AutoConfig.from_pretrained(folder).dtype or torch.float32


def training(
    folder: Path,
    lora: Lora,
    train: Train,
    tokens: list[int],
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str = "nf4",
    sequences: int = 1,
) -> dict[str, int]:
    """Return the bytes on `device` of one process at the peak of training, by purpose. Rows have `sequences` sequences
    of `length` tokens each.

    `tokens` are the ids of tokens whose embeddings are trained. `dtype` is the type of all arithmetic. On a CPU, the
    weights' files are in memory while they are loaded. They count as activations if they need more memory than these.
    """
    model = skeleton(folder, dtype)
    pick_attention(model, device)
    in_nf4 = quantization == "nf4" and not (
        device.type == "cpu"
        and not is_sharded(train.processes, train.strategy)
        and keeps_dequantized(train.processes * model.num_parameters(), dtype)
    )
    base = kept_bytes(model, train, in_nf4)
    layer, of_experts = (weights * dtype.itemsize if in_nf4 else 0 for weights in most_dequantized(model))
    experts = [weight.numel() for weight in expert_weights(model)] if quantization == "nf4" else []
    loading = QUANTIZING[device.type] * max(experts, default=0) * dtype.itemsize
    files = 0 if device.type == "cuda" else model.num_parameters() * saved_dtype(folder).itemsize
    if in_nf4:
        quantize_on_meta(model, linear_layers(model), lora.use_dora)
    tuned = with_adapter(model, lora_config(lora, tokens))
    if device.type == "cuda" and only_looked_up(tuned) and not is_sharded(train.processes, train.strategy):
        base -= tuned.get_input_embeddings().weight.nbytes
    trained = [weight for weight in tuned.parameters() if weight.requires_grad]
    kept = getattr(torch, train.adapter_dtype)
    for weight in trained:  # under autocast, products of matrices are in bfloat16, whatever the stored type is
        weight.data = weight.data.to(dtype if dtype == torch.bfloat16 and weight.ndim > 1 else kept)
    of_layers = use_lora_product(tuned, dtype)
    copied = of_layers if kept != dtype else 0
    # DoRA of PEFT makes an identity matrix in the adapter's type, which autocast copies in the type of arithmetic.
    widest = max((layer.in_features for layer in tuned.modules() if isinstance(layer, LoraLayer)), default=0)
    identity = widest**2 * kept.itemsize if lora.use_dora and kept != dtype else 0
    rows, _ = share_of_step(train.batch_size, train.gradient_accumulation, train.processes)
    together = rows * sequences
    optimizer = pick_optimizer(train.optimizer, device)
    embeddings = {id(module.weight) for module in tuned.modules() if isinstance(module, torch.nn.Embedding)}
    checkpointing = pick_checkpointing(train.gradient_checkpointing, device)
    offloading = pick_offloading(train, model.config, together * length, device, dtype)
    buckets = train.processes > 1 and not is_sharded(train.processes, train.strategy)  # DDP's copies of gradients
    with liger_on_meta(model) if uses_liger(train.kernels, model.config, device) else nullcontext():
        step = one_step(tuned, together, length, device, checkpointing, offloading)
    head = head_bytes(tuned, together * length, device)
    return {
        "base": base,
        "adapter": sum(weight.numel() for weight in trained) * kept.itemsize,
        "gradients": sum(weight.numel() for weight in trained) * kept.itemsize * (2 if buckets else 1),
        "optimizer": sum(moments(weight, optimizer, kept, id(weight) in embeddings) for weight in trained),
        "activations": copied * dtype.itemsize
        + max(step.saved + head, step.peak + identity + of_experts, files + max(layer, of_experts, loading)),
        "process": PROCESS[device.type] + (int(HOLES * step.small) if device.type == "cpu" else 0),
    }


def linear_layers(model: PreTrainedModel) -> list[torch.nn.Linear]:
    """Return the layers that are quantized: all linear layers except the head."""
    head = model.get_output_embeddings()
    return [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]


def expert_weights(model: PreTrainedModel) -> list[torch.Tensor]:
    return [model.get_parameter(name) for name in names_of_experts(model)]


def in_nf4_of(model: PreTrainedModel) -> tuple[int, int]:
    """Return how many weights of layers, and of experts, are quantized."""
    layers = sum(layer.weight.numel() for layer in linear_layers(model))
    return layers, sum(map(torch.numel, expert_weights(model)))


def most_dequantized(model: PreTrainedModel) -> tuple[int, int]:
    """Return how many weights are dequantized at one time, at most: those of a layer, and all experts of a module."""
    of_modules = Counter[str]()
    for name in names_of_experts(model):
        of_modules[name.rpartition(".")[0]] += model.get_parameter(name).numel()
    return max(layer.weight.numel() for layer in linear_layers(model)), max(of_modules.values(), default=0)


def nf4_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the base in NF4."""
    layers, experts = in_nf4_of(model)
    others = model.num_parameters() - layers - experts
    return int(layers * NF4 + experts * NF4_EXPERTS) + others * model.dtype.itemsize


def kept_bytes(model: PreTrainedModel, train: Train, in_nf4: bool) -> int:
    """Return the bytes of the base in one process, in NF4 or in the model's type.

    Under FSDP a process keeps its share of the base, and all of what is not split: the scales of NF4, and an embedding
    that is tied to the head. It also gathers the layer that computes, the next layer, and the head.
    """
    whole = nf4_bytes(model) if in_nf4 else model.num_parameters() * model.dtype.itemsize
    if not is_sharded(train.processes, train.strategy):
        return whole
    layers, experts = in_nf4_of(model)
    scales = layers * (NF4 - 4 / 8) + experts * (NF4_EXPERTS - 4 / 8) if in_nf4 else 0
    head = model.get_output_embeddings().weight.nbytes
    not_shared = scales + (head if model.config.tie_word_embeddings else 0)
    shared = whole - not_shared
    two_layers = 2 * shared / model.config.get_text_config().num_hidden_layers
    gathered = two_layers + (0 if model.config.tie_word_embeddings else head)
    return int(not_shared + shared / train.processes + gathered)


def moments(weight: torch.Tensor, optimizer: str, kept: torch.dtype, embedding: bool) -> int:
    """Return the bytes of AdamW's two moments of a weight that is stored as `kept`.

    torch stores the moments in the type of the weight. bitsandbytes stores a moment in 8 bits, and in 32 bits for a
    small tensor. Transformers makes bitsandbytes use 32 bits for embeddings.
    """
    if optimizer == "adamw_torch":
        return 2 * weight.numel() * kept.itemsize
    return weight.numel() * (2 if optimizer == "paged_adamw_8bit" and weight.numel() >= 4096 and not embedding else 8)


def head_bytes(model: Any, tokens: int, device: torch.device) -> int:
    """Return the bytes that TRL's fused head needs to compute a loss.

    It needs the logits of at most 4096 tokens x 32768 vocabulary entries (on a GPU always 32768, even if fewer exist).
    On a CPU it needs about eight more tiles of this size, in 32 bits. In 32 bits it also needs the gradient of its
    input, and that of the complete head if any part of the head is trained.
    """
    head = model.get_output_embeddings()
    rows, vocabulary = min(tokens, 4096), model.config.get_text_config().vocab_size
    tile = rows * (32768 if device.type == "cuda" else min(vocabulary, 32768)) * model.dtype.itemsize
    more = 0 if device.type == "cuda" else 8.25 * 4 * rows * min(vocabulary, 32768)
    weight = head.weight  # with trained tokens, a copy of the complete matrix, with the trained rows in it
    copied = 0 if isinstance(weight, torch.nn.Parameter) else weight.nbytes
    trained = weight.numel() if weight.requires_grad else 0
    return int(tile + more) + copied + 4 * (tokens * model.config.get_text_config().hidden_size + trained)


class StepBytes(NamedTuple):
    """Bytes of the tensors that a forward and a backward pass make."""

    saved: int  # by the forward pass, for the backward pass
    peak: int  # maximum that is alive at one time
    small: int  # sum of all tensors below KEPT bytes that the forward pass makes


def one_step(
    model: Any, batch_size: int, length: int, device: torch.device, checkpointing: bool, offloading: bool
) -> StepBytes:
    """Measure a forward and a backward pass of `model` without its head. `model` is on the meta device.

    If its layers repeat, only a few of them take the step: each repetition needs the same memory again.
    """
    if attention_of(model) == "sdpa":
        flash = device.type == "cuda" and batch_size == 1 and model.dtype == torch.bfloat16
        model.set_attn_implementation("unpadded_on_meta" if flash else "fused_on_meta")
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    gradients = []
    for weight in model.train().parameters():
        if weight.requires_grad:
            gradients.append(torch.empty_like(weight))
            weight.grad = gradients[-1]
    ids = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
    eager = attention_of(model) == "eager"
    mask = None
    if eager or batch_size > 1:  # a single row has no padding, and SDPA makes its mask itself
        mask = torch.ones(batch_size, 1, length, length, dtype=model.dtype if eager else torch.bool, device="meta")

    def of_layers(number: int) -> StepBytes:
        saving = saved_tensors_hooks(moved_away, brought_back) if offloading else nullcontext()
        known = Alive([*model.parameters(), *model.buffers(), *gradients, ids], KEPT)
        with first_layers(model, number), known as alive, saving, experts_on_meta():
            hidden = model.get_base_model().base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state
            saved, small = alive.now, alive.small
            torch.autograd.backward(hidden, hidden.new_empty(()).expand_as(hidden))  # in training, freed at once
        return StepBytes(saved, alive.peak, small)

    layers, period = model.config.get_text_config().num_hidden_layers, period_of_layers(model)
    few = max(2, period)  # the first layer alone needs less than each further one
    if few + period >= layers:
        return of_layers(layers)
    repetitions = (layers - few) / period
    first, longer = of_layers(few), of_layers(few + period)
    return StepBytes(*(int(one + (more - one) * repetitions) for one, more in zip(first, longer, strict=True)))


def period_of_layers(model: Any) -> int:
    """Return after how many layers the weights' shapes and the attention repeat: 1 if all layers are alike, and their
    number if no layers repeat."""
    config, layers = model.config.get_text_config(), layers_of(model)
    attention = getattr(config, "layer_types", None) or [None] * len(layers)
    if not len(layers) == len(attention) == config.num_hidden_layers:
        return config.num_hidden_layers
    kinds = [
        (kind, [(name, weight.shape) for name, weight in layer.named_parameters()])
        for kind, layer in zip(attention, layers, strict=True)
    ]
    return next(period for period in range(1, len(kinds) + 1) if kinds[period:] == kinds[:-period])


def moved_away(saved: torch.Tensor) -> torch.Tensor | Callable[[], torch.Tensor]:
    """Return a weight itself, because it stays on the device; for another tensor, a function that makes it again."""
    if isinstance(saved, torch.nn.Parameter):
        return saved
    shape, dtype = saved.shape, saved.dtype
    return lambda: torch.empty(shape, dtype=dtype, device="meta")


def brought_back(kept: torch.Tensor | Callable[[], torch.Tensor]) -> torch.Tensor:
    return kept if isinstance(kept, torch.Tensor) else kept()


AttentionInterface.register("unpadded_on_meta", unpadded_on_meta)
AttentionInterface.register("fused_on_meta", fused_on_meta)


def beside_gpus(
    model: PreTrainedModel,
    train: Train,
    length: int,
    device: torch.device,
    quantization: str = "nf4",
    sequences: int = 1,
) -> int:
    """Return the bytes of RAM that all processes of a training on GPUs need together; 0 on a CPU. Rows have `sequences`
    sequences of `length` tokens each.

    Under FSDP each process makes the base in RAM. Without FSDP the embedding can be in RAM. If activations are
    offloaded, the input of each layer is in pinned memory, whose size torch rounds up to a power of two.
    """
    if device.type != "cuda":
        return 0
    config = model.config.get_text_config()
    rows, _ = share_of_step(train.batch_size, train.gradient_accumulation, train.processes)
    each = PROCESS["cpu"]
    if is_sharded(train.processes, train.strategy):
        in_nf4 = quantization == "nf4"
        each += nf4_bytes(model) if in_nf4 else model.num_parameters() * model.dtype.itemsize
    elif only_looked_up(model):
        each += model.get_input_embeddings().weight.nbytes
    tokens = rows * sequences * length
    if pick_offloading(train, model.config, tokens, device, model.dtype):
        size = tokens * config.hidden_size * model.dtype.itemsize
        each += config.num_hidden_layers * 2 ** (size - 1).bit_length()
    return each * train.processes


def evaluating_gguf(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> int:
    """Return the bytes of RAM that evaluate_gguf needs. With `gguf.imatrix`, convert_gguf needs as much.

    `dtype` is the type of arithmetic on `device`.
    """
    parameters = model.num_parameters()
    merged = parameters * dtype.itemsize
    if device.type == "cuda":  # the part that does not fit on the GPU stays in RAM
        merged = max(0, merged - free_memory(device))
    return PROCESS["cpu"] + max(merged, parameters * 2)  # later, llama.cpp has the f16 file in memory
