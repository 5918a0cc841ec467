"""Measure speed, memory and the longest context of training on a GPU: this pipeline, TRL's defaults, Unsloth's recipe.

    python -m bench.gpu_qlora speed [MODEL ...]      # all four by default; some minutes each
    python -m bench.gpu_qlora context [MODEL ...] [--caps GIB ...]
    python -m bench.gpu_qlora speed --tiny           # on a CPU, with tiny shapes: a test of the benchmark itself

bench/README.md explains the output. Nothing is downloaded: models have the real shapes and random weights, made
directly in NF4. Each case runs in its own process (bench.gpu_case), so that no memory of an earlier case remains.

Unsloth needs other versions than requirements.txt. Install it in a separate environment: `pip install unsloth pydantic
ruamel.yaml`. Give the Python of that environment with `--unsloth`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from bench.gpu_case import MODELS, OUT_OF_MEMORY, RECIPES, ROOT, TINY, of_params_yaml
from pipeline.training.memory import training

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of its own calls
GIB = 2**30
MULTIPLE = 64  # tokens, contexts are multiples of it
TIMEOUT = 400  # seconds of a case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "context"])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(f"'{model}'" for model in MODELS))
    parser.add_argument("--caps", nargs="+", type=float, default=[8, 12, 16, 24], metavar="GIB", help="sizes of cards")
    parser.add_argument("--unsloth", default=sys.executable, metavar="PYTHON", help="of an environment with Unsloth")
    parser.add_argument("--tiny", action="store_true", help=f"tiny shapes on a CPU: {', '.join(TINY)}")
    asked = parser.parse_args()
    if asked.tiny and asked.what == "context":
        parser.error("--tiny is for speed: on a CPU no memory is capped")
    if not asked.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: --tiny shows on a CPU that it runs")
    shapes = TINY if asked.tiny else MODELS
    if unknown := set(asked.models) - set(shapes):
        parser.error(f"no such model: {', '.join(unknown)}; there are {', '.join(shapes)}")
    pythons = dict.fromkeys(RECIPES, sys.executable) | {"Unsloth": asked.unsloth}
    if reason := failure(subprocess.run([asked.unsloth, "-c", "import unsloth"], capture_output=True, text=True)):
        print(f"Unsloth is left out ({reason}): --help shows how to install it", flush=True)
        del pythons["Unsloth"]
    for model in asked.models or shapes:
        with tempfile.TemporaryDirectory() as saved:
            if "Unsloth" in pythons:
                case(sys.executable, "save", model, "--saved", saved)
            for recipe, python in pythons.items():
                run = partial(case, python, recipe, model, "--saved", saved)
                if asked.what == "speed":
                    for length in [16] if asked.tiny else [512, 2048, 8192]:
                        print_speed(model, recipe, length, shapes[model], run("--length", str(length)))
                else:
                    print_contexts(model, recipe, asked.caps, run)


def case(python: str, *arguments: str) -> dict[str, Any]:
    """Return the measurements of a case, or {"failed": reason}."""
    command = [python, "-m", "bench.gpu_case", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {TIMEOUT} s"}
    if reason := failure(done):
        return {"failed": reason}
    return json.loads(done.stdout.splitlines()[-1])


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last error line of a failed process, or "" if it did not fail."""
    if not done.returncode:
        return ""
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return ([line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)] or lines)[-1]


def print_speed(model: str, recipe: str, length: int, shape: PreTrainedConfig, result: dict[str, Any]) -> None:
    line = f"{model:14}{recipe:16}{length:6}"
    if "failed" in result:
        line += f"  {result['failed']}"
    else:
        speed, peak = result["tokens_per_second"], result["peak"]
        line += (
            f"{speed:9.0f} tokens/s{speed * flops_of_a_token(shape, length) / peak:7.1%} of {peak / 1e12:.0f} TFLOP/s"
        )
        line += f"{result['allocated'] / GIB:8.2f} GiB allocated{result['reserved'] / GIB:7.2f} reserved"
        if recipe == "this pipeline":
            line += f"{estimate(shape, length) / GIB:7.2f} estimate"
        line += f"  {result['card']}"
    print(line, flush=True)


def flops_of_a_token(shape: PreTrainedConfig, length: int) -> float:
    """Return the floating point operations that training needs per token of a row of `length` tokens.

    Recomputation, casts and the adapter (below 1 %) are not counted. PaLM, appendix B
    (https://arxiv.org/abs/2204.02311), counts 6 operations per weight, of which 2 are for the weight's gradient; a
    frozen weight has no gradient. For attention it counts 12 x layers x heads x width of a head x length; causal
    attention needs half. Layers with another attention, such as a linear one, count as if theirs were complete.
    """
    text = shape.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text)
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    width = vars(text).get("head_dim") or text.hidden_size // text.num_attention_heads
    return 4 * weights + 6 * text.num_hidden_layers * text.num_attention_heads * width * length


def estimate(shape: PreTrainedConfig, length: int) -> int:
    """Return the bytes that `make check` estimates for torch on the GPU, without CUDA and the paged optimizer."""
    gpu = torch.device("cuda")
    parameters = of_params_yaml(gpu)
    with tempfile.TemporaryDirectory() as folder:
        shape.save_pretrained(folder)
        parts = training(Path(folder), parameters.lora, parameters.train, [], length, gpu, torch.bfloat16)
    return sum(parts.values()) - parts["process"] - parts["optimizer"]


def print_contexts(model: str, recipe: str, caps: list[float], run: Callable[..., dict[str, Any]]) -> None:
    """Print the longest row that fits under each cap. The first guess assumes that memory is linear in the length."""
    short, long = (run("--length", str(length), "--steps", "2") for length in (2048, 8192))
    for cap in caps:
        guess = 2048
        if "failed" not in short | long:
            left = cap * GIB - short["reserved"] - short["outside"]
            guess += int(left * (8192 - 2048) / (long["reserved"] - short["reserved"]))
        results: dict[int, dict[str, Any]] = {}
        length = longest(partial(fits, run, cap, results), guess)
        line = f"{model:14}{recipe:16}{cap:5.0f} GiB{length:8} tokens"
        if length:
            line += f"{(results[length]['reserved'] + results[length]['outside']) / GIB:8.2f} GiB taken"
        if odd := {result.get("failed", OUT_OF_MEMORY) for result in results.values()} - {OUT_OF_MEMORY}:
            line += f"  longer ones failed otherwise: {'; '.join(sorted(odd))}"
        print(line, flush=True)


def fits(run: Callable[..., dict[str, Any]], cap: float, results: dict[int, dict[str, Any]], length: int) -> bool:
    results[length] = run("--length", str(length), "--steps", "2", "--cap", str(cap))
    return "failed" not in results[length]


def longest(fits: Callable[[int], bool], guess: int) -> int:
    """Return the longest length that fits, at most 3 % too low; 0 if none fits.

    The search starts at `guess`, takes growing steps, and then halves the interval.
    """
    low, high = 0, 0  # the longest that fitted, the shortest that did not; 0 for none yet
    stride = max(MULTIPLE, guess // 16 // MULTIPLE * MULTIPLE)
    length = max(MULTIPLE, guess // MULTIPLE * MULTIPLE)
    while not (low and high) or high - low > max(MULTIPLE, low // 32):
        if fits(length):
            low = length
        else:
            high = length
        if high == MULTIPLE:
            return 0
        if low and high:
            length = (low + high) // 2 // MULTIPLE * MULTIPLE
        else:
            length = low + stride if low else max(MULTIPLE, high - stride)
            stride *= 2
    return low


if __name__ == "__main__":
    main()
