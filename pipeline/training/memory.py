"""How much memory training needs, told before it: the base's architecture, made of config.json alone, takes one step on
torch's meta device, where tensors have shapes and types but no bytes."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.common.errors import UserError
from pipeline.common.parameters.lora import Lora
from pipeline.common.parameters.train import Train
from pipeline.model.adapter import lora_config, with_adapter
from pipeline.model.embedding import only_looked_up
from pipeline.model.loading import KEPT, pick_checkpointing, pick_offloading, pick_optimizer
from pipeline.model.transformers_internals import attention_of
from pipeline.training.processes import is_sharded, share_of_step
from pipeline.training.torch_internals import Alive, fused_on_meta

# Bytes a weight: 4 bits, and with double quantization 8 bits for each 64 weights, 32 for each 256 of those.
NF4 = (4 + 8 / 64 + 32 / 64 / 256) / 8
# What a process has before it has a model: libraries, on a GPU CUDA's context too. Measured.
PROCESS = {"cpu": 600 * 2**20, "cuda": 1400 * 2**20}
# glibc keeps holes where tensors under KEPT bytes were. Measured: this share of all that a forward pass makes of such.
HOLES = 0.25


def skeleton(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The base in `folder` without weights, on the meta device.

    Raises:
        UserError: config.json is of no causal language model that Transformers knows.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    except (OSError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"base.model: Transformers makes no language model of {folder}/config.json: {reason}") from None


def saved_dtype(folder: Path) -> torch.dtype:
    """The type of the base's weights in their files, as config.json has it."""
    return AutoConfig.from_pretrained(folder).dtype or torch.float32


def training(
    folder: Path, lora: Lora, train: Train, tokens: list[int], length: int, device: torch.device, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes on `device` at the peak of training with rows of `length` tokens, by what needs them; of one process.

    `tokens` are the ids of tokens whose embeddings are trained, `dtype` is that of all arithmetic. On a CPU the
    weights' files, in memory while they are loaded, count as activations if they need more than those.
    """
    model = skeleton(folder, dtype)
    base = kept_bytes(model, train)
    dequantized = max(weight.numel() for weight in linear_weights(model)) * dtype.itemsize
    files = 0 if device.type == "cuda" else model.num_parameters() * saved_dtype(folder).itemsize
    tuned = with_adapter(model, lora_config(lora, tokens))
    if device.type == "cuda" and only_looked_up(tuned) and not is_sharded(train.processes, train.strategy):
        base -= tuned.get_input_embeddings().weight.nbytes
    trained = [weight for weight in tuned.parameters() if weight.requires_grad]
    kept = getattr(torch, train.adapter_dtype)
    for weight in trained:  # under autocast it computes in bfloat16, whatever it is kept in
        weight.data = weight.data.to(dtype if dtype == torch.bfloat16 else kept)
    rows, _ = share_of_step(train.batch_size, train.gradient_accumulation, train.processes)
    optimizer = pick_optimizer(train.optimizer, device)
    embeddings = {id(module.weight) for module in tuned.modules() if isinstance(module, torch.nn.Embedding)}
    checkpointing = pick_checkpointing(train.gradient_checkpointing, device)
    offloading = pick_offloading(train.activation_offloading, checkpointing, device)
    step = one_step(tuned, rows, length, checkpointing, offloading)
    head = head_bytes(tuned, rows * length, device)
    return {
        "base": base,
        "adapter": sum(weight.numel() for weight in trained) * kept.itemsize,
        "gradients": sum(weight.numel() for weight in trained) * kept.itemsize,
        "optimizer": sum(moments(weight, optimizer, kept, id(weight) in embeddings) for weight in trained),
        "activations": max(step.saved + head, step.peak + dequantized, files + dequantized),
        "process": PROCESS[device.type] + (int(HOLES * step.small) if device.type == "cpu" else 0),
    }


def linear_weights(model: PreTrainedModel) -> list[torch.Tensor]:
    """The weights that are quantized: those of all linear layers but the head."""
    head = model.get_output_embeddings()
    return [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]


def nf4_bytes(model: PreTrainedModel) -> int:
    quantized = sum(weight.numel() for weight in linear_weights(model))
    return int(quantized * NF4) + (model.num_parameters() - quantized) * model.dtype.itemsize


def kept_bytes(model: PreTrainedModel, train: Train) -> int:
    """Of the base, by one process. Under FSDP that is its share, what is not shared (the scales of NF4, and embeddings
    that are the head too), and whole: the layer that computes, the next one, and the head."""
    if not is_sharded(train.processes, train.strategy):
        return nf4_bytes(model)
    scales = sum(weight.numel() for weight in linear_weights(model)) * (NF4 - 4 / 8)
    head = model.get_output_embeddings().weight.nbytes
    not_shared = scales + (head if model.config.tie_word_embeddings else 0)
    shared = nf4_bytes(model) - not_shared
    two_layers = 2 * shared / model.config.get_text_config().num_hidden_layers
    whole = two_layers + (0 if model.config.tie_word_embeddings else head)
    return int(not_shared + shared / train.processes + whole)


def moments(weight: torch.Tensor, optimizer: str, kept: torch.dtype, embedding: bool) -> int:
    """Bytes of AdamW's two moments of a weight that is kept as `kept`, as torch keeps them too. bitsandbytes keeps 8
    bits, but 32 of small tensors, and Transformers has it keep 32 of embeddings."""
    if optimizer == "adamw_torch":
        return 2 * weight.numel() * kept.itemsize
    return weight.numel() * (2 if optimizer == "paged_adamw_8bit" and weight.numel() >= 4096 and not embedding else 8)


def head_bytes(model: Any, tokens: int, device: torch.device) -> int:
    """Bytes that TRL's fused head needs for a loss: logits of 4096 tokens x 32768 words at most (on a GPU that many
    words, be there fewer), on a CPU eight more such tiles in 32 bits, and in 32 bits the gradients of its input and, if
    any of it is trained, of all of it."""
    head = model.get_output_embeddings()
    rows, words = min(tokens, 4096), model.config.get_text_config().vocab_size
    tile = rows * (32768 if device.type == "cuda" else min(words, 32768)) * model.dtype.itemsize
    more = 0 if device.type == "cuda" else 8.25 * 4 * rows * min(words, 32768)
    weight = head.weight  # with trained tokens, a copy of the whole matrix with their rows in it
    copied = 0 if isinstance(weight, torch.nn.Parameter) else weight.nbytes
    trained = weight.numel() if weight.requires_grad else 0
    return int(tile + more) + copied + 4 * (tokens * model.config.get_text_config().hidden_size + trained)


@dataclass
class StepBytes:
    """Of the tensors that a forward and a backward pass make."""

    saved: int  # by the one for the other
    peak: int  # alive at once
    small: int  # of all under KEPT that the forward pass makes


def one_step(model: Any, batch_size: int, length: int, checkpointing: bool, offloading: bool) -> StepBytes:
    """A forward and a backward pass of `model` without its head; it lies on the meta device."""
    if attention_of(model) == "sdpa":
        model.set_attn_implementation("fused_on_meta")
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
    if eager or batch_size > 1:  # a single row is not padded, and SDPA makes its own mask of it
        mask = torch.ones(batch_size, 1, length, length, dtype=model.dtype if eager else torch.bool, device="meta")
    saving = saved_tensors_hooks(moved_away, brought_back) if offloading else nullcontext()
    with Alive([*model.parameters(), *model.buffers(), *gradients, ids], KEPT) as alive, saving:
        hidden = model.get_base_model().base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        saved, small = alive.now, alive.small
        torch.autograd.backward(hidden, torch.empty_like(hidden))
    return StepBytes(saved, alive.peak, small)


def moved_away(saved: torch.Tensor) -> torch.Tensor | Callable[[], torch.Tensor]:
    """What is left on the device of a tensor that the backward pass needs: weights alone."""
    if isinstance(saved, torch.nn.Parameter):
        return saved
    shape, dtype = saved.shape, saved.dtype
    return lambda: torch.empty(shape, dtype=dtype, device="meta")


def brought_back(kept: torch.Tensor | Callable[[], torch.Tensor]) -> torch.Tensor:
    return kept if isinstance(kept, torch.Tensor) else kept()


AttentionInterface.register("fused_on_meta", fused_on_meta)


def beside_gpus(model: PreTrainedModel, train: Train, length: int, device: torch.device) -> int:
    """Bytes of the machine's own memory that training on GPUs needs, of all its processes: under FSDP the base in NF4,
    which each makes there; else the embedding; and each layer's input, which torch rounds up to a power of two where it
    pins it."""
    if device.type != "cuda":
        return 0
    config = model.config.get_text_config()
    rows, _ = share_of_step(train.batch_size, train.gradient_accumulation, train.processes)
    each = PROCESS["cpu"]
    if is_sharded(train.processes, train.strategy):
        each += nf4_bytes(model)
    elif only_looked_up(model):
        each += model.get_input_embeddings().weight.nbytes
    if pick_offloading(train.activation_offloading, pick_checkpointing(train.gradient_checkpointing, device), device):
        size = rows * length * config.hidden_size * model.dtype.itemsize
        each += config.num_hidden_layers * 2 ** (size - 1).bit_length()
    return each * train.processes


def evaluating_gguf(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes of the machine's own memory that evaluate_gguf needs; with `gguf.imatrix` convert_gguf too.

    `dtype` is that of arithmetic on `device`.
    """
    parameters = model.num_parameters()
    merged = parameters * dtype.itemsize
    if device.type == "cuda":  # what the GPU has no room for stays here
        merged = max(0, merged - free(device))
    return PROCESS["cpu"] + max(merged, parameters * 2)  # llama.cpp has the f16 file in memory after it


def free(device: torch.device) -> int:
    """Bytes that a new process can have on `device`; a container's limit counts (control groups, version 2)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    available = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    limit, used, stat = (group / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.exists() and (bound := limit.read_text(encoding="ascii").strip()) != "max":
        reclaimable = dict(line.split() for line in stat.read_text(encoding="ascii").splitlines())["inactive_file"]
        available = min(available, int(bound) - int(used.read_text(encoding="ascii")) + int(reclaimable))
    return available
