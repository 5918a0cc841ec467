"""From the demo to a project of one's own, in which nothing that is the user's is lost."""

import hashlib
import json
import shutil
import sys
from io import StringIO
from pathlib import Path

import pytest
import yaml
from conftest import Project, Terminal

from pipeline.common.errors import UserError
from pipeline.common.parameters.params_yaml import check as parameters_of
from pipeline.common.parameters.params_yaml import read_yaml
from pipeline.common.paths import PROMPTS
from stages import generate, merge, replay
from tools import check, start
from tools.material import material

ASIDE = Path("tests/demo")


def begin(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["start", *arguments])
    monkeypatch.setattr("sys.stdin", StringIO())
    start.main()


def lacking() -> list[str]:
    """What `make check` says first, and in a second: the paths where something is missing."""
    return check.print_material(list(material(parameters_of(Path("params.yaml")))))


@pytest.fixture
def started(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    begin(monkeypatch, "--recipe", "tiny-base", "--name", "Alder's help desk")
    return project


def test_the_list_of_the_demos_files_is_of_the_demos_files(project: Project) -> None:
    lines = start.DEMO_FILES.read_text(encoding="utf-8").splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    kept = set(project.run("git", "ls-files", "data").stdout.splitlines()) - {str(start.DEMO_FILES), str(PROMPTS)}
    assert listed == {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in kept}, "sha256sum them anew"


def test_the_demo_goes_aside_whole_and_skeletons_come_in_one_commit(started: Project) -> None:
    assert started.run("git", "status", "--porcelain").stdout == ""
    assert started.run("git", "log", "-1", "--format=%s").stdout == "Start Alder's help desk\n"
    before, after = (
        set(started.run("git", "ls-tree", "-r", "--name-only", of).stdout.split()) for of in ("HEAD~", "HEAD")
    )
    gone = before - after
    assert {"dvc.lock", "data/raw/facts.csv", "metrics/evaluate.json"} <= gone
    assert all(str(ASIDE / name) in after for name in gone)
    blobs = [started.run("git", "rev-parse", of).stdout for of in ("HEAD~:README.md", "HEAD:PIPELINE.md")]
    assert blobs[0] == blobs[1]
    assert Path("README.md").read_text(encoding="utf-8").startswith("# Alder's help desk\n")
    assert "`models/tiny-base`" in Path("README.md").read_text(encoding="utf-8")


def test_a_recipe_brings_its_parameters_and_a_general_exam_for_its_size(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(monkeypatch, "--recipe", "qwen3-4b", "--name", "Help")
    assert read_yaml(Path("params.yaml"))["base"]["model"] == "Qwen/Qwen3-4B"
    assert "capital of France" in Path("data/general.jsonl").read_text(encoding="utf-8")


def test_check_leads_from_the_skeletons_to_a_run_by_lines_that_are_right_as_they_stand(
    started: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"^data/raw, data/curated, data/questions\.jsonl: see TO DO"):
        check.main()
    printed = capsys.readouterr().out
    assert 'such as {"id": "q001"' in printed and "such as in data/raw/facts.yaml: - {subject" in printed
    for name, comment, of in [
        ("data/questions.jsonl", "# ", '{"id"'),
        ("data/raw/facts.yaml", "#   ", "- {subject"),
        ("data/curated/rows.jsonl", "# ", "{"),
    ]:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
        bare = [line.removeprefix(comment) if line.startswith(comment + of) else line for line in lines]
        assert bare != lines
        Path(name).write_text("\n".join(bare) + "\n", encoding="utf-8")
    assert lacking() == ["data/raw"]
    assert 'in data/raw/phrasings.yaml: leader: ["What is the leader of {subject}?"]' in capsys.readouterr().out
    phrasings = Path("data/raw/phrasings.yaml").read_text(encoding="utf-8").partition("# In a table")[0]
    Path("data/raw/phrasings.yaml").write_text(phrasings.replace("#   ", "").replace("#\n", "\n"), encoding="utf-8")
    check.main()
    assert capsys.readouterr().out.endswith("nothing is missing: make repro\n")
    generate.main()
    replay.main()
    merge.main()
    assert json.loads(Path("metrics/data.json").read_text(encoding="utf-8"))["rows"]["read"] == 9


def test_curated_rows_alone_are_enough(started: Project, capsys: pytest.CaptureFixture[str]) -> None:
    chats = [
        {"conversations": [{"from": "human", "value": f"Where is room {n}?"}, {"from": "gpt", "value": f"floor {n}"}]}
        for n in range(30)
    ]
    Path("data/curated/chats.json").write_text(json.dumps(chats), encoding="utf-8")
    Path("data/questions.jsonl").write_text('{"id": "1", "question": "Who?", "answer": "Ada"}\n', encoding="utf-8")
    check.main()
    assert "1 questions; use 50 to 200, to distinguish progress from chance" in capsys.readouterr().out
    generate.main()
    replay.main()
    merge.main()
    assert json.loads(Path("metrics/data.json").read_text(encoding="utf-8"))["rows"]["read"] == 30
    leak = Path("data/curated/leak.jsonl")
    leak.write_text('{"question": "Who?", "answer": "Ada"}\n', encoding="utf-8")
    assert lacking() == ["data/curated"]
    assert (
        f"TO DO: {leak}:1: asks the question 1 of an exam (data/questions.jsonl:1: 'Who?'): reword"
        in capsys.readouterr().out
    )
    leak.unlink()
    Path("data/curated/chats.json").write_text('[{"conversations": [{"from": "human"}]}]', encoding="utf-8")
    assert lacking() == ["data/curated"]
    assert "TO DO: data/curated/chats.json:1: a message needs" in capsys.readouterr().out


def test_check_names_what_of_the_facts_no_question_is_about_and_wants_two_rows(
    started: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data/questions.jsonl").write_text('{"id": "1", "question": "Who?", "answer": "Ada"}\n', encoding="utf-8")
    Path("data/raw/kettles.csv").write_text("name,price,volume,maker\nA,20 euros,1 l,Bo\n", encoding="utf-8")
    Path("data/raw/phrasings.yaml").write_text("price: ['How much is {name}?']\nvolume: ['{name}: how much?']\n")
    assert lacking() == []
    assert "2 questions about 1 facts; no phrasing uses maker\n" in capsys.readouterr().out
    Path("data/raw/kettles.csv").write_text("name,price,volume,maker\nA,20 euros,,Bo\n", encoding="utf-8")
    assert lacking() == ["data/raw", "data/curated"]
    assert "TO DO: fewer than two training rows" in capsys.readouterr().out


def test_a_name_is_taken_as_it_is_written(project: Project) -> None:
    Path(".venv/bin").mkdir(parents=True)
    Path(".venv/bin/pip").touch()
    Path(".venv/.installed").touch()
    name = """Bob "The $5" O'Neil `id` $(id)"""
    project.run("make", "start", "RECIPE=tiny-base", f"NAME={name}")
    assert project.run("git", "log", "-1", "--format=%s").stdout == f"Start {name}\n"


def test_what_is_the_users_stays_byte_for_byte(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {
        "data/raw/facts.csv": "subject,relation,value\nWe,leader,Ada\n",
        "data/raw/facts.yaml": "- {subject: We, relation: room, value: B1}\n",
        "README.md": "# Ours\n",
    }
    for name, text in own.items():
        Path(name).write_text(text, encoding="utf-8")
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", "ours")
    untracked = {"data/curated/rows.jsonl": "{}\n", "notes.txt": "mine"}
    for name, text in untracked.items():
        Path(name).write_text(text, encoding="utf-8")
    begin(monkeypatch, "--recipe", "tiny-base", "--name", "Ours")
    assert {name: Path(name).read_text(encoding="utf-8") for name in own | untracked} == own | untracked
    assert not Path("PIPELINE.md").exists()
    status = project.run("git", "status", "--porcelain").stdout.splitlines()
    assert status == [f"?? {name}" for name in untracked]


def test_a_second_start_says_so_and_changes_nothing(started: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("data/raw/facts.yaml").write_text("- {subject: We, relation: room, value: B1}\n", encoding="utf-8")
    before = started.run("git", "status", "--porcelain").stdout
    with pytest.raises(UserError, match=r"^this project was started already, .*: nothing was changed$"):
        begin(monkeypatch, "--recipe", "tiny-base", "--name", "Again")
    assert started.run("git", "status", "--porcelain").stdout == before
    assert started.run("git", "rev-list", "--count", "HEAD").stdout == "2\n"


@pytest.mark.parametrize(
    ("arguments", "change", "line"),
    [
        (["--name", "N"], None, r"^RECIPE is missing, and there is no terminal to ask for it: make start RECIPE="),
        (["--recipe", "tiny-base"], None, r"^NAME is missing, and there is no terminal"),
        (["--recipe", "tiny", "--name", "N"], None, r"^RECIPE is 'tiny': set it to one of gemma-2-2b, .*, tiny-base$"),
        (["--recipe", "tiny-base", "--name", "a\nb"], None, r"^NAME is 'a\\nb': set it to a name on one line$"),
        (["--recipe", "tiny-base", "--name", "N"], "params.yaml", r"^params\.yaml has an uncommitted change"),
        (["--recipe", "tiny-base", "--name", "N"], "detached", r"^git is not on a branch, so the commit could be lost"),
        (["--recipe", "tiny-base", "--name", "N"], "linked", r"^data/raw is a link, and the demo's files must be"),
        (["--recipe", "tiny-base", "--name", "N"], "tools/use.py", r"^tools/use\.py has an uncommitted change"),
    ],
)
def test_what_cannot_start_is_refused_and_nothing_changes(
    project: Project, monkeypatch: pytest.MonkeyPatch, arguments: list[str], change: str | None, line: str
) -> None:
    if change == "detached":
        project.run("git", "switch", "--quiet", "--detach")
    elif change == "linked":
        Path("data/raw").rename("elsewhere")
        Path("data/raw").symlink_to("../elsewhere")
        project.run("git", "add", "-A")
        project.run("git", "commit", "-qm", "elsewhere")
    elif change:
        with open(change, "a", encoding="utf-8") as file:
            file.write("\n")
    before = [project.run("git", *of).stdout for of in (["status", "--porcelain"], ["rev-parse", "HEAD"])]
    with pytest.raises(UserError, match=line):
        begin(monkeypatch, *arguments)
    after = [project.run("git", *of).stdout for of in (["status", "--porcelain"], ["rev-parse", "HEAD"])]
    assert after == before


def test_outputs_of_the_demo_go_and_what_no_lock_knows_or_was_paid_for_stays(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.run("dvc", "repro", "--single-item", "generate", "merge")  # changes dvc.lock and metrics
    Path("data/valid.jsonl").unlink()
    Path("data/valid.jsonl").write_text("written by hand\n", encoding="utf-8")
    lock = read_yaml(Path("dvc.lock"))  # as of a run that has not come to `tokenize`
    lock["stages"] = {name: lock["stages"][name] for name in ("prepare_base", "generate", "merge")}
    Path("dvc.lock").write_text(yaml.safe_dump(lock), encoding="utf-8")
    Path("outputs/adapter").mkdir(parents=True)
    Path("outputs/adapter/mine").touch()
    begin(monkeypatch, "--recipe", "tiny-base", "--name", "N")
    kept = ["data/replies.jsonl", "data/valid.jsonl", "outputs/adapter/mine"]
    assert [name for name in ["data/train.jsonl", "data/train_merged.jsonl", *kept] if Path(name).exists()] == kept
    assert project.run("git", "status", "--porcelain").stdout == ""


def test_on_a_terminal_the_recipe_and_the_name_are_asked_for(project: Project) -> None:
    terminal = Terminal(project.folder, sys.executable, "-m", "tools.start")
    assert "llama-3.1-8b   Llama 3.1 8B Instruct, for GPUs of 8 GB" in terminal.shows("Which one? ")
    terminal.type("tiny-base\n")
    terminal.shows(f"The project's name [{project.folder.name}]: ")
    terminal.type("\n")
    terminal.shows("make check shows what is missing")
    assert terminal.ends() == 0
    assert Path("README.md").read_text(encoding="utf-8").startswith(f"# {project.folder.name}\n")


def test_the_tests_still_run_on_the_demo_in_a_project_that_was_started(started: Project) -> None:
    shutil.rmtree("tests/__pycache__", ignore_errors=True)
    done = started.run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_curate.py", check=False
    )
    assert done.returncode == 0, done.stdout
