"""Compare DPO in this pipeline with TRL's command line, on the same pairs and optimizer steps, from the same model.

    python -m bench.align tiny     # the built-in base, after `dvc repro train_qlora`
    python -m bench.align smollm2  # a real language model, after `make demo-real`

bench/README.md has the output. The pairs are those of examples/preferences. The base is not quantized, and all
arithmetic is in float32. The loss is that of the pairs alone: align.sft_weight and align.repeat_weight are 0.

`trl dpo` refuses a folder with an adapter as its model. So it starts from the base with the adapter of train_qlora
merged into it in float32, with a new LoRA of the same shape; this pipeline trains the adapter itself further. TRL gets
the rows, the schedule, the batch size and beta of this project; everything else is TRL's default.

The loss is that of DPO in nats, of the saved adapter on the pairs for validation. The peak is that of resident memory.
The training time includes evaluations, and for this pipeline also the reference and the checkpoints.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from torch.nn.functional import cross_entropy, logsigmoid

from bench.demo_real import FOLDER, smollm2
from bench.project import ROOT, make_project, with_base
from bench.train import runtime, timed, trl
from pipeline.common.parameters.params_yaml import check
from pipeline.common.paths import ALIGNED, PAIR_TOKENS, TRAINED
from pipeline.common.rows import read_jsonl
from pipeline.model.base import copy_tokenizer
from pipeline.model.loading import load_tuned
from pipeline.training.alignment import training_of

RUNS = {"tiny": ROOT, "smollm2": FOLDER}  # folders with an adapter of train_qlora
PARAMETERS = {
    "base.quantization": "none",
    "tokenize.max_length": 192,
    "align.method": "dpo",
    "align.sft_weight": 0.0,
    "align.repeat_weight": 0.0,
}
KEPT = {"bf16": False, "gradient_checkpointing": False}
RECIPES: dict[str, dict[str, Any] | None] = {  # options of `trl dpo`; None is this pipeline
    "TRL in float32": {"bf16": False},
    "  and without checkpointing": KEPT,
    "    and precomputed reference": KEPT | {"precompute_ref_log_probs": True},
    "this pipeline": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=RUNS)
    parser.add_argument("--epochs", type=float, default=1.0)
    options = parser.parse_args()
    disable_progress_bars()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        make_pairs(project, options.base, options.epochs)
        reference = log_likelihoods(project, project / "base", project / TRAINED)
        print(f"{'':32}{'seconds':>9}{'training':>10}{'tokens/s':>10}{'peak MiB':>10}{'loss':>8}", flush=True)
        for name, more in RECIPES.items():
            measure(project, name, more, reference)


def make_pairs(project: Path, base: str, epochs: float) -> None:
    """Make a project with tokenized pairs and an adapter, and for TRL the folders rows and start."""
    rate = (
        {"align.learning_rate": 5.0e-5} if base == "smollm2" else {}
    )  # without the loss of the chosen answers, 7.0e-4 is too high
    make_project(project, None, PARAMETERS | rate | {"align.epochs": epochs})
    if base == "smollm2":
        with_base(project, smollm2())
    shutil.copytree(ROOT / "examples/preferences/preferences", project / "data/preferences")
    for name in ("questions", "general", "preferences_exam"):
        shutil.copy(ROOT / f"data/{name}.jsonl", project / "data")
    shutil.copytree(RUNS[base] / TRAINED, project / TRAINED)
    shutil.copy(project / "models/base.json", project / TRAINED)  # the same base under another name
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for stage in ("pairs", "tokenize_pairs"):
        command = [sys.executable, "-m", f"stages.{stage}"]
        subprocess.run(command, cwd=project, env=environment, check=True, capture_output=True)
    for side, split in {"train": "train", "valid": "test"}.items():
        pairs = read_jsonl(project / f"data/pairs_{side}.jsonl")
        rows = [{"prompt": one["messages"]} | {key: [one[key]] for key in ("chosen", "rejected")} for one in pairs]
        Dataset.from_list(rows).to_json(project / f"rows/{split}.jsonl")
    tuned: Any = loaded(project / "base", project / TRAINED)
    tuned.merge_and_unload().save_pretrained(project / "start")
    copy_tokenizer(project / "base", project / "start")


def measure(project: Path, name: str, more: dict[str, Any] | None, reference: torch.Tensor) -> None:
    """Train in `project` with `trl dpo` or the stage align, and print a line."""
    parameters = check(project / "params.yaml")
    train, beta = training_of(parameters), parameters.align.beta
    command = [sys.executable, "-m", "stages.align"]
    if more is not None:
        options = {"model_name_or_path": "start", "beta": beta, "lora_dropout": 0.0}
        command = trl("dpo", project, parameters, train, options | more)
    seconds, peak, printed = timed(command, project, os.environ | {"PYTHONPATH": str(ROOT)})
    if more is None:
        training = json.loads((project / "metrics/align_cost.json").read_text(encoding="utf-8"))["seconds"]
        now = log_likelihoods(project, project / "base", project / ALIGNED)
    else:
        training = runtime(printed)
        now = log_likelihoods(project, project / "start", project / "trl")
    tokens = train.epochs * sum(len(row["input_ids"]) + len(row["other_ids"]) for row in pair_rows(project, "train"))
    gain = now - reference
    loss = -logsigmoid(beta * (gain[:, 0] - gain[:, 1])).mean().item()
    print(f"{name:32}{seconds:9.0f}{training:10.0f}{tokens / training:10.0f}{peak:10.0f}{loss:8.4f}", flush=True)


def log_likelihoods(project: Path, base: Path, adapter: Path) -> torch.Tensor:
    """The log-likelihoods in nats of the answers of the pairs for validation: chosen, rejected; shape (pairs, 2)."""
    model = loaded(base, adapter).eval()
    found = []
    for row in pair_rows(project, "valid"):
        for ids, labels in (("input_ids", "labels"), ("other_ids", "other_labels")):
            with torch.no_grad():
                logits = model(torch.tensor([row[ids]])).logits[0, :-1]
            found.append(-cross_entropy(logits, torch.tensor(row[labels][1:]), ignore_index=-100, reduction="sum"))
    return torch.stack(found).view(-1, 2)


def loaded(base: Path, adapter: Path) -> transformers.PreTrainedModel:
    return load_tuned(base, adapter, "none", torch.device("cpu"), torch.float32)


def pair_rows(project: Path, side: str) -> Dataset:
    return Dataset.from_file(str(project / PAIR_TOKENS / f"{side}.arrow"))


if __name__ == "__main__":
    main()
