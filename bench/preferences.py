"""Train the example of preference training (examples/preferences) with each method and several seeds.

    python -m bench.preferences FOLDER [name=value ...] [--real] [--sampled] [--seeds 3] [--methods dpo kto orpo]

FOLDER is a new clone of this repository. With --real the model is SmolLM2, as in bench.demo_real; otherwise it is the
built-in base. With --sampled the pairs are those that `make pairs` makes from the model's own answers, and not those of
the example. `name=value` sets a further parameter. Each line of the table is a run: correct answers of the two tags,
correct answers of the general exam, and the held-out pairs in which the model prefers the chosen answer.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

from bench.demo_real import make_demo
from bench.project import ROOT, name_and_value, set_parameters
from pipeline.common.parameters.align import Align

EXAMPLE = "examples/preferences"
METHODS = [method for method in get_args(Align.model_fields["method"].annotation) if method != "none"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--sampled", action="store_true")
    parser.add_argument("values", nargs="*", type=name_and_value, metavar="name=value")
    asked = parser.parse_args()
    folder = asked.folder
    if asked.real:
        make_demo(folder, {"merge.on_leak": "drop"})  # its phrasings of the facts are also those of held-out pairs
    elif not folder.exists():
        subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    chosen = dict(asked.values)
    # What the built-in base knew is not in the handbook: the example refuses it. A real base has no such rows.
    (folder / "data/curated/replay.jsonl").unlink(missing_ok=True)
    use_example(folder, with_pairs=not asked.sampled)
    print("| method | seed | known | unknown | general | preferred | minutes |", flush=True)
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for seed in range(1, asked.seeds + 1):
        set_parameters(folder, chosen | {"seed": seed, "align.method": "none"})
        print(line("SFT", seed, *evaluated(folder)), flush=True)
        if asked.sampled:
            (folder / "data/preferences/sampled.jsonl").unlink(missing_ok=True)
            subprocess.run([sys.executable, "-m", "tools.pairs"], cwd=folder, check=True)
        for method in asked.methods:
            set_parameters(folder, {"align.method": method})
            print(line(method, seed, *evaluated(folder)), flush=True)


def use_example(folder: Path, with_pairs: bool) -> None:
    for name in ("questions.jsonl", "preferences_exam.jsonl", "candidate_questions.jsonl"):
        shutil.copy(folder / EXAMPLE / name, folder / "data")
    if with_pairs:
        shutil.copy(folder / EXAMPLE / "preferences/unknown.jsonl", folder / "data/preferences")


def evaluated(folder: Path) -> tuple[Path, float]:
    started = time.monotonic()
    subprocess.run(["dvc", "repro", "--quiet", "evaluate"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder, (time.monotonic() - started) / 60


def line(method: str, seed: int, folder: Path, minutes: float) -> str:
    answers = lines(folder / "metrics/answers.jsonl")
    cells = [share([one["tuned"]["correct"] for one in answers if tag in one["tags"]]) for tag in ("known", "unknown")]
    cells.append(share([one["tuned"]["correct"] for one in lines(folder / "metrics/answers_general.jsonl")]))
    cells.append(share([one["tuned"]["preferred"] for one in lines(folder / "metrics/preferences.jsonl")]))
    return f"| {method} | {seed} | {' | '.join(cells)} | {minutes:.1f} |"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text.strip()]


def share(scores: list[float]) -> str:
    return f"{sum(scores):.0f} of {len(scores)}"


if __name__ == "__main__":
    main()
