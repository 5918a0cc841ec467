"""Compare a mixture of experts in NF4 with the same model in bfloat16: memory and time of a training step, and loss.

    python -m bench.experts  # a random Qwen3-MoE of 0.8 B parameters: a minute on two cores

Each line is a process of its own. "step" is the peak memory of a forward and a backward pass of 512 tokens, without the
mapped files of the weights. "only layers" is what Transformers' `load_in_4bit` quantizes: layers, no experts.
bench/README.md has the output.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from pipeline.common.parameters.params_yaml import check
from pipeline.model.adapter import lora_config, with_adapter
from pipeline.model.bitsandbytes_internals import keep_no_experts
from pipeline.model.loading import load_quantized, load_weights, nf4, reproducible

CPU = torch.device("cpu")
SHAPE = Qwen3MoeConfig(
    hidden_size=1024,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    num_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=1024,
    vocab_size=8192,
    dtype="bfloat16",
)
LOADED = {
    "bfloat16": lambda folder: load_weights(folder, CPU, torch.bfloat16),
    "only layers": lambda folder: load_weights(folder, CPU, torch.bfloat16, nf4(torch.bfloat16)),
    "layers and experts": lambda folder: load_quantized(folder, CPU, torch.bfloat16),
}  # without gradient checkpointing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", nargs="*", help=argparse.SUPPRESS)  # folder and line of a process
    if one := parser.parse_args().one:
        measure(Path(one[0]), one[1])
        return
    print(f"{'in NF4':20}{'weights MiB':>12}{'step, MiB':>11}{'seconds':>9}{'loss':>8}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(SHAPE, dtype=torch.bfloat16).save_pretrained(folder)
        for name in LOADED:
            subprocess.run([sys.executable, "-m", "bench.experts", folder, name], check=True)


def measure(folder: Path, name: str) -> None:
    reproducible(seed=1, threads=2)
    model = LOADED[name](folder)
    keep_no_experts(model)
    weights = sum(weight.nbytes for weight in model.parameters())
    tuned = with_adapter(model, lora_config(check(Path("params.yaml")).lora, []))
    ids = torch.arange(1, 513)[None]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: https://docs.kernel.org/filesystems/proc.html
    started = time.monotonic()
    loss = tuned(ids, labels=ids).loss
    loss.backward()
    seconds = time.monotonic() - started
    step = resident("VmHWM") - resident("RssFile")
    print(f"{name:20}{weights / 2**20:12.0f}{step / 2**10:11.0f}{seconds:9.1f}{loss:8.3f}", flush=True)


def resident(kind: str) -> int:
    """KiB of this process's memory: https://docs.kernel.org/filesystems/proc.html"""
    return int(re.search(rf"{kind}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


if __name__ == "__main__":
    main()
