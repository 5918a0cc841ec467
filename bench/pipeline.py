"""Measure the time of `dvc repro`: per stage, with nothing to do, and after a change of each parameter.

Parameters that the same stages read cost the same. Therefore one parameter of each row in docs/reruns.md is changed,
except `base.model`, which needs another base.

    python -m bench.pipeline    # half an hour on two cores

It runs in a clone of this repository with its own cache, without uncommitted changes: commit first. bench/README.md has
the output.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from ruamel.yaml import YAML

from bench.kills import change

RUNS = 7
CHANGES = {  # tests/test_reruns.py holds that there is one for each row
    "threads": 1,
    "base.compute_dtype": "bfloat16",
    "base.quantization": "none",
    "base.thinking": "off",
    "generate.replay_length": 32,
    "generate.phrasings_per_fact": 3,
    "generate.model": "another",
    "merge.valid_share": 0.1,
    "merge.near_duplicate": 0.8,
    "merge.split_by": "source",
    "tokenize.max_length": 256,
    "tokenize.mask_history": True,
    "tokenize.tool_format": "hermes",
    "lora.r": 8,
    "train.schedule": "linear",
    "align.method": "dpo",
    "align.beta": 0.2,
    "evaluate.max_new_tokens": 48,
    "evaluate.max_kl": 0.02,
    "merge_adapter.base": "bf16",
    "gguf.num_ctx": 1024,
    "gate.max_conversion_drop": 0.05,
}


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        clone, bare = Path(scratch, "clone"), Path(scratch, "bare")
        subprocess.run(["git", "clone", "--quiet", ".", clone], check=True)
        shutil.copy(clone / "examples/preferences/preferences/unknown.jsonl", clone / "data/preferences")  # for dpo
        stages = stages_run(clone, "--force")
        print_stages(clone, stages)
        nine_of_true(bare)
        print_nothing_to_do(clone, bare)
        print_changes(clone, sum(stages.values()))


def print_stages(clone: Path, stages: dict[str, float]) -> None:
    print(f"\nload {os.getloadavg()[0]:.1f}\n{'stage':20}{'seconds':>8}{'imports':>9}")
    started = seconds([sys.executable, "-c", "pass"], clone)[0]
    for stage, took in stages.items():
        imports = seconds([sys.executable, "-c", f"import stages.{stage}"], clone)[0] - started
        print(f"{stage:20}{took:8.1f}{imports:9.1f}", flush=True)
    print(f"{'all':20}{sum(stages.values()):8.1f}")


def print_nothing_to_do(clone: Path, bare: Path) -> None:
    """Print the best time of several alternating runs of both pipelines, and the ratio to the bare pipeline."""
    print(f"\nload {os.getloadavg()[0]:.1f}\n{f'dvc repro, best of {RUNS}':24}{'seconds':>8}{'CPU s':>7}")
    runs = [[seconds(["dvc", "repro"], folder) for folder in (clone, bare)] for _ in range(RUNS)]
    ours, nine = (tuple(map(min, zip(*of_folder, strict=True))) for of_folder in zip(*runs, strict=True))
    times = tuple(mine / theirs for mine, theirs in zip(ours, nine, strict=True))
    for name, (wall, cpu) in {"nothing to do": ours, "nine stages of true": nine, "times": times}.items():
        print(f"{name:24}{wall:8.2f}{cpu:7.2f}", flush=True)


def print_changes(clone: Path, total: float) -> None:
    print(f"\nload {os.getloadavg()[0]:.1f}\n{'change':40}{'seconds':>8}{'of all':>8}{'and back':>10}  stages that ran")
    original = (clone / "params.yaml").read_bytes()
    for key, value in CHANGES.items():
        change(clone / "params.yaml", key, value)
        started = time.monotonic()
        stages = stages_run(clone)
        took = time.monotonic() - started
        (clone / "params.yaml").write_bytes(original)
        back = seconds(["dvc", "repro"], clone)[0]
        print(f"{f'{key}: {value}':40}{took:8.1f}{took / total:8.0%}{back:10.1f}  {', '.join(stages)}", flush=True)


def stages_run(clone: Path, *options: str) -> dict[str, float]:
    """Run `dvc repro`; return the seconds of each stage that ran."""
    process = subprocess.Popen(
        ["dvc", "repro", *options],
        cwd=clone,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},  # each line when it is printed
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    printed, events = list[str](), list[tuple[str, float]]()
    for line in process.stdout:
        printed.append(line)
        if found := re.match(r"(Running stage|Stage) '(\w+)'", line):
            events.append((found[2] if found[1] == "Running stage" else "", time.monotonic()))
    assert process.wait() == 0, "".join(printed)
    events.append(("", time.monotonic()))
    return {stage: end - start for (stage, start), (_, end) in pairwise(events) if stage}


def seconds(command: list[str], folder: Path) -> tuple[float, float]:
    """Run the command; return its wall-clock and CPU seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def nine_of_true(folder: Path) -> None:
    folder.mkdir()
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run(["dvc", "init", "--quiet"], cwd=folder, check=True)
    YAML().dump({"stages": {f"true{number}": {"cmd": "true"} for number in range(9)}}, folder / "dvc.yaml")


if __name__ == "__main__":
    main()
