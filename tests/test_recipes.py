"""Recipes: params.yaml for real models, and what they need by the prediction."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Project

from bench.recipes import SHAPES, fits, needed, train_of
from pipeline.parameters import read_yaml
from pipeline.refusal import Refused
from tools.use import main, use

RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}


def leaves(values: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in values.items() for key, value in keys.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_changes_its_values_and_no_other_character(project: Project, recipe: str) -> None:
    old = Path("params.yaml").read_text(encoding="utf-8").splitlines()
    use(RECIPES[recipe])
    new = Path("params.yaml").read_text(encoding="utf-8").splitlines()
    wanted = leaves(read_yaml(RECIPES[recipe]))
    now = read_yaml(Path("params.yaml"))
    assert {key: now[key.split(".")[0]][key.split(".")[1]] for key in wanted} == wanted
    changed = 0
    for before, after in zip(old, new, strict=True):
        if before != after:
            (key, value), (_, _, comment) = after.split(" #")[0].strip().split(": "), before.partition("#")
            assert key in {name.split(".")[1] for name in wanted}
            assert after == f"  {key}: {value}".ljust(before.index("#") - 1) + f" #{comment}"
            changed += 1
    assert 5 < changed <= len(wanted)


def test_nothing_of_one_recipe_is_left_after_the_next(project: Project) -> None:
    assert len({tuple(leaves(read_yaml(path))) for path in RECIPES.values()}) == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_its_gpu_with_room_to_spare_and_needs_what_its_table_says(recipe: str) -> None:
    train = train_of(recipe)
    assert train.batch_size * train.gradient_accumulation == 16
    size = needed(recipe, train, train.max_length)
    card = re.search(r"for GPUs of (\d+) GB and more", RECIPES[recipe].read_text(encoding="utf-8"))
    assert card and fits(size, int(card[1]))
    table = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    assert f"| `{recipe}` | {size / 2**30:.1f} |" in table


def test_each_recipe_has_a_known_shape() -> None:
    assert set(RECIPES) == set(SHAPES)


@pytest.mark.parametrize("arguments", [[], ["llama"], ["../params"]])
def test_an_unknown_recipe_is_refused_with_the_list(
    project: Project, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["use", *arguments])
    with pytest.raises(Refused, match=r"set it to one of gemma-2-2b, .*, qwen3-8b$"):
        main()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train:\n  batch: 2\n", r"mine\.yaml: train\.batch is not a parameter; accepted here: max_length, "),
        ("lora: 5\n", r"mine\.yaml: lora is 5: "),
        ("train: {\n", r"mine\.yaml cannot be read as YAML: "),
    ],
)
def test_a_wrong_recipe_is_refused_by_its_name_and_changes_nothing(project: Project, text: str, line: str) -> None:
    Path("mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(Refused, match=line) as refusal:
        use(Path("mine.yaml"))
    assert "\n" not in str(refusal.value)
    assert project.run("git", "status", "--porcelain", "params.yaml").stdout == ""
