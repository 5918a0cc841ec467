"""Compare training in this pipeline with TRL's command line, on the same rows and optimizer steps.

    python -m bench.train tiny     # the built-in base: 15 minutes on two cores
    python -m bench.train wide     # a random base of 100 M parameters: 15 minutes on two cores
    python -m bench.train smollm2  # a real language model, after `make demo-real`: 25 minutes on two cores

bench/README.md has the output. The benchmark needs the rows that `dvc repro tokenize` makes. It draws the loss curves
to bench/train_BASE.svg. For the real model, a plain training loop (bench/plain_loop.py) is another yardstick.

TRL's command line, `trl sft`, gets the rows, the LoRA, the schedule and the batch size of this project. Everything else
is TRL's default. On `tiny` and `wide`, another run has batches of one row, as most scripts do. Each recipe runs in its
own process, with steps of eight rows (`smollm2`: 16). The loss is that of the saved adapter on its base, in NF4 or not
quantized, in nats per token of the validation rows' answers. The peak is that of resident memory. The training time
includes evaluations, and for this pipeline also checkpoints.
"""

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch
import transformers
import vl_convert
import yaml
from datasets import Dataset, disable_progress_bars
from transformers import LlamaConfig

from bench.demo_real import FOLDER, smollm2
from bench.project import ROOT, make_project, with_base
from pipeline.common.parameters.params_yaml import check
from pipeline.common.parameters.schema import Parameters
from pipeline.common.parameters.train import Train
from pipeline.model.loading import load_tuned

WIDE = LlamaConfig(
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=14,
    num_attention_heads=12,
    vocab_size=2048,
    tie_word_embeddings=True,
)
# Of each base: its shape, learning rate, epochs.
BASES = {"tiny": (None, 4.0e-3, 2.0), "wide": (WIDE, 1.0e-3, 0.04), "smollm2": (None, 1.0e-3, 0.34)}
ROWS = {"tiny": 8, "wide": 8, "smollm2": 16}  # of a step
EVAL_STEPS = 20


@dataclass
class Recipe:
    name: str
    trl: dict[str, Any] | None = None  # options of `trl sft`; None is this pipeline
    parameters: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    busy: bool = False  # another process keeps a core busy meanwhile
    wide: bool = True
    plain: str | None = None  # the type of a plain loop

    @property
    def quantization(self) -> str:
        return "none" if self.plain else self.parameters.get("base.quantization", "nf4")


ONE_ROW = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
FLOAT32 = {"bf16": False}
KEPT = FLOAT32 | {"gradient_checkpointing": False}
RECIPES = [
    Recipe("the usual script", ONE_ROW),
    Recipe("  in float32", ONE_ROW | FLOAT32, wide=False),
    Recipe("TRL's defaults", {}),
    Recipe("  in float32", FLOAT32),
    Recipe("    and without checkpointing", KEPT),
    Recipe("      and padding-free", KEPT | {"padding_free": True, "max_length": None}, wide=False),
    Recipe("this pipeline"),
    Recipe("  in one thread", parameters={"threads": 1}, wide=False),
    Recipe("  beside a busy process", busy=True, wide=False),
    Recipe("    with spinning threads", environment={"OMP_WAIT_POLICY": "ACTIVE"}, busy=True, wide=False),
]

BFLOAT16, NONE = {"base.compute_dtype": "bfloat16"}, {"base.quantization": "none"}
REAL_RECIPES = [
    Recipe("TRL's defaults", {}),
    Recipe("  in float32", FLOAT32),
    Recipe("    and without quantization", FLOAT32 | {"load_in_4bit": False}, parameters=NONE),
    Recipe("a plain loop in float32", plain="float32"),
    Recipe("a plain loop in bfloat16", plain="bfloat16"),
    Recipe("this pipeline: NF4, float32"),
    Recipe("  NF4, bfloat16", parameters=BFLOAT16),
    Recipe("  none, float32", parameters=NONE),
    Recipe("  none, bfloat16", parameters=NONE | BFLOAT16),
    Recipe("    and two processes", parameters=NONE | BFLOAT16 | {"train.processes": 2}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=BASES)
    base = parser.parse_args().base
    config, rate, epochs = BASES[base]
    disable_progress_bars()
    transformers.logging.disable_progress_bar()
    parameters = {"train.learning_rate": rate, "train.epochs": epochs, "train.eval_steps": EVAL_STEPS}
    curves: dict[str, list[tuple[int, float]]] = {}
    print(f"{'':32}{'seconds':>9}{'training':>10}{'tokens/s':>10}{'peak MiB':>10}{'loss':>8}", flush=True)
    for recipe in REAL_RECIPES if base == "smollm2" else RECIPES:
        if recipe.wide or base == "tiny":
            with tempfile.TemporaryDirectory() as folder:
                project = Path(folder)
                of_rows = {"train.batch_size": ROWS[base], "train.gradient_accumulation": 1}
                make_project(project, config, parameters | of_rows | recipe.parameters)
                tokens = ROOT / "data/tokens"
                if base == "smollm2":
                    tokens = FOLDER / "data/tokens"
                    with_base(project, smollm2())
                shutil.copytree(tokens, project / "data/tokens", dirs_exist_ok=True)
                curves[recipe.name] = measure(project, recipe)
    draw(curves, ROOT / f"bench/train_{base}.svg")


def measure(project: Path, recipe: Recipe) -> list[tuple[int, float]]:
    """Run `recipe` in `project`, print its line, and return its curve: (step, validation loss) pairs."""
    parameters = check(project / "params.yaml")
    command = [sys.executable, "-m", "stages.train_qlora"]
    if recipe.plain:
        command = [sys.executable, "-m", "bench.plain_loop", recipe.plain]
    elif recipe.trl is not None:
        for side, split in {"train": "train", "valid": "test"}.items():
            rows(project, side).to_json(project / f"rows/{split}.jsonl")
        quantized = {"load_in_4bit": True}
        command = trl("sft", project, parameters, parameters.train, quantized | recipe.trl)
    is_stage = recipe.trl is None and not recipe.plain
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | recipe.environment
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if recipe.busy else None
    seconds, peak, printed = timed(command, project, environment)
    if busy:
        busy.kill()
    if is_stage:
        training, losses = of_stage(project)
    else:
        training = runtime(printed)
        losses = [float(value) for value in re.findall(r"'eval_loss': '([\d.]+)'", printed)]
    tokens = parameters.train.epochs * sum(len(row["input_ids"]) for row in rows(project, "train"))
    loss = final_loss(project / ("outputs/trained" if is_stage else "trl"), project, recipe.quantization)
    numbers = f"{seconds:9.0f}{training:10.0f}{tokens / training:10.0f}{peak:10.0f}{loss:8.3f}"
    print(f"{recipe.name:32}{numbers}", flush=True)
    steps = ceil(parameters.train.epochs * ceil(len(rows(project, "train")) / parameters.train.batch_size))
    return [(min(point * EVAL_STEPS, steps), loss) for point, loss in enumerate(losses)]


def timed(command: list[str], project: Path, environment: dict[str, str]) -> tuple[float, float, str]:
    """Run a command in `project`; return its seconds, its peak of resident memory in MiB, and what it printed."""
    started = time.monotonic()
    with open(project / "log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=project, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        log.seek(0)
        printed = log.read()
    assert status == 0, printed
    return seconds, usage.ru_maxrss / 1024, printed


def runtime(printed: str) -> float:
    """The seconds of training that TRL printed."""
    return float(re.findall(r"'train_runtime': '([\d.]+)'", printed)[-1])


def of_stage(project: Path) -> tuple[float, list[float]]:
    """Return the seconds of training, and the validation losses: before training and at each point of the curve."""
    metrics, cost = (json.loads((project / f"metrics/{name}.json").read_text()) for name in ("train", "train_cost"))
    with open(project / "metrics/loss.csv", encoding="utf-8") as file:
        return cost["seconds"], [metrics["loss"]["before"], *(float(point["valid"]) for point in csv.DictReader(file))]


def trl(script: str, project: Path, parameters: Parameters, train: Train, more: dict[str, Any]) -> list[str]:
    """Return the command `trl SCRIPT` for the rows in the folder rows of the project, with a new LoRA on `base`. `more`
    are further options, or other values."""
    lora = parameters.lora
    options = {
        "model_name_or_path": "base",
        "dataset_name": "rows",
        "output_dir": "trl",
        "seed": parameters.seed,
        "use_cpu": True,
        "use_peft": True,
        "lora_r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "lora_target_modules": lora.target_modules,
        "per_device_train_batch_size": train.batch_size,
        "learning_rate": train.learning_rate,
        "num_train_epochs": train.epochs,
        "lr_scheduler_type": train.schedule,
        "warmup_steps": train.warmup_share,
        "eval_strategy": "steps",
        "eval_steps": train.eval_steps,
        "eval_on_start": True,
        "save_strategy": "no",
    } | more
    (project / "trl.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    return ["trl", script, "--config", "trl.yaml"]


def rows(project: Path, side: str) -> Dataset:
    return Dataset.from_file(str(project / f"data/tokens/{side}.arrow"))


def final_loss(adapter: Path, project: Path, quantization: str) -> float:
    """Return the loss of the adapter in nats per token of the validation rows' answers."""
    model = load_tuned(project / "base", adapter, quantization, torch.device("cpu"), torch.float32).eval()
    total, tokens = 0.0, 0
    for row in rows(project, "valid"):
        labels = torch.tensor(row["labels"][1:])
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        tokens += int((labels != -100).sum())
    return total / tokens


def draw(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Draw the validation losses of all recipes over the steps to `path`, as an SVG."""
    points = [
        {"recipe": f"{number} {name.strip()}", "step": step, "loss": loss}
        for number, (name, curve) in enumerate(curves.items(), 1)
        for step, loss in curve
    ]
    axes = {"x": {"field": "step"}, "y": {"field": "loss", "title": "validation loss, nats per token"}}
    path.write_text(
        vl_convert.vegalite_to_svg(
            {
                "data": {"values": points},
                "mark": {"type": "line", "point": True},
                "encoding": {name: channel | {"type": "quantitative"} for name, channel in axes.items()}
                | {"color": {"field": "recipe", "type": "nominal", "scale": {"scheme": "tableau20"}}},
                "width": 600,
                "height": 300,
            }
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
