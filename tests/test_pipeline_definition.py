"""The entry of a stage in dvc.yaml declares what the code of the stage reads."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Project

from pipeline.common import paths
from pipeline.common.errors import UserError
from tools import deps

STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
PARAMETERS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def libraries(stage: dict[str, Any]) -> list[str]:
    of_files = [entry for entry in stage["params"] if isinstance(entry, dict)]
    return [name for entry in of_files for name in entry.get(deps.LIBRARIES.name, [])]


def outputs(stage: dict[str, Any]) -> list[str]:
    entries = [*stage.get("outs", []), *stage.get("metrics", [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def parameters_read(file: Path) -> set[str]:
    """Every key that the file reads as `parameters.section.key` or as part of a complete `parameters.section`."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    inner = {node.value for node in nodes if isinstance(node, ast.Attribute)}
    names = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute) and node not in inner}
    reads = {name.removeprefix("parameters.") for name in names if name.startswith("parameters.")}
    known = [name for name in reads if name.split(".")[0] in PARAMETERS]  # not a method, or another's parameters
    return {key for name in known for key in keys(".".join(name.split(".")[:2]))}


def keys(name: str) -> set[str]:
    """The parameter itself, or those of a section."""
    value = PARAMETERS.get(name)
    return {f"{name}.{key}" for key in value} if isinstance(value, dict) else {name}


def test_there_is_a_module_for_every_stage_and_a_stage_for_every_module() -> None:
    modules = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert modules == set(STAGES)
    assert all(STAGES[name]["cmd"] == f"exec python -m stages.{name}" for name in STAGES)


def test_the_code_and_the_libraries_of_each_stage_are_those_that_make_deps_writes() -> None:
    for file, text in deps.written(deps.PIPELINE.read_text(encoding="utf-8")).items():
        assert file.read_text(encoding="utf-8") == text, "run make deps"


def test_a_library_is_declared_by_the_stages_that_import_it_alone() -> None:
    def users(library: str) -> set[str]:
        return {name for name, stage in STAGES.items() if library in libraries(stage)}

    assert users("openai") == {"generate", "evaluate_gguf"} and users("pydantic") == {"generate"}
    assert users("markdownify") == {"generate", "corpus"}
    answers = {"replay", "evaluate_base", "evaluate_sft", "evaluate", "evaluate_gguf"}  # TRL reads the calls in answers
    assert users("trl") == {"train_qlora", "align", *answers}
    assert users("cyllama") == {"convert_gguf"} and users("xllamacpp") == {"evaluate_gguf", "prepare_base"}
    assert users("torch") >= {"train_qlora", "align", "evaluate_base", "evaluate", "merge_adapter"}
    assert not users("torch") & {"generate", "merge", "corpus", "pairs", "report"}
    assert not users("dvc") and not users("tqdm")  # these make nothing


def test_what_make_deps_must_not_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of a package, a script whose name is on the next line, entries of other kinds, an unknown library."""
    for file, text in {
        "stages/__init__.py": "",
        "stages/a.py": 'from pipeline.b import c, D\nimport regex\nrun_script(\n    "convert.py", "x")\n',
        "pipeline/b/__init__.py": "",
        "pipeline/b/c.py": "import os\n",
        "llama.cpp/convert.py": "from fetch import CONVERTER\n",
        "llama.cpp/fetch.py": "",
        "llama.cpp/source.txt": "",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text, encoding="utf-8")
    monkeypatch.setattr(deps, "ROOT", tmp_path)
    entry = "stages:\n  a:\n    cmd: x\n    params:\n      - own.yaml: [key]\n    deps:\n      - stages/list.txt\n"
    stage = yaml.safe_load(deps.written(entry)[deps.PIPELINE])["stages"]["a"]
    scripts, modules = ["convert.py", "fetch.py", "source.txt"], ["b/__init__.py", "b/c.py"]
    code = [*(f"llama.cpp/{name}" for name in scripts), *(f"pipeline/{name}" for name in modules)]
    assert stage["deps"] == ["stages/list.txt", *code, "stages/__init__.py", "stages/a.py"]
    assert stage["params"][0] == {"own.yaml": ["key"]} and "regex" in stage["params"][1]["libraries.yaml"]
    (tmp_path / "pipeline/b/c.py").write_text("import playwright\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^pipeline/b/c\.py: playwright is of no package in requirements\.txt"):
        deps.written(entry)


@pytest.mark.parametrize("name", STAGES)
def test_every_shared_path_that_a_stage_names_is_in_its_entry(name: str) -> None:
    """No stage depends on pipeline/common/paths.py: another path there must be another path in dvc.yaml."""
    named = {
        str(getattr(paths, alias.name))
        for file in deps.files_of(name, STAGES[name])
        if file.endswith(".py")
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "pipeline.common.paths"
        for alias in node.names
    }
    assert named <= {*STAGES[name]["deps"], *outputs(STAGES[name])}


def test_another_converter_reruns_what_converts_or_tries_to_and_what_runs_gguf_files_alone() -> None:
    converting = {name for name in STAGES if deps.SOURCE in STAGES[name]["deps"]}
    assert converting == {"prepare_base", "convert_gguf", "evaluate_gguf"}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_every_parameter_it_reads_and_reads_every_one_it_declares(name: str) -> None:
    entries = [entry for entry in STAGES[name].get("params", []) if isinstance(entry, str)]
    source = (ROOT / f"stages/{name}.py").read_text(encoding="utf-8")
    assert bool(entries) == (f'parameters = load("{name}")' in source)
    declared = {key for entry in entries for key in keys(entry)}
    files = [file for file in deps.files_of(name, STAGES[name]) if file.endswith(".py")]
    read = set[str]().union(*(parameters_read(ROOT / file) for file in files))
    if name == "generate":  # hands its section on; reading a key of `replay`, its neighbour, would raise AttributeError
        read -= {"generate.replay", "generate.replay_length"}
    assert read == declared, "dvc.yaml lists what the code reads, as parameters.section.key"


@pytest.mark.parametrize("name", STAGES)
def test_what_git_keeps_is_a_metric_without_which_dvc_does_not_remember_runs(name: str) -> None:
    assert all(
        isinstance(out, str) or out == {"data/replies.jsonl": {"persist": True}} for out in STAGES[name].get("outs", [])
    )


def test_every_output_is_ignored_by_git_or_committed_before_and_after_a_failed_run(project: Project) -> None:
    def ignored() -> set[str]:
        return {path for path in every if project.run("git", "check-ignore", "-q", path, check=False).returncode == 0}

    every = [path for stage in STAGES.values() for path in outputs(stage)]
    entries = [out for stage in STAGES.values() for out in [*stage.get("outs", []), *stage.get("metrics", [])]]
    committed = {path for out in entries if isinstance(out, dict) for path in out if out[path].get("cache") is False}
    assert ignored() == set(every) - committed, "name outputs in .gitignore, but for those with cache: false"
    assert all((project.folder / path).exists() for path in committed)
    (project.folder / "data/raw/facts.csv").write_text("not,facts\nA,b\n", encoding="utf-8")
    failed = project.run("dvc", "repro", "generate", check=False)
    assert failed.returncode != 0 and "facts.csv:2" in failed.stderr and "Traceback" not in failed.stderr
    assert ignored() == set(every) - committed


def test_a_refused_stage_leaves_the_committed_metrics_of_a_fresh_clone_in_place(project: Project) -> None:
    exam = (project.folder / "data/questions.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (project.folder / "data/curated/leak.jsonl").write_text(exam + "\n", encoding="utf-8")
    refused = project.run("dvc", "repro", "--single-item", "generate", "merge", check=False)
    assert refused.returncode != 0 and "asks the question" in refused.stderr and "Traceback" not in refused.stderr
    assert project.run("git", "status", "--porcelain", "metrics").stdout == ""
