"""Compare the memory of training on a CPU that `pipeline.training.memory` estimates with the measured memory.

    python -m bench.memory [CASE ...]    # numbers of cases, from 0; all by default: ten minutes, up to 6 GiB

bench/README.md has the output.

The bases have the shapes of common families and random weights. The real train_qlora stage trains each base for two
steps. The measured value is the peak resident memory that the stage writes to metrics/train_cost.json. With a method,
the stage align trains after it for two steps, and the measured value is that of metrics/align_cost.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

from bench.project import ROOT, make_project
from pipeline.common.parameters.params_yaml import check
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.special_tokens import trainable_tokens
from pipeline.training.alignment import training_of
from pipeline.training.memory import training
from pipeline.training.preferences import sequences_of


def llama(hidden: int, layers: int, vocabulary: int = 32_000, **more: Any) -> PreTrainedConfig:
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 256}
    shape = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    return LlamaConfig(**heads, **shape, vocab_size=vocabulary, tie_word_embeddings=True, **more)


def qwen(hidden: int, layers: int, vocabulary: int) -> PreTrainedConfig:
    return Qwen2Config(**{**llama(hidden, layers, vocabulary).to_dict(), "model_type": "qwen2"})


def gemma(hidden: int, layers: int, vocabulary: int) -> PreTrainedConfig:
    """Return a Gemma 2 shape. It caps the attention scores, which needs the complete matrix of scores."""
    shape = llama(hidden, layers, vocabulary).to_dict()
    return Gemma2Config(
        **{k: shape[k] for k in shape if k.startswith(("num_", "hidden_size", "inter", "vocab"))}, head_dim=64
    )


# (name, shape, rows of a batch, tokens of a row, gradient checkpointing, trained tokens, method of align)
CASES: list[tuple[Any, ...]] = [
    ("Llama 3.5M", llama(256, 4, 2048), 16, 128, False, []),
    ("Llama 53M", llama(512, 12), 8, 256, False, []),
    ("Llama 53M", llama(512, 12), 8, 256, True, []),
    ("Qwen 186M", qwen(1024, 10, 64_000), 4, 128, False, []),
    ("Qwen 186M", qwen(1024, 10, 64_000), 2, 512, True, []),
    ("Gemma 131M", gemma(768, 12, 64_000), 4, 128, False, []),
    ("Gemma 131M", gemma(768, 12, 64_000), 1, 512, True, []),
    ("Llama 592M", llama(1536, 20), 1, 128, False, []),
    ("Llama 592M", llama(1536, 20), 1, 512, True, []),
    # The constants in pipeline.training.memory were fitted to those above, not to these.
    ("Llama 133M", llama(768, 16), 2, 256, False, []),
    ("Qwen 308M", qwen(1280, 12, 64_000), 1, 256, True, []),
    ("Gemma 41M", gemma(512, 8, 32_000), 8, 64, False, []),
    ("Llama 46M", llama(512, 4, 64_000), 4, 128, False, ["<|im_end|>"]),
    ("Llama 3.5M", llama(256, 4, 2048), 8, 128, False, [], "dpo"),
    ("Llama 3.5M", llama(256, 4, 2048), 8, 128, False, [], "kto"),
    ("Llama 3.5M", llama(256, 4, 2048), 8, 128, False, [], "orpo"),
    ("Llama 53M", llama(512, 12), 2, 256, False, [], "dpo"),
]


def main() -> None:
    head = f"{'base':14}{'method':>8}{'batch':>6}{'length':>8}{'checkpointing':>15}"
    print(f"{head}{'predicted MiB':>15}{'measured':>10}{'error':>7}")
    for number in map(int, sys.argv[1:] or range(len(CASES))):
        with tempfile.TemporaryDirectory() as folder:
            name, config, batch, length, checkpointing, tokens, method = (*CASES[number], "none")[:7]
            predicted, measured = measure(Path(folder), config, batch, length, checkpointing, tokens, method)
        print(
            f"{name:14}{method:>8}{batch:6}{length:8}{str(checkpointing).lower():>15}"
            f"{predicted:15.0f}{measured:10.0f}{predicted / measured - 1:+7.0%}",
            flush=True,
        )


def measure(
    project: Path,
    config: PreTrainedConfig,
    batch: int,
    length: int,
    checkpointing: bool,
    tokens: list[str],
    method: str = "none",
) -> tuple[float, float]:
    """Train in the empty folder `project`; return the estimated and the measured memory in MiB."""
    train = {"train.batch_size": batch, "train.epochs": 1.0, "train.gradient_checkpointing": checkpointing}
    align = {"align.method": method, "align.batch_size": batch, "align.epochs": 1.0}
    make_project(project, config, {"lora.trainable_tokens": tokens} | train | align)
    (project / "data/pair_tokens").mkdir()
    (project / "data/pair_tokens/overflow.jsonl").write_text("\n", encoding="utf-8")
    make_rows(project, "tokens", ("input_ids", "labels"), batch, length)
    make_rows(project, "pair_tokens", ("input_ids", "labels", "other_ids", "other_labels"), batch, length)
    parameters, cpu, base = check(project / "params.yaml"), torch.device("cpu"), project / "base"
    ids = trainable_tokens(parameters.lora.trainable_tokens, base, load_tokenizer(base))
    aligns = method != "none"
    values, sequences = (training_of(parameters), sequences_of(parameters.align)) if aligns else (parameters.train, 1)
    parts = training(base, parameters.lora, values, ids, length, cpu, torch.float32, "nf4", sequences)
    for stage in ["train_qlora", *(["align"] if aligns else [])]:
        command, path = [sys.executable, "-m", f"stages.{stage}"], os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=project, env=path, check=True, capture_output=True)
    cost = json.loads((project / f"metrics/{'align' if aligns else 'train'}_cost.json").read_text(encoding="utf-8"))
    return sum(parts.values()) / 2**20, cost["peak_memory_mb"]


def make_rows(project: Path, folder: str, columns: tuple[str, ...], batch: int, length: int) -> None:
    """Write two batches of training rows and one validation row into a folder of data/."""
    for side, rows in {"train": 2 * batch, "valid": 1}.items():
        lengths = [length if row % batch == 0 else length // 2 for row in range(rows)]  # padded, as real rows are
        table = pa.table({column: [[5] * tokens for tokens in lengths] for column in columns})
        if folder == "pair_tokens":
            table = table.append_column("desirable", pa.array([row % 2 == 0 for row in range(rows)]))
        path = project / f"data/{folder}/{side}.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)


if __name__ == "__main__":
    main()
