"""The real dvc.yaml, from nothing to proven GGUF files."""

import csv
import hashlib
import json
import re
import shutil
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from conftest import ROOT, Project, Terminal, serving
from gguf import GGUFReader
from huggingface_hub import ModelCard
from safetensors import safe_open

from pipeline.common.outputs import read_details
from pipeline.common.rows import read_jsonl
from pipeline.evaluation.variants import source
from tools import infer


def metrics(project: Project, name: str) -> Any:
    return json.loads((project.folder / f"metrics/{name}.json").read_text(encoding="utf-8"))


def details(project: Project, name: str) -> Any:
    return read_details(project.folder / f"metrics/details/{name}.json")


def ran(output: str) -> set[str]:
    return set(re.findall(r"Running stage '(\w+)'", output))


def subset(some: Any, of: Any) -> bool:
    return all(subset(some[key], of[key]) for key in some) if isinstance(some, dict) else bool(some == of)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_base_knows_nothing_the_tuned_model_nearly_all_and_every_gguf_file_answers_like_it(
    finished: Project,
) -> None:
    exam, general = details(finished, "evaluate").values()
    gguf = details(finished, "gguf")
    for of, name in [(exam, "evaluate"), ({"general": general}, "general"), (gguf, "gguf")]:
        assert subset(metrics(finished, name), of), "the metrics are some of the details"
    assert exam["base"]["correct"] <= 0.10
    assert exam["tuned"]["correct"] >= 0.90
    assert exam["base"]["stopped"] >= 0.95 and exam["tuned"]["stopped"] >= 0.95
    assert exam["tuned"]["loss"] < 0.5 < exam["base"]["loss"]
    gain = exam["gain"]["correct"]
    assert exam["detectable"] < gain["low"] <= gain["mean"] <= gain["high"] and gain["p_value"] < 1e-6
    assert general["base"]["correct"] >= 0.90 and general["tuned"]["correct"] >= 0.40  # it forgets, but not all
    assert set(gguf) == {"merged", "adapter-f16.gguf", "model-f16.gguf", "model-q8_0.gguf", "model-q4_k_m.gguf"}
    for name, lag in [
        ("adapter-f16.gguf", 0.03),
        ("model-f16.gguf", 0.03),
        ("model-q8_0.gguf", 0.03),
        ("model-q4_k_m.gguf", 0.05),
    ]:
        assert gguf[name]["correct"] >= exam["tuned"]["correct"] - lag, name
        assert gguf[name]["bytes"] == (finished.folder / "models/gguf" / name).stat().st_size
    assert gguf["merged"]["agreement"] == 1 and gguf["model-f16.gguf"]["agreement"] >= 0.98
    assert gguf["model-f16.gguf"]["kl"] < 1e-5 < 1e-3 < gguf["model-q4_k_m.gguf"]["kl"]
    for name, of in gguf.items():
        before = exam["tuned"] if source(name) == "tuned" else gguf[source(name)]
        assert of["conversion"]["correct"] == pytest.approx(of["correct"] - before["correct"], abs=2e-6)
        assert of["conversion"]["loss"] == pytest.approx(of["loss"] - before["loss"], abs=1e-4)


def test_every_answer_is_kept_with_its_question_and_scores(finished: Project) -> None:
    answers = [
        json.loads(line)
        for line in (finished.folder / "metrics/answers.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    exam = details(finished, "evaluate")["exam"]
    assert len(answers) == len((finished.folder / "data/questions.jsonl").read_text(encoding="utf-8").splitlines())
    asked = {"id", "question", "reference", "match", "tags", "source"}
    assert set(answers[0]) == asked | {"before", "after", "base", "tuned"}
    share = sum(answer["tuned"]["correct"] for answer in answers) / len(answers)
    assert share == pytest.approx(exam["tuned"]["correct"], abs=1e-5)
    flips = sum(answer["tuned"]["correct"] > answer["base"]["correct"] for answer in answers)
    assert flips == exam["flips"]["fixed"]


def test_the_adapter_carries_its_base_and_the_bases_tokenizer_unchanged(finished: Project) -> None:
    adapter, tiny = finished.folder / "outputs/adapter", finished.folder / "models/tiny-base"
    assert digest(adapter / "tokenizer.json") == digest(tiny / "tokenizer.json")
    base = json.loads((finished.folder / "models/base.json").read_bytes())
    assert json.loads((adapter / "base.json").read_bytes()) == base | {"model": "tiny-base"}  # no path of the machine
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == sorted(config["target_modules"])  # the same bytes in every process
    with safe_open(adapter / "adapter_model.safetensors", "np") as tensors:
        names = list(tensors.keys())
        assert all(tensors.get_slice(name).get_dtype() == "F32" for name in names)
    assert len(names) == 2 * 7 * 4  # A and B of seven linear layers in four blocks: all of them


def test_the_model_card_is_what_was_measured(finished: Project) -> None:
    adapter, aligned = finished.folder / "outputs/adapter", finished.folder / "outputs/aligned"
    assert {file.name for file in adapter.iterdir()} == {file.name for file in aligned.iterdir()} | {"README.md"}
    card, exam = ModelCard.load(adapter / "README.md"), details(finished, "evaluate")["exam"]
    found = card.data.to_dict()
    assert found["library_name"] == "peft" and "base_model" not in found  # which is a local folder, not on the hub
    results = {result.metric_name: result.metric_value for result in card.data.eval_results or []}
    assert results == {name: exam["tuned"][name] for name in ("correct", "exact_match", "f1", "chrf")}
    assert f"{metrics(finished, 'data')['rows']['train']} rows" in card.text
    assert "| Correct              |   2.0 % |" in card.text and "r: 16" in card.text
    assert digest(finished.folder / "data/train_merged.jsonl") in card.text


@pytest.mark.parametrize(("load", "variant"), [(0, "tuned"), (1, "merged")], ids=["PEFT", "Transformers"])
def test_the_model_cards_python_answers_as_the_exam(
    finished: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], load: int, variant: str
) -> None:
    monkeypatch.chdir(finished.folder)
    blocks = re.findall(r"```python\n(.+?)```", Path("outputs/adapter/README.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 3
    answers = {"tuned": "metrics/answers.jsonl", "merged": "metrics/answers_gguf.jsonl"}[variant]
    exec(blocks[load] + blocks[2], {"BASE": "models/tiny-base"})
    expected = read_jsonl(finished.folder / answers)[0]["after" if variant == "tuned" else variant]
    assert capsys.readouterr().out.strip() == expected


def test_the_model_cards_other_commands_are_those_that_work(finished: Project) -> None:
    text = (finished.folder / "outputs/adapter/README.md").read_text(encoding="utf-8")
    [file] = re.findall(r"^make serve ARGS=(\S+)$", text, re.M)  # make serve is tools/serve.py, once all is installed
    with serving(finished.folder, file) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == [Path(file).name]
    [file] = re.findall(r"^ollama create \S+ -f (\S+)$", text, re.M)
    assert (finished.folder / file).is_file()


def test_k_quants_are_real(finished: Project) -> None:
    kinds = {
        tensor.tensor_type.name for tensor in GGUFReader(finished.folder / "models/gguf/model-q4_k_m.gguf").tensors
    }
    assert {"Q4_K", "Q6_K"} <= kinds and not kinds & {"Q5_0", "Q5_1", "F16"}


def test_every_gguf_file_names_its_adapter_its_data_and_its_base(finished: Project) -> None:
    lock = yaml.safe_load((finished.folder / "dvc.lock").read_text(encoding="utf-8"))["stages"]["align"]
    found = {
        "qlora_dvc.adapter": next(out["md5"] for out in lock["outs"] if out["path"] == "outputs/aligned"),
        "qlora_dvc.data": digest(finished.folder / "data/train_merged.jsonl"),
        "qlora_dvc.base": json.loads((finished.folder / "models/base.json").read_bytes())["fingerprint"],
    }
    files = sorted((finished.folder / "models/gguf").glob("*.gguf"))
    assert len(files) == 4
    for file in files:
        fields = GGUFReader(file).fields
        assert {key: fields[key].contents() for key in found} == found
    checked = finished.run("sh", "-c", "cd models/gguf && sha256sum --check --strict SHA256SUMS").stdout.splitlines()
    assert checked == [f"{name}: OK" for name in ["Modelfile", "Modelfile.adapter", *(file.name for file in files)]]


def test_nothing_is_left_to_do_and_git_sees_no_output(finished: Project) -> None:
    done = finished.run("dvc", "repro")
    assert "Data and pipelines are up to date." in done.stdout and not ran(done.stdout)
    changed = {line[3:] for line in finished.run("git", "status", "--porcelain").stdout.splitlines()}
    names = ("data", "lengths", "train", "evaluate", "general", "gguf")
    metrics_in_git = {f"metrics/{folder}{name}.json" for name in names for folder in ("", "details/")}
    assert changed <= metrics_in_git | {"dvc.lock"}


def test_metrics_plots_and_the_graph_show_what_a_dvc_user_expects(finished: Project) -> None:
    shown = json.loads(finished.run("dvc", "metrics", "show", "--json").stdout)[""]["data"]
    assert {
        "metrics/data.json",
        "metrics/lengths.json",
        "metrics/train.json",
        "metrics/evaluate.json",
        "metrics/general.json",
        "metrics/gguf.json",
    } <= set(shown)
    assert not any(of["data"] for path, of in shown.items() if "details" in path), "DVC shows numbers of a JSON list"
    finished.run("dvc", "plots", "show", "-o", "plots")
    page = (finished.folder / "plots/index.html").read_text(encoding="utf-8")
    titles = ("Loss on the answers", "Lengths of the rows", "Correct answers by tag", "Scores of every variant")
    assert all(title in page for title in titles)
    finished.run("rm", "-r", "plots")
    assert "metrics/evaluate.json" in finished.run("dvc", "metrics", "diff", "--all").stdout
    finished.run("dvc", "plots", "diff", "HEAD", "-o", "plots")
    finished.run("rm", "-r", "plots")
    graph = finished.run("dvc", "dag", "--mermaid").stdout
    assert all(
        name in graph
        for name in ("generate", "merge", "tokenize", "pairs", "train_qlora", "align", "evaluate_gguf", "report")
    )
    assert "world" not in graph


def test_a_stage_that_makes_the_same_again_reruns_no_other(finished: Project) -> None:
    code = finished.folder / "stages/merge.py"
    before = code.read_text(encoding="utf-8")
    code.write_text(f"{before}# a comment\n", encoding="utf-8")
    assert ran(finished.run("dvc", "repro").stdout) == {"merge"}
    code.write_text(before, encoding="utf-8")
    done = finished.run("dvc", "repro")
    assert "Stage 'merge' is cached" in done.stdout and not ran(done.stdout)


def test_a_queued_experiment_continues_a_killed_one_and_with_less_training_scores_lower(
    finished: Project,
) -> None:
    less = ["-S", "lora.r=1", "-S", "train.epochs=1", "-S", "gguf.quantize=[]"]
    finished.kill("dvc", "exp", "run", "--temp", *less, step=32)
    finished.run("dvc", "exp", "run", "--queue", "--name", "small", *less)
    finished.run("dvc", "queue", "start")
    log = finished.run("dvc", "queue", "logs", "--follow", "small").stdout
    assert "continuing from checkpoint-" in log
    assert ran(log) == {
        "train_qlora",
        "align",
        "evaluate_sft",
        "evaluate",
        "model_card",
        "merge_adapter",
        "convert_gguf",
        "evaluate_gguf",
        "report",
    }
    for _ in range(60):  # the worker gathers the results after the last line of the log
        rows = csv.DictReader(finished.run("dvc", "exp", "show", "--csv").stdout.splitlines())
        scores = {row["Experiment"] or row["rev"]: row["tuned.correct"] for row in rows}
        if scores.get("small"):
            break
        time.sleep(1)
    assert float(scores["small"]) < float(scores["workspace"]) - 0.1


def test_an_experiment_comes_to_a_clone_with_its_files_and_nothing_trains_again(
    finished: Project, tmp_path: Path
) -> None:
    storage = ["dvc", "remote", "add", "--local", "--default", "storage", str(tmp_path / "storage")]
    finished.run(*storage)
    finished.run("git", "clone", "-q", "--bare", ".", str(tmp_path / "origin"))
    finished.run("dvc", "exp", "save", "--name", "shared")
    finished.run("dvc", "exp", "push", str(tmp_path / "origin"), "shared")
    finished.run("dvc", "exp", "remove", "shared")
    finished.run("dvc", "remote", "remove", "--local", "storage")
    elsewhere = Project(tmp_path / "elsewhere")
    finished.run("git", "clone", "-q", str(tmp_path / "origin"), str(elsewhere.folder))
    elsewhere.run(*storage)
    elsewhere.run("dvc", "exp", "pull", "origin", "shared")
    elsewhere.run("dvc", "exp", "apply", "shared")
    assert ran(elsewhere.run("dvc", "repro").stdout) == set()
    adapter = "outputs/adapter/adapter_model.safetensors"
    assert digest(elsewhere.folder / adapter) == digest(finished.folder / adapter)
    assert metrics(elsewhere, "evaluate") == metrics(finished, "evaluate")


def test_the_adapter_alone_answers_on_another_machine_that_has_not_what_training_needs(
    finished: Project, tmp_path: Path
) -> None:
    elsewhere = Project(tmp_path / "elsewhere")
    finished.run("git", "clone", "-q", ".", str(elsewhere.folder))
    shutil.copy(finished.folder / "dvc.lock", elsewhere.folder)
    elsewhere.run("dvc", "remote", "add", "--default", "storage", str(finished.folder / ".dvc/cache"))
    elsewhere.run("dvc", "pull", "outputs/adapter")
    # Python finds what requirements-infer.txt names, and nothing that other requirements alone name.
    wanted = pinned(ROOT / "requirements-infer.txt")
    here = [ROOT / f"requirements{of}.txt" for of in ("", "-remotes", "-dev")]  # what this environment has
    others = set[str]().union(*map(pinned, here)) - wanted
    hidden = {name for package in others for name in installed(package)}
    hidden -= {name for package in wanted for name in installed(package)}  # a folder may be of several packages
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name not in hidden:
            (packages / entry.name).symlink_to(entry)
    elsewhere.env = {"PYTHONPATH": str(packages)}
    python = [sys.executable, "-S"]  # without what is installed
    assert "No module named 'dvc'" in elsewhere.run(*python, "-c", "import dvc", check=False).stderr
    row = read_jsonl(finished.folder / "metrics/answers.jsonl")[0]
    assert elsewhere.run(*python, "-m", "tools.infer", row["question"]).stdout.strip() == row["after"]
    chat = elsewhere.run("sh", "-c", 'echo "$0" | "$@" -m tools.chat', row["question"], *python)
    assert f"> {row['after']}\n" in chat.stdout


def pinned(requirements: Path) -> set[str]:
    lines = requirements.read_text(encoding="utf-8").splitlines()
    return {line.partition("==")[0] for line in lines if "==" in line}


def installed(package: str) -> set[str]:
    """What it has in site-packages, at the top."""
    return {file.parts[0] for file in distribution(package).files or []}


def test_noise_is_measured_by_experiments_that_differ_in_their_seed_and_are_not_run_twice(finished: Project) -> None:
    kept = {name: (finished.folder / name).read_bytes() for name in ("params.yaml", "metrics/noise.json")}
    finished.set(evaluate__repeats=3, train__epochs=0.25)
    refused = finished.run("python", "-m", "tools.noise", check=False)
    assert refused.returncode != 0 and "uncommitted changes" in refused.stderr
    finished.run("git", "commit", "-qam", "less training")
    assert ran(finished.run("python", "-m", "tools.noise").stdout) == {
        "train_qlora",
        "align",
        "evaluate_sft",
        "evaluate",
    }
    noise = metrics(finished, "noise")
    assert noise["seeds"] == [1, 2, 3] and 0 < noise["tuned"]["loss"]["sd"] < noise["tuned"]["loss"]["noise"]
    assert ran(finished.run("python", "-m", "tools.noise").stdout) == set()
    finished.run("git", "reset", "-q", "HEAD~1")
    for name, content in kept.items():
        (finished.folder / name).write_bytes(content)


def test_the_chat_answers_as_the_exam_and_beside_the_base(finished: Project) -> None:
    fixed = next(row for row in read_jsonl(finished.folder / "metrics/answers.jsonl") if row["before"] != row["after"])
    terminal = Terminal(finished.folder, sys.executable, "-m", "tools.chat", "--base")
    terminal.shows("> ")
    terminal.type(fixed["question"] + "\n")
    assert [line.split(None, 1) for line in terminal.shows("\n> ").splitlines()[1:3]] == [
        ["base", fixed["before"]],
        ["tuned", fixed["after"]],
    ]
    terminal.type("\x04")  # Ctrl-D
    assert terminal.ends() == 0


@pytest.mark.parametrize(
    ("model", "file", "key"),
    [
        ([], "answers", "after"),
        (["--base"], "answers", "before"),
        (["--gguf", "models/gguf/model-q8_0.gguf"], "answers_gguf", "model-q8_0.gguf"),
    ],
    ids=["adapter", "base", "gguf"],
)
def test_infer_answers_a_file_of_questions_as_the_exam_and_keeps_their_order_and_keys(
    finished: Project,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: list[str],
    file: str,
    key: str,
) -> None:
    monkeypatch.chdir(finished.folder)
    monkeypatch.setattr(sys, "argv", ["infer", *model, "--rows", "data/questions.jsonl"])
    infer.main()
    exam = {row["id"]: row for row in read_jsonl(finished.folder / "data/questions.jsonl")}
    expected = {row["id"]: row[key] for row in read_jsonl(finished.folder / f"metrics/{file}.jsonl")}
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [exam[name] | {"answer": answer} for name, answer in expected.items()]


def test_the_served_file_answers_the_openai_client_as_in_the_exam(finished: Project) -> None:
    exam = {row["id"]: row["question"] for row in read_jsonl(finished.folder / "data/questions.jsonl")}
    rows = read_jsonl(finished.folder / "metrics/answers_gguf.jsonl")[:8]

    def asked(question: str, stream: bool) -> str:
        reply = client.chat.completions.create(
            model="model-q8_0.gguf", messages=[{"role": "user", "content": question}], stream=stream
        )
        if isinstance(reply, openai.Stream):
            return "".join(chunk.choices[0].delta.content or "" for chunk in reply)
        return reply.choices[0].message.content or ""

    with serving(finished.folder) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["model-q8_0.gguf"]
        with ThreadPoolExecutor(2) as at_once:
            answers = list(at_once.map(asked, [exam[row["id"]] for row in rows], [True, False] * 4))
    assert answers == [row["model-q8_0.gguf"] for row in rows]


def test_a_refused_run_says_why_in_one_line_and_loses_no_output(finished: Project) -> None:
    adapter, losses = (
        finished.folder / "outputs/adapter/adapter_model.safetensors",
        finished.folder / "metrics/train.json",
    )
    kept = digest(adapter), digest(losses)
    before = (finished.folder / "params.yaml").read_text(encoding="utf-8")
    finished.set(lora__r="abc")
    done = finished.run("dvc", "repro", check=False)
    (finished.folder / "params.yaml").write_text(before, encoding="utf-8")
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if "lora.r is 'abc'" in line] and "Traceback" not in done.stderr
    assert (digest(adapter), digest(losses)) == kept
    assert losses.stat().st_nlink == 1  # git writes it: it is no link into the cache
    assert "up to date" in finished.run("dvc", "repro").stdout
