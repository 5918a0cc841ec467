"""Fixtures: real repositories in which the tests run the real pipeline."""

import atexit
import fcntl
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import chdir, contextmanager
from functools import cache
from pathlib import Path

import psutil
import pytest
import yaml

import stages  # noqa: F401  # sets how OpenMP waits, before any test imports torch
from pipeline.common.outputs import write_json
from pipeline.common.parameters.params_yaml import read_yaml
from pipeline.common.paths import BASE, CHAT_TEMPLATE, LICENSE
from pipeline.export.llama_cpp import run_script

DEMO = Path(__file__).parent / "demo"  # make start moves the demo here


def with_demo(project: Path) -> Path:
    """Return the repository. If `make start` has moved the demo, return a copy with the demo in its original place."""
    if not DEMO.exists():
        return project
    copy = temporary_folder()
    copy_files(project, copy)
    shutil.rmtree(copy / "data")
    shutil.copytree(copy / DEMO.relative_to(project), copy, dirs_exist_ok=True)
    shutil.copy(project / "data/prompts.txt", copy / "data")  # no file of the demo
    shutil.rmtree(copy / DEMO.relative_to(project))
    if (copy / "PIPELINE.md").exists():
        (copy / "PIPELINE.md").replace(copy / "README.md")
    subprocess.run(["git", "init", "--quiet"], cwd=copy, env=environment(), check=True)
    return copy


def temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return folder


def copy_files(repository: Path, folder: Path) -> None:
    """Copy all files that git tracks or does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (repository / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repository / name, folder / name)


def environment() -> dict[str, str]:
    """Return the environment for commands in a clone, with a name and address for commits.

    It lacks the variables by which a git hook or a running DVC stage would point a clone to this repository.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "DVC_"))}
    identity = {
        f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    return own | identity


ROOT = with_demo(Path(__file__).parent.parent)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a test that would be skipped fails")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.config.getoption("--no-skips"):
        report.outcome = "failed"
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)  # print after everything else that pytest prints
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    yield
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    skipped = Counter(
        (Path(report.fspath).name, report.longrepr[2].removeprefix("Skipped: "))
        for report in (reporter.getreports("skipped") if reporter else [])  # xdist's workers have no reporter
    )
    if skipped:
        named = "; ".join(f"{number} of {file} ({why})" for (file, why), number in skipped.items())
        reporter.write_line(f"skipped tests: {named}")


class Project:
    """A clone of this repository with the working tree committed and its own DVC cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env: dict[str, str] = {}

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, env=environment() | self.env)
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def kill(self, *command: str, step: int, victim: str = "all", how: int = signal.SIGKILL) -> str:
        """Start a command that trains; at a complete checkpoint of `step` or later, send it the signal `how`.

        The signal goes to all processes of the command, or only to the first or the last. Return the output, when all
        processes have ended.
        """
        printed = self.folder.with_name(f"{self.folder.name}.log")
        with open(printed, "w", encoding="utf-8") as log:
            own = environment() | self.env
            first = psutil.Popen(
                command,
                cwd=self.folder,
                env=own,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # A background job of a shell ignores SIGINT, and the processes that it starts inherit this.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            while not any(int(path.name[11:]) >= step for path in self.checkpoints()):
                assert first.poll() is None, printed.read_text(encoding="utf-8")
                time.sleep(0.01)
            children = first.children(recursive=True)
            if victim == "all":
                os.killpg(first.pid, how)
            else:
                {"first": first, "last": children[-1]}[victim].send_signal(how)
            first.wait()
            _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, f"{command} was killed, but its children still run"
        return printed.read_text(encoding="utf-8")

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, sorted by step."""
        sealed = self.folder.glob(".dvc/tmp/checkpoints/*/checkpoint-*/checksums.json")
        return sorted((path.parent for path in sealed), key=lambda path: int(path.name[11:]))

    def set(self, **values: object) -> None:
        """Set parameters; two underscores in a name mean a dot: `set(lora__r=2)` sets lora.r."""
        path = self.folder / "params.yaml"
        parameters = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name, value in values.items():
            *sections, key = name.split("__")
            owner = parameters[sections[0]] if sections else parameters
            owner[key] = value
        path.write_text(yaml.safe_dump(parameters, allow_unicode=True), encoding="utf-8")


def clone(folder: Path) -> Project:
    subprocess.run(["cp", "-R", f"{first_clone()}/.", folder], check=True)
    return Project(folder)


@cache
def first_clone() -> Path:
    """A clone that no test changes. To copy this clone takes a tenth of the time that git takes to make one."""
    folder = temporary_folder()
    copy_files(ROOT, folder)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "clone"]):
        Project(folder).run("git", *command)
    return folder


def with_exams(folder: Path, rows: str | Path) -> Project:
    """A project with nothing but the exams, the parameters, and the empty folder `rows`."""
    exams = ("data/questions.jsonl", "data/general.jsonl", "data/preferences_exam.jsonl")
    for name in ("dvc.yaml", "params.yaml", *exams):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / rows).mkdir()
    return Project(folder)


class Terminal:
    """A program that runs in a terminal, and what it shows there."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.screen, program_side = pty.openpty()
        self.program = subprocess.Popen(
            command,
            cwd=folder,
            env=environment() | {"TERM": "dumb"},  # no colours, no escape sequences
            stdin=program_side,
            stdout=program_side,
            stderr=program_side,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C sends a signal
        )
        os.close(program_side)

    def shows(self, expected: str) -> str:
        """Wait until the terminal shows `expected`; return everything that it showed up to then."""
        shown = b""
        while expected not in shown.decode(errors="ignore"):
            assert select.select([self.screen], [], [], 60)[0], f"no {expected!r} in {shown!r}"
            shown += os.read(self.screen, 1)
        return shown.decode()

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def ends(self) -> int:
        code = self.program.wait(timeout=30)
        os.close(self.screen)
        return code


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[str]:
    """Run tools/serve.py and yield its URL; then check that Ctrl-C ends it and all its processes."""
    with socket.create_server(("127.0.0.1", 0)) as any_free:
        port = str(any_free.getsockname()[1])
    command = [sys.executable, "-m", "tools.serve", "--port", port, *arguments]
    server = psutil.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert port in server.stdout.readline()
    children = server.children(recursive=True)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=5) == 0
        _, alive = psutil.wait_procs(children, timeout=1)
        assert children and not alive


@pytest.fixture(scope="session")
def base_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in base as a GGUF file in f16."""
    file = tmp_path_factory.mktemp("gguf") / "base-f16.gguf"
    run_script("convert.py", "hf", ROOT / "models/tiny-base", "--outtype", "f16", "--outfile", file)
    return file


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A clone in which nothing has run yet. It is the working directory."""
    monkeypatch.chdir(tmp_path)
    return without_rows(clone(tmp_path))


def without_rows(project: Project) -> Project:
    """Write what the stages replay and corpus write without rows."""
    for name in ("replay", "corpus_train", "corpus_valid"):
        (project.folder / f"data/{name}.jsonl").write_text("\n", encoding="utf-8")
    return project


def describe_base() -> None:
    """Write what prepare_base does of a local base, without trying to convert the base, which takes seconds."""
    from pipeline.model.base import chat_template, describe
    from pipeline.model.license import license_of

    model = read_yaml(Path("params.yaml"))["base"]["model"]
    write_json(BASE, describe(model, None))
    CHAT_TEMPLATE.write_text(chat_template(Path(model)) or "", encoding="utf-8")
    write_json(LICENSE, license_of(Path(model)))


@pytest.fixture
def tokenized(project: Project, first_tokenized: Path) -> Project:
    """A clone with 107 tokenized training rows: with 16 rows per step, seven steps per epoch, the last one smaller."""
    subprocess.run(["cp", "-R", f"{first_tokenized}/.", project.folder], check=True)
    return project


@pytest.fixture(scope="session")
def first_tokenized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tokenized` copies, which takes a tenth of the time of the stages."""
    from stages import generate, merge, tokenize  # imports Transformers, which few test files need

    folder = tmp_path_factory.mktemp("tokenized")
    with chdir(folder):
        without_rows(clone(folder))
        describe_base()
        generate.main()
        merge.main()
        rows = Path("data/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        Path("data/valid.jsonl").write_text("".join(rows[::20]), encoding="utf-8")
        Path("data/train_merged.jsonl").write_text("".join(rows[1::3][:107]), encoding="utf-8")
        tokenize.main()
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Project:
    """A clone in which `dvc repro` has run with the default parameters. Tests that change the clone restore it.

    `make test` runs all tests of a file in one of two workers, and each worker makes its own clone. Therefore use this
    fixture only in test_end_to_end.py.
    """
    project = clone(tmp_path_factory.mktemp("finished"))
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\nthe complete pipeline, in a clone (minutes):", flush=True)
        subprocess.run(["dvc", "repro"], cwd=project.folder, env=environment(), check=True)
    return project
