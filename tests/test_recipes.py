"""Recipes: params.yaml for real models, and what they need by the prediction."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, Project

from bench.recipes import GIB, SPARE
from bench.shapes import SHAPES
from pipeline.common.errors import UserError
from pipeline.common.parameters.params_yaml import read_yaml
from pipeline.common.rows import read_jsonl
from stages import generate, merge, replay
from tools import check
from tools.use import main, use

RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
FOR_GPUS = [name for name in RECIPES if name not in ("tiny-base", "smollm2-135m")]


def leaves(values: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in values.items() for key, value in keys.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_changes_its_values_and_no_other_character(
    project: Project, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.setattr("sys.argv", ["use", recipe])
    old = Path("params.yaml").read_text(encoding="utf-8").splitlines()
    main()
    new = Path("params.yaml").read_text(encoding="utf-8").splitlines()
    wanted = leaves(read_yaml(RECIPES[recipe]))
    before, now = read_yaml(ROOT / "params.yaml"), read_yaml(Path("params.yaml"))
    assert {key: now[key.split(".")[0]][key.split(".")[1]] for key in wanted} == wanted
    changed = 0
    for was, line in zip(old, new, strict=True):
        if was != line:
            (key, value), (_, _, comment) = line.split(" #")[0].strip().split(": "), was.partition("#")
            assert key in {name.split(".")[1] for name in wanted}
            assert line == f"  {key}: {value}".ljust(was.index("#") - 1) + f" #{comment}"
            changed += 1
    others = [key for key, value in wanted.items() if before[key.split(".")[0]][key.split(".")[1]] != value]
    assert changed == len(others) and bool(others) == (recipe != "tiny-base")  # the demo's parameters are tiny-base's


def test_nothing_of_one_recipe_is_left_after_the_next() -> None:
    assert len({tuple(leaves(read_yaml(path))) for path in RECIPES.values()}) == 1


@pytest.fixture
def machine(project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """What `make check` finds: a recipe in use, its model's config.json without weights, the built-in base's tokenizer,
    a GPU, RAM and disk enough."""

    def of(recipe: str, card: int) -> None:
        use(RECIPES[recipe])
        SHAPES[recipe].save_pretrained("hub")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            shutil.copy(ROOT / "models/tiny-base" / name, "hub")
        free = {"cuda": int((1 - SPARE) * card * GIB), "cpu": 64 * GIB}
        monkeypatch.setattr("pipeline.model.base.fetched", lambda *_: (Path("hub"), ""))
        monkeypatch.setattr("tools.dry_run.dry_run", lambda *_: [])  # the hub has the names: tests/test_dry_run.py
        monkeypatch.setattr("pipeline.model.loading.pick_device", lambda _: torch.device("cuda"))
        monkeypatch.setattr("pipeline.model.gpus.require_compiler", lambda: None)
        monkeypatch.setattr("pipeline.training.processes.require_gpus", lambda *_: None)
        monkeypatch.setattr("pipeline.model.free_memory.free_memory", lambda device: free[device.type])
        monkeypatch.setattr("pipeline.training.memory.free_memory", lambda device: free[device.type])
        monkeypatch.setattr("pipeline.training.gradient_checkpointing.gpu_memory", lambda: card * GIB)
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**40))
        monkeypatch.setattr("tools.check.changed", lambda _: True)  # tests/test_check.py asks DVC, which takes seconds
        monkeypatch.setattr("tools.check.cache_types", set)

    return of


@pytest.mark.parametrize("recipe", FOR_GPUS)
def test_a_recipe_fits_its_gpu_with_a_tenth_to_spare_and_needs_what_its_table_says(
    machine: Callable[[str, int], None], capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    card = re.search(r"for GPUs of (\d+) GB and more", RECIPES[recipe].read_text(encoding="utf-8"))
    assert card
    machine(recipe, int(card[1]))
    check.main()
    printed = capsys.readouterr().out
    assert "up to 1024 tokens" in printed
    size = re.search(r"GPU memory: train_qlora +([\d.]+) of", printed)
    assert size and f"| `{recipe}` | {size[1]} |" in (ROOT / "recipes/README.md").read_text(encoding="utf-8")


def test_a_recipe_for_a_larger_gpu_is_refused_with_what_to_turn(machine: Callable[[str, int], None]) -> None:
    machine("gemma-2-2b", 6)
    with pytest.raises(UserError, match=r"set train\.batch_size to 4, train\.gradient_accumulation to 4$"):
        check.main()


def test_a_step_of_every_recipe_has_16_rows_or_8_pairs_and_of_the_smallest_real_model_8_rows() -> None:
    def in_a_step(of: str) -> dict[str, int]:
        steps = {recipe: read_yaml(path)[of] for recipe, path in RECIPES.items()}
        return {recipe: step["batch_size"] * step["gradient_accumulation"] for recipe, step in steps.items()}

    assert in_a_step("train") == dict.fromkeys(RECIPES, 16) | {"smollm2-135m": 8}
    assert in_a_step("align") == dict.fromkeys(RECIPES, 8) | {"tiny-base": 16}


def test_each_recipe_has_a_known_shape() -> None:
    assert set(FOR_GPUS) == set(SHAPES)


@pytest.mark.parametrize("arguments", [[], ["llama"], ["../params"]])
def test_an_unknown_recipe_is_refused_with_the_list(
    project: Project, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["use", *arguments])
    with pytest.raises(UserError, match=r"set it to one of gemma-2-2b, .*, tiny-base$"):
        main()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train:\n  batch: 2\n", r"mine\.yaml: train\.batch is not a parameter; accepted here: learning_rate, "),
        ("loro: {r: 5}\n", r"mine\.yaml: loro is not a parameter; accepted here: "),
        ("lora: 5\n", r"mine\.yaml must have sections with keys: "),
        ("- lora\n", r"mine\.yaml must have sections with keys: "),
        ("train: {\n", r"mine\.yaml cannot be read as YAML: "),
    ],
)
def test_a_wrong_recipe_is_refused_by_its_name_and_changes_nothing(project: Project, text: str, line: str) -> None:
    Path("mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=line) as refusal:
        use(Path("mine.yaml"))
    assert "\n" not in str(refusal.value)
    assert project.run("git", "status", "--porcelain", "params.yaml").stdout == ""


def test_no_phrasing_that_a_recipe_can_use_asks_an_exam_question(project: Project) -> None:
    number = len(read_yaml(project.folder / "data/raw/phrasings.yaml")["leader"])
    project.set(generate__phrasings_per_fact=number, generate__replay=0)
    generate.main()
    replay.main()
    merge.main()  # raises for a row that asks an exam question
    generated = read_jsonl(project.folder / "data/train.jsonl")
    assert number == 12 and len(generated) == 12 * 102
