"""dvc.yaml says the truth: what a stage's code reads is what its entry declares."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Project

STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
PARAMETERS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
RUNS_SCRIPTS = {name: {name, "fetch.py", "requirements.txt", "source.txt"} for name in ("convert.py", "quantize.py")}


def outputs(stage: dict[str, Any]) -> list[str]:
    entries = [*stage.get("outs", []), *stage.get("metrics", [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def imported_modules(file: Path) -> set[Path]:
    """The files of this project that `file` imports, directly or not."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.Import) or not any(alias.name.startswith("pipeline") for alias in node.names)
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in {"pipeline", "stages", "tools"}:
            module = ROOT.joinpath(*str(node.module).split(".")).with_suffix(".py")
            assert module.is_file(), f"{file}: import from {node.module}: name the module"
            found |= {module} | imported_modules(module)
    return found


def parameters_read(file: Path) -> set[str]:
    """Every key that the file reads as `parameters.section.key` or as part of a whole `parameters.section`."""
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


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_every_module_and_script_it_uses(name: str) -> None:
    file = ROOT / "stages" / f"{name}.py"
    # With the .html, .css, .js and .md beside a module, that it reads.
    always = ROOT / "stages/__init__.py"
    used = {file, always} | imported_modules(file) | imported_modules(always)
    modules = {part for module in used for part in module.parent.glob(f"{module.stem}.*")}
    scripts = {
        f"llama.cpp/{part}"
        for script, parts in RUNS_SCRIPTS.items()
        if f'run_script("{script}"' in file.read_text(encoding="utf-8")
        for part in parts
    }
    code = {str(path.relative_to(ROOT)) for path in modules} | scripts
    declared = {dep for dep in STAGES[name]["deps"] if dep.startswith(("llama.cpp/", "pipeline/", "stages/"))}
    assert declared == code
    assert "requirements.txt" in STAGES[name]["deps"]


@pytest.mark.parametrize("pins", ["llama.cpp/requirements.txt", "llama.cpp/source.txt"])
def test_another_llama_cpp_reruns_what_converts_and_what_runs_gguf_files_alone(pins: str) -> None:
    assert {name for name in STAGES if pins in STAGES[name]["deps"]} == {"convert_gguf", "evaluate_gguf"}


def test_no_stage_imports_another_and_the_pipeline_imports_neither_stages_nor_tools() -> None:
    for folder, allowed in [("stages", {"pipeline"}), ("tools", {"pipeline", "tools"}), ("pipeline", {"pipeline"})]:
        for file in (ROOT / folder).glob("*.py"):
            assert {path.parent.name for path in imported_modules(file)} <= allowed, file


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_every_parameter_it_reads_and_reads_every_one_it_declares(name: str) -> None:
    source = (ROOT / "stages" / f"{name}.py").read_text(encoding="utf-8")
    assert ("params" in STAGES[name]) == (f'parameters = load("{name}")' in source)
    declared = {key for entry in STAGES[name].get("params", []) for key in keys(entry)}
    file = ROOT / "stages" / f"{name}.py"
    assert set[str]().union(*(parameters_read(each) for each in {file} | imported_modules(file))) == declared


def test_every_output_is_ignored_by_git_or_committed_before_and_after_a_failed_run(project: Project) -> None:
    def ignored() -> set[str]:
        return {path for path in every if project.run("git", "check-ignore", "-q", path, check=False).returncode == 0}

    every = [path for stage in STAGES.values() for path in outputs(stage)]
    committed = {
        f"metrics/{name}.json" for name in ("generate", "data", "lengths", "train", "evaluate", "general", "gguf")
    }
    assert ignored() == set(every) - committed
    assert all((project.folder / path).exists() for path in committed)
    (project.folder / "data/raw/facts.csv").write_text("not,facts\nA,b\n", encoding="utf-8")
    failed = project.run("dvc", "repro", check=False)
    assert failed.returncode != 0 and "facts.csv:2" in failed.stderr and "Traceback" not in failed.stderr
    assert ignored() == set(every) - committed


def test_a_refused_stage_leaves_the_committed_metrics_of_a_fresh_clone_in_place(project: Project) -> None:
    exam = (project.folder / "data/questions.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (project.folder / "data/curated/leak.jsonl").write_text(exam + "\n", encoding="utf-8")
    refused = project.run("dvc", "repro", "merge", check=False)
    assert refused.returncode != 0 and "asks the question" in refused.stderr and "Traceback" not in refused.stderr
    assert project.run("git", "status", "--porcelain", "metrics").stdout == ""
