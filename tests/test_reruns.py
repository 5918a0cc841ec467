"""What runs again when something changes: the tables of docs/reruns.md, and what the design promises of them.

DVC itself is asked, in a clone in which every parameter and every file of git is really changed. It needs no training:
dvc.lock knows what the outputs were made of.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Project, clone
from dvc.repo import Repo

from bench.pipeline import CHANGES

DOCUMENT = ROOT / "docs/reruns.md"
OWN = {"dvc.yaml", "dvc.lock"}  # of DVC itself; a changed entry of dvc.yaml is another stage
LIBRARIES = "libraries.yaml"


@dataclass(frozen=True)
class Reruns:
    """The stages that depend on each parameter, library and file. For every stage, in the order of dvc.yaml: the stage
    itself and the stages whose outputs it uses, directly or indirectly."""

    parameters: dict[str, set[str]]
    libraries: dict[str, set[str]]
    files: dict[str, set[str]]
    stages: dict[str, set[str]]

    def of(self, name: str) -> set[str]:
        """The stages that run again whatever comes of it."""
        return (self.parameters | self.libraries | self.files)[name]

    def at_most(self, name: str) -> set[str]:
        """And those that run if all of these make other bytes."""
        return {stage for stage, needed in self.stages.items() if needed & self.of(name)}

    def marks(self, name: str) -> str:
        return "".join(
            "●" if stage in self.of(name) else "○" if stage in self.at_most(name) else " " for stage in self.stages
        )


@pytest.fixture(scope="module")
def reruns(tmp_path_factory: pytest.TempPathFactory) -> Reruns:
    project = clone(tmp_path_factory.mktemp("reruns"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(project.folder)
        assert modified() == {}, "dvc.lock is not of this code: dvc repro, and commit it"
        with Repo() as repo:
            stages = {
                stage.name: {each.name for each in repo.stage.collect(stage.name, with_deps=True)}
                for stage in repo.index.stages
            }
            outputs = {str(Path(out.fs_path).relative_to(project.folder)) for out in repo.index.outs}
        return Reruns(of_parameters(project), of_libraries(), of_files(project, outputs | OWN | {LIBRARIES}), stages)


def of_parameters(project: Project) -> dict[str, set[str]]:
    """One is changed at a time: of `params: [lora]` DVC says no more than lora."""
    text = Path("params.yaml").read_text(encoding="utf-8")
    found = {}
    for section, values in yaml.safe_load(text).items():
        for key in [f"{section}__{name}" for name in values] if isinstance(values, dict) else [section]:
            project.set(**{key: "changed"})
            found[key.replace("__", ".")] = set[str]().union(*modified().values())
            Path("params.yaml").write_text(text, encoding="utf-8")
    return found


def of_libraries() -> dict[str, set[str]]:
    """All are changed at once: of libraries.yaml each stage names its own."""
    path = Path(LIBRARIES)
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r'"$', '.1"', text, flags=re.MULTILINE), encoding="utf-8")
    found = modified()
    path.write_text(text, encoding="utf-8")
    return {name: found[name] for name in yaml.safe_load(text)}


def of_files(project: Project, besides: set[str]) -> dict[str, set[str]]:
    """All are changed at once: DVC names each, or the folder that a stage depends on, which stands for its files."""
    files = set(project.run("git", "ls-files").stdout.splitlines()) - besides
    for name in files:
        with open(name, "ab") as file:
            file.write(b"\n")
    found = modified()
    in_folders = {name for folder in found for name in files if name.startswith(f"{folder}/")}
    return {name: found.get(name, set()) for name in found.keys() | files - in_folders}


def modified() -> dict[str, set[str]]:
    """The dependencies that are other than in dvc.lock, each with the stages that `dvc repro` runs for it. Those that
    the clone lacks, where no stage has run, are left out."""
    found = defaultdict(set)
    with Repo() as repo:  # a dvc process of its own takes seconds to start
        for stage, changes in repo.status().items():
            for change in changes:
                for name, how in change.get("changed deps", {}).items():
                    keys = how if name == LIBRARIES else [name]
                    if how != "deleted":
                        for key in keys:
                            found[key].add(stage)
    return dict(found)


def test_the_document_names_what_dvc_does(reruns: Reruns, tmp_path: Path) -> None:
    parts = {"parameter": parameter_rows(reruns), "library": library_rows(reruns), "file": file_rows(reruns)}
    tables = (table(part, rows, reruns) for part, rows in parts.items())
    before = DOCUMENT.read_text(encoding="utf-8")
    now = re.sub(r"(?m)(^\|.*\n)+", lambda _: next(tables), before)
    (tmp_path / "reruns.md").write_text(now, encoding="utf-8")
    difference = "".join(difflib.unified_diff(before.splitlines(True), now.splitlines(True), "documented", "true", n=0))
    assert not difference, f"\n{difference}\nIf this is meant: cp {tmp_path}/reruns.md {DOCUMENT}"
    assert next(tables, None) is None


def test_the_benchmark_changes_a_parameter_of_each_row(reruns: Reruns) -> None:
    rows = [marks for _, marks in parameter_rows(reruns)]
    expected = set(rows) - {reruns.marks("base.model")}
    assert {reruns.marks(key) for key in CHANGES} == expected, "name a parameter of the new row in CHANGES"


@pytest.mark.parametrize(
    ("section", "never"),
    [
        ("lora", {"prepare_base", "generate", "merge", "corpus", "tokenize", "evaluate_base"}),
        ("tokenize", {"prepare_base", "generate", "merge", "corpus", "evaluate_base"}),
        ("train", {"prepare_base", "generate", "merge", "corpus", "tokenize", "evaluate_base"}),
        ("align", {"prepare_base", "generate", "merge", "corpus", "pairs", "tokenize", "evaluate_base", "train_qlora"}),
        ("base", {"generate", "corpus", "pairs"}),
        ("generate", {"prepare_base", "corpus", "pairs", "evaluate_base"}),
        ("merge", {"prepare_base", "generate"}),
        ("evaluate", {"train_qlora", "align", "merge_adapter", "convert_gguf"}),
        ("gguf", {"train_qlora", "align", "evaluate", "model_card", "merge_adapter"}),
    ],
)
def test_no_parameter_of_a_section_ever_reruns(reruns: Reruns, section: str, never: set[str]) -> None:
    template = "tokenize.tool_format"  # prepare_base writes the chat template
    names = [name for name in reruns.parameters if name.startswith(f"{section}.") and name != template]
    assert names and not any(reruns.at_most(name) & never for name in names)


def test_what_trains_nothing_whatever_comes_of_it(reruns: Reruns) -> None:
    for name in (
        "stages/evaluate.py",
        "pipeline/training/preferences.py",
        "pipeline/evaluation/scores.py",
        "llama.cpp/quantize.py",
        "stages/model_card.md",
    ):
        assert "train_qlora" not in reruns.at_most(name), name
    for name in ("gate.minimum", "evaluate.repeats", "params.yaml", "stages/report.py"):  # params.yaml: a comment there
        assert reruns.at_most(name) == {"report"}, name
    for name in (
        "README.md",
        "tools/gate.py",
        "tests/conftest.py",
        "requirements-dev.txt",
        "pipeline/training/memory.py",
    ):
        assert reruns.at_most(name) == set(), name


def test_a_library_reruns_the_stages_that_import_it(reruns: Reruns) -> None:
    assert reruns.of("openai") == {"generate", "evaluate_gguf"}
    assert reruns.of("trl") == {
        "train_qlora",
        "align",
        "replay",
        "evaluate_base",
        "evaluate_sft",
        "evaluate",
        "evaluate_gguf",
    }
    assert reruns.of("cyllama") == {"convert_gguf"}


def test_a_new_parameter_reruns_the_stages_that_read_its_section(reruns: Reruns) -> None:
    assert reruns.of("pipeline/common/parameters/gguf.py") == {"convert_gguf"}
    assert reruns.of("pipeline/common/parameters/train.py") == {"train_qlora", "align", "model_card"}
    for name in ("gate.py", "schema.py"):
        assert reruns.at_most(f"pipeline/common/parameters/{name}") == set()


def test_what_must_run_again(reruns: Reruns) -> None:
    assert reruns.of("lora.r") == {"train_qlora", "model_card", "report"}
    assert reruns.of("tokenize.max_length") == {
        "tokenize",
        "tokenize_pairs",
        "model_card",
        "report",
    }  # a limit that cuts no row retrains nothing
    assert reruns.of("llama.cpp/source.txt") == {"prepare_base", "convert_gguf", "evaluate_gguf"}
    exam = {"merge", "corpus", "pairs", "evaluate_base", "evaluate_sft", "evaluate", "evaluate_gguf", "report"}
    assert reruns.of("data/questions.jsonl") == exam
    assert reruns.of("models/tiny-base/model.safetensors") == {"prepare_base"}
    assert reruns.at_most("models/tiny-base/model.safetensors") == set(reruns.stages) - {"generate", "corpus", "pairs"}


def test_raw_text_rows_and_pairs_rerun_what_they_are_for(reruns: Reruns) -> None:
    assert reruns.of("data/corpus") == reruns.of("stages/corpus.py") == {"corpus"}
    assert not reruns.at_most("data/corpus") & {"prepare_base", "generate", "replay", "merge", "pairs"}
    assert not reruns.at_most("data/curated") & {"corpus", "pairs", "evaluate_base"}
    assert reruns.of("data/preferences") == reruns.of("stages/pairs.py") == {"pairs"}
    assert not reruns.at_most("data/preferences") & {"merge", "tokenize", "evaluate_base", "train_qlora"}


def parameter_rows(reruns: Reruns) -> Iterator[tuple[str, str]]:
    """A label and the marks, for the parameters of a section that act alike."""
    for section, group in groupby(reruns.parameters, key=lambda name: name.partition(".")[0]):
        names = list(group)
        for marks, alike in by_marks(reruns, names).items():
            others = [name for name in names if name not in alike]
            but = f", but for {listed(others)}" if others else ""
            yield listed(alike) if len(alike) <= len(others) else f"`{section}`{but}", marks


def library_rows(reruns: Reruns) -> Iterator[tuple[str, str]]:
    for marks, alike in sorted(by_marks(reruns, reruns.libraries).items(), reverse=True):
        yield listed(alike), marks


def file_rows(reruns: Reruns) -> Iterator[tuple[str, str]]:
    for marks, alike in sorted(by_marks(reruns, sorted(reruns.files)).items(), reverse=True):
        yield "every other file of git" if marks.isspace() else listed_by_folder(alike), marks


def by_marks(reruns: Reruns, names: Iterable[str]) -> dict[str, list[str]]:
    alike = defaultdict(list)
    for name in names:
        alike[reruns.marks(name)].append(name)
    return alike


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def listed_by_folder(paths: list[str]) -> str:
    """pipeline/data/facts.py, words.py"""
    folders = groupby(map(Path, paths), key=lambda path: path.parent)
    return listed(f"{next(group)}{''.join(f', {path.name}' for path in group)}" for _, group in folders)


def table(of: str, rows: Iterable[tuple[str, str]], reruns: Reruns) -> str:
    heads = [stage.replace("_", "<br>") for stage in reruns.stages]
    lines = [[of, *heads], ["---", *[":-:"] * len(heads)], *([label, *marks] for label, marks in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
