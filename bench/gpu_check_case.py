"""Run checks of `bench.gpu_check` in this process. Each check prints its figures as one line of JSON.

    python -m bench.gpu_check_case CHECK [CHECK ...] [--tiny]

What a GPU should show was counted without one: operation by operation, on tensors without bytes (bench.gpu_counts).
On a CPU (--tiny), each check runs the same code with tiny shapes and short rows. A figure that only a GPU has says so.
"""

import argparse
import gc
import json
import re
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import bitsandbytes as bnb
import torch
from datasets import Dataset
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from transformers import LlamaConfig, PreTrainedConfig, TrainerCallback

from bench.gpu_case import (
    MODELS,
    OUT_OF_MEMORY,
    RECIPES,
    TINY,
    WARM,
    cap_memory,
    config,
    trained,
    trainer_of,
)
from bench.gpu_check import LIMITS
from bench.gpu_check_training import (
    KILLED,
    LAST,
    losses,
    losses_of,
    paged_on_gpu,
    parameters_of,
    random_rows,
    train,
    train_until_killed,
)
from bench.transformers_internals import random_nf4
from bench.trl_internals import log_probs
from pipeline.common.pinned import installed_version, pins
from pipeline.evaluation.answers import greedy
from pipeline.model.gpus import require_compiler
from pipeline.model.loading import pick_device, pick_dtype, reproducible
from pipeline.model.peft_internals import adapter_weights
from pipeline.training.memory import training
from pipeline.training.trainer import Trainer, lengths

GIB = 2**30
CPU, GPU = torch.device("cpu"), torch.device("cuda")
MODEL = {"cuda": "Llama 3.1 8B", "cpu": "Llama"}
SHORTER = {"cuda": 1, "cpu": 128}  # rows of the checks with MODEL
STEPS = WARM + 5
# Of rows of 8B, by their tokens: GiB that torch allocates, without CUBLAS and with it, and reserves.
COUNTED, CUBLAS = {512: 4.99, 2048: 5.32, 8192: 6.74}, 0.03
WITH_LIGER = 5.23  # GiB that torch allocates for 2048 tokens
RESERVED = {512: 5.03, 2048: 5.42, 8192: 7.26}
SPEED = {2048: "8,600 on an H200, 1,780 on an RTX 4090"}  # by operations, without the time to start kernels
CAP = 16  # GiB
LIBRARIES = ["torch", "triton", "transformers", "trl", "peft", "accelerate", "bitsandbytes"]
# On a GPU, the smallest adapters whose moments have 8 bits.
BASE = {"cuda": config(LlamaConfig, 2048, 256, 512, 2, 4, 2, tie_word_embeddings=False), "cpu": TINY["Llama"]}
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Figure(NamedTuple):
    name: str
    counted: str
    measured: float | str
    passed: bool | None = None  # None: there is no limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="+", choices=LIMITS)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    for name in asked.checks:
        print(json.dumps({"check": name} | outcome(globals()[name], "cpu" if asked.tiny else "cuda")), flush=True)


def outcome(check: Callable[[torch.device], list[Figure]], device: str) -> dict[str, Any]:
    started = time.monotonic()
    try:
        found: dict[str, Any] = {"figures": [figure._asdict() for figure in check(pick_device(device))]}
    except (Exception, SystemExit) as error:  # a UserError is a SystemExit
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"seconds": round(time.monotonic() - started, 1)} | found


def at_most(name: str, limit: float, measured: float) -> Figure:
    return Figure(name, f"at most {limit:.4g}", measured, measured <= limit)


def same(name: str, expected: float | str, measured: float | str) -> Figure:
    return Figure(name, str(expected), measured, measured == expected)


def allocated(name: str, gib: float, share: float, found: dict[str, Any]) -> Figure:
    measured = found["allocated"] / GIB
    return Figure(f"GiB allocated, {name}", f"{gib:.2f} ± {share:.0%}", measured, abs(measured - gib) <= share * gib)


def on_gpu(device: torch.device, *figures: Figure) -> list[Figure]:
    """Return the figures, on a CPU without their values."""
    if device.type == "cuda":
        return [*figures]
    return [figure._replace(measured="not on a CPU", passed=None) for figure in figures]


def environment(device: torch.device) -> list[Figure]:
    """Versions beside the pinned ones, and TRL's head, which Triton computes on a GPU, beside the same in float64."""
    if device.type == "cuda":
        require_compiler()
    shape = MODELS["Qwen2.5 0.5B"] if device.type == "cuda" else TINY["Qwen"]
    rows = random_rows([512 // SHORTER[device.type]], shape.vocab_size)
    with TemporaryDirectory() as folder:
        model = trainer_on(device, folder, shape, rows).model
    ids = torch.tensor(rows["input_ids"][:], device=device)
    hidden: list[torch.Tensor] = []
    backbone = model.get_base_model().base_model
    backbone.register_forward_hook(lambda module, inputs, output: hidden.append(output.last_hidden_state))
    found = log_probs(model, ids)
    gradient = torch.autograd.grad(found.sum(), hidden[0])[0]
    exact_hidden = hidden[0].detach().double().requires_grad_()
    logits = exact_hidden[:, :-1] @ model.get_output_embeddings().weight.double().T
    exact = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    exact_gradient = torch.autograd.grad(exact.sum(), exact_hidden)[0]
    return [
        *(Figure(name, pins().get(name, "not pinned"), installed_version(name) or "none") for name in LIBRARIES),
        *on_gpu(device, Figure("C compiler and Python.h", "found", "found", True)),
        at_most("log-probabilities of TRL's head, error", 2e-2, largest(found - exact)),
        at_most("gradients of TRL's head, error", 1e-3, largest(gradient - exact_gradient)),
    ]


def largest(values: torch.Tensor) -> float:
    return values.detach().abs().max().item()


def quantization(device: torch.device) -> list[Figure]:
    """NF4 made on a CPU beside NF4 made on the device, and 4-bit products beside dequantizing and multiplying."""
    width = 4096 if device.type == "cuda" else 128
    weight = torch.randn(width, width, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    codes, errors = [], []
    for place in (CPU, device):
        code, state = bnb.functional.quantize_4bit(weight.to(place), quant_type="nf4")
        codes.append(code.cpu())
        errors.append((bnb.functional.dequantize_4bit(code, state).cpu().float() - weight.float()).abs())
    figures = on_gpu(
        device,
        Figure("share of pairs of codes that differ", "ties alone", (codes[0] != codes[1]).float().mean().item()),
        at_most("difference of their errors, 0 for ties", 1e-2, largest(errors[0] - errors[1])),
    )
    code, state = bnb.functional.quantize_4bit(weight.to(device), quant_type="nf4", compress_statistics=True)
    dequantized = bnb.functional.dequantize_4bit(code, state).float()
    for tokens in (1, 5, 64, 512, 2048):
        inputs = torch.randn(tokens, width, dtype=torch.bfloat16, device=device)
        expected = inputs.float() @ dequantized.T
        error = largest(bnb.matmul_4bit(inputs, code.t(), quant_state=state).float() - expected) / largest(expected)
        figures.append(at_most(f"product of {tokens} tokens, relative error", 1e-2, error))
    return figures


def float32(device: torch.device) -> list[Figure]:
    return beside_cpu(device, "float32", "adamw_torch", 1e-3, 1e-2)


def bfloat16(device: torch.device) -> list[Figure]:
    """The defaults of a GPU beside those of a CPU."""
    return beside_cpu(device, "bfloat16", "auto", 2e-2, 2e-2)


def beside_cpu(device: torch.device, dtype: str, optimizer: str, before: float, after: float) -> list[Figure]:
    base = BASE[device.type]
    with TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as other:
        on_cpu = other.submit(losses, Path(folder, "cpu"), base, CPU, dtype, optimizer=optimizer)
        here = losses(Path(folder, "here"), base, device, dtype, optimizer=optimizer)
        first, *curve = differences(on_cpu.result(), here)
    return on_gpu(
        device,
        at_most("loss before training, difference from a CPU", before, first),
        at_most("losses, difference from a CPU", after, max(curve)),
    )


def differences(some: list[float], others: list[float]) -> list[float]:
    return [abs(one - other) for one, other in zip(some, others, strict=True)]


def same_bits(device: torch.device) -> list[Figure]:
    """Adapters trained without what saves memory. Of attention, only plain products give the same bits each time."""
    variants: dict[str, dict[str, Any]] = {
        "usual": {},
        "no offloading": {"activation_offloading": False},
        "embedding on the GPU": {"embedding_in_ram": False},
    }
    adapters = {}
    for name, options in variants.items():
        with TemporaryDirectory() as folder, sdpa_kernel(SDPBackend.MATH):
            weights = adapter_weights(train(Path(folder), BASE[device.type], device, **options).model)
        adapters[name] = torch.cat([weight.flatten() for weight in weights.values()])
    usual = adapters.pop("usual")
    return on_gpu(
        device, *(at_most(f"adapter, {name}, difference", 0, largest(adapters[name] - usual)) for name in adapters)
    )


def resume(device: torch.device) -> list[Figure]:
    """A killed training that continues, beside an undisturbed one."""
    base = BASE[device.type]
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()) as printed:
        undisturbed = losses(Path(folder, "undisturbed"), base, device)
        train_until_killed(Path(folder, "killed"), base, device)
        trainer = train(Path(folder, "killed"), base, device)
    continued = re.search(r"continuing from checkpoint-(\d+)", printed.getvalue())
    return [
        same("step from which training continues", KILLED, int(continued[1]) if continued else 0),
        at_most("losses, difference from an undisturbed run", 2e-2, max(differences(losses_of(trainer), undisturbed))),
        *on_gpu(device, same("paged states on the GPU", 0, paged_on_gpu(trainer))),
    ]


def resume_on_gpu(device: torch.device) -> list[Figure]:
    """The optimizer is loaded onto the GPU, as each of several processes loads it."""
    load = torch.load

    def onto_device(file: Any, **options: Any) -> Any:
        return load(file, **options | ({"map_location": device} if str(file).endswith("optimizer.pt") else {}))

    with TemporaryDirectory() as folder, patch("torch.load", onto_device):
        train_until_killed(Path(folder), BASE[device.type], device)
        trainer = train(Path(folder), BASE[device.type], device)
    return [
        same("last step", LAST, trainer.state.global_step),
        *on_gpu(device, same("paged states on the GPU", 0, paged_on_gpu(trainer))),
    ]


def llama(device: torch.device) -> PreTrainedConfig:
    return (MODELS | TINY)[MODEL[device.type]]


def trainer_on(device: torch.device, folder: str, shape: PreTrainedConfig, rows: Dataset, **train: Any) -> Trainer:
    parameters = parameters_of(device, **train)
    reproducible(parameters.seed, parameters.threads)
    model = random_nf4(shape, device, pick_dtype(parameters.base.compute_dtype, device))
    return trainer_of(model, parameters, rows, int(lengths(rows).max()), device, Path(folder))


def trainer_of_8b(device: torch.device, folder: str, lengths: list[int], **train: Any) -> Trainer:
    shape = llama(device)
    rows = random_rows([length // SHORTER[device.type] for length in lengths], shape.vocab_size)
    return trainer_on(device, folder, shape, rows, **train)


def trained_8b(device: torch.device, lengths: list[int], **train: Any) -> dict[str, Any]:
    gc.collect()  # a trainer before this one
    with TemporaryDirectory() as folder:
        return trained(trainer_of_8b(device, folder, lengths, **train), device)


def estimate(shape: PreTrainedConfig, length: int, **train: Any) -> dict[str, int]:
    """Return the bytes that `make check` estimates for a GPU."""
    parameters = parameters_of(CPU, **train)
    with TemporaryDirectory() as folder:
        shape.save_pretrained(folder)
        return training(Path(folder), parameters.lora, parameters.train, [], length, GPU, torch.bfloat16)


def memory(device: torch.device) -> list[Figure]:
    figures = []
    for length, counted in COUNTED.items():
        found = trained_8b(device, [length] * STEPS)
        used = (found["reserved"] + found["outside"]) / GIB
        limit = sum(estimate(llama(device), length // SHORTER[device.type]).values()) / GIB
        figures += on_gpu(
            device,
            Figure(f"tokens/s, {length} tokens", SPEED.get(length, ""), length * found["steps_per_second"]),
            allocated(f"{length} tokens", counted + CUBLAS, 0.02, found),
            Figure(f"GiB reserved, {length} tokens", str(RESERVED[length]), found["reserved"] / GIB),
            at_most(f"GiB used on the card, {length} tokens; the limit is the estimate", limit, used),
        )
    return [*figures, *on_gpu(device, same("expandable segments, by the pipeline's default", True, expandable(device)))]


def expandable(device: torch.device) -> bool:
    """Whether torch's allocator really has expandable segments: it may have read its settings too early."""
    return device.type == "cuda" and any(part.get("is_expandable") for part in torch.cuda.memory_snapshot())


class Traced(TrainerCallback):
    """Writes what torch's profiler sees in the first step after the warm ones."""

    def __init__(self, file: Path) -> None:
        self.file, self.profile = file, profile()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARM:
            self.profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARM + 1:
            self.profile.stop()
            self.profile.export_chrome_trace(str(self.file))


def profile_of_step(device: torch.device) -> list[Figure]:
    with TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        trainer = trainer_of_8b(device, folder, [2048] * (WARM + 1))
        trainer.add_callback(Traced(trace))
        trainer.train()
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return on_gpu(device, *seen([event for event in events if event["ph"] == "X"]))


def seen(events: list[dict[str, Any]]) -> list[Figure]:
    """Return the figures of a step. `events` have a duration, as in the trace that torch's profiler exports."""
    kernels = [event for event in events if event["cat"] == "kernel"]
    elapsed = max(map(end, kernels), default=1) - min((kernel["ts"] for kernel in kernels), default=0)
    steps = [event for event in events if event["name"].startswith("Optimizer.step#")]
    [optimizer] = [event for event in steps if event["cat"] == "user_annotation"]  # the GPU's part has another category
    waits = [event for event in events if re.match(r"cu\w+Synchronize", event["name"])]
    of_optimizer = [wait for wait in waits if optimizer["ts"] <= wait["ts"] <= end(optimizer)]
    names = {kernel["name"].partition("<")[0] for kernel in kernels}
    attention = sorted(name for name in names if re.search("flash|fmha|cudnn|attention", name))
    return [
        Figure("kernels", "8,339", len(kernels)),
        Figure("share of time in kernels", "", sum(kernel["dur"] for kernel in kernels) / elapsed),
        Figure("synchronizations", "12", len(waits)),
        at_most("synchronizations of the optimizer", 1, len(of_optimizer)),
        Figure("kernels of attention", "flash; cuDNN on Hopper", ", ".join(attention)),
    ]


def end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


def savings(device: torch.device) -> list[Figure]:
    """Rows of 2048 tokens, each time without one thing that saves memory or time."""
    rows = [2048] * STEPS
    usual = trained_8b(device, rows)
    with sdpa_kernel(WITHOUT_CUDNN):
        without_cudnn = trained_8b(device, rows)
    without_offloading = trained_8b(device, rows, activation_offloading=False)
    with patch("bench.gpu_case.place"):  # the last, because bitsandbytes keeps this embedding until the process ends
        on_device = trained_8b(device, rows)
    found = {
        "no cuDNN attention": without_cudnn,
        "no offloading": without_offloading,
        "embedding on the GPU": on_device,
    }
    counted = {"no offloading": 5.65, "embedding on the GPU": 6.30}
    return on_gpu(
        device,
        *(at_most(f"loss, {name}, difference", 2e-2, abs(found[name]["loss"] - usual["loss"])) for name in found),
        *(
            Figure(f"speed, {name}, ratio", "", found[name]["steps_per_second"] / usual["steps_per_second"])
            for name in found
        ),
        *(allocated(name, counted[name] + CUBLAS, 0.02, found[name]) for name in counted),
    )


def liger(device: torch.device) -> list[Figure]:
    """Rows of 2048 tokens with Liger's kernels, beside the same rows without."""
    rows = [2048] * STEPS
    plain = trained_8b(device, rows)
    found = trained_8b(device, rows, kernels="liger" if device.type == "cuda" else "none")
    return on_gpu(
        device,
        at_most("loss, difference", 2e-2, abs(found["loss"] - plain["loss"])),
        Figure("speed, ratio", "", found["steps_per_second"] / plain["steps_per_second"]),
        allocated("2048 tokens", WITH_LIGER + CUBLAS, 0.02, found),
    )


def trl_defaults(device: torch.device) -> list[Figure]:
    figures = []
    for length in (512, 2048):
        gc.collect()
        row = argparse.Namespace(model=MODEL[device.type], length=length // SHORTER[device.type], steps=STEPS)
        with TemporaryDirectory() as folder:
            found = trained(RECIPES["TRL's defaults"](row, device, Path(folder)), device)
        figures += on_gpu(
            device,
            Figure(f"tokens/s, {length} tokens", "", length * found["steps_per_second"]),
            Figure(f"GiB allocated, {length} tokens", "", found["allocated"] / GIB),
        )
    return figures


def longest_rows(device: torch.device) -> list[Figure]:
    return on_small_card(device, {34_000: "fits", 40_000: OUT_OF_MEMORY}, segments_grow=False)


def expandable_segments(device: torch.device) -> list[Figure]:
    return on_small_card(device, {40_000: "fits"}, segments_grow=True)


def on_small_card(device: torch.device, expected: dict[int, str], segments_grow: bool) -> list[Figure]:
    if device.type == "cuda":
        cap_memory(CAP)
    found = {length: fits(device, length) for length in expected}
    return on_gpu(
        device,
        *(same(f"{length} tokens on {CAP} GiB", expected[length], found[length]) for length in expected),
        same("expandable segments", segments_grow, expandable(device)),
    )


def fits(device: torch.device, length: int) -> str:
    try:
        trained_8b(device, [length] * 2)
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    return "fits"


def answers_and_lengths(device: torch.device) -> list[Figure]:
    """Four answers, and steps whose rows have different lengths, without and with cuDNN's attention."""
    new = 64 if device.type == "cuda" else 4
    shape = llama(device)
    model = random_nf4(shape, device, pick_dtype("auto", device))
    tokens = len(list(greedy(model, list(random_rows([5, 9, 30, 60], shape.vocab_size)["input_ids"]), set(), new)))
    del model
    seconds = []
    for attention in (sdpa_kernel(WITHOUT_CUDNN), nullcontext()):
        with attention:
            found = trained_8b(device, [512 + 128 * step for step in range(20)])
            seconds.append(1 / found["steps_per_second"])
    more = 1000 * (seconds[1] - seconds[0])
    return [
        same("tokens of four answers", 4 * new, tokens),
        *on_gpu(device, Figure("ms of a new length, with cuDNN more", "23 to 37 on Hopper", more)),
    ]


def batches(device: torch.device) -> list[Figure]:
    """Batches of two recipes. Their rows have slightly different lengths, so that each batch is padded."""
    figures = []
    for family, name, size in (("Qwen", "Qwen2.5 7B", 2), ("Gemma", "Gemma 2 9B", 4)):
        gc.collect()
        shape = MODELS[name] if device.type == "cuda" else TINY[family]
        lengths = [(1024 - number) // SHORTER[device.type] for number in range(size * STEPS)]
        rows = random_rows(lengths, shape.vocab_size)
        parts = estimate(shape, lengths[0], batch_size=size)
        gib = (sum(parts.values()) - parts["process"] - parts["optimizer"]) / GIB
        with TemporaryDirectory() as folder:
            found = trained(trainer_on(device, folder, shape, rows, batch_size=size), device)
        figures += on_gpu(device, allocated(f"{name}, {size} rows of up to 1024 tokens", gib, 0.05, found))
    return figures


if __name__ == "__main__":
    main()
