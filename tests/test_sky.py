"""sky.yaml: SkyPilot reads it, and its shell blocks, run on this machine, bring experiments back."""

import json
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
import yaml
from conftest import ROOT, Project, environment
from dulwich.repo import Repo
from dulwich.server import DictBackend
from dulwich.web import make_wsgi_chain

TASK: dict[str, Any] = yaml.safe_load((ROOT / "sky.yaml").read_text(encoding="utf-8"))
SKY = Path(sys.prefix, "sky/bin/python")  # make test installs it
PARSE = """
import json, sys, sky
task = sky.Task.from_yaml_config(json.load(sys.stdin), env_overrides=[("REPOSITORY", "https://example.org/a.git")])
print(json.dumps([accelerator for choice in task.resources for accelerator in choice.accelerators]))
"""
PIPELINE = """
stages:
  train:
    cmd: mkdir -p outputs && cp params.yaml outputs/adapter && echo trained
    params: [lora.r]
    outs: [outputs/adapter]
"""
MAKEFILE = """
setup .venv/.remotes:
\tmkdir -p .venv/bin && touch .venv/bin/activate
"""


def parsed(task: dict[str, Any], home: Path) -> subprocess.CompletedProcess[str]:
    own = environment() | {"HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    return subprocess.run([SKY, "-c", PARSE], input=json.dumps(task), env=own, capture_output=True, text=True)


def test_skypilot_reads_the_task_and_would_refuse_a_wrong_one(tmp_path: Path) -> None:
    read = parsed(TASK, tmp_path)
    assert read.returncode == 0, read.stderr
    assert set(json.loads(read.stdout)) == set(TASK["resources"]["accelerators"])
    wrong = parsed(TASK | {"resources": {"accelerator": "L4:1"}}, tmp_path)
    assert wrong.returncode != 0 and "did you mean 'accelerators'" in wrong.stderr


TOKEN = "a-token"


class Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[str]:
    """The URL of a repository that wants a token, of a pipeline that takes no time, with a folder as its remote."""
    first = Project(tmp_path / "first")
    first.folder.mkdir()
    for command in (["git", "init", "-qb", "main"], ["dvc", "init", "-q"]):
        first.run(*command)
    for name, text in [
        ("dvc.yaml", PIPELINE),
        ("Makefile", MAKEFILE),
        ("params.yaml", "lora: {r: 1}\n"),
        (".gitignore", "/outputs\n/.venv\n"),
    ]:
        (first.folder / name).write_text(text, encoding="utf-8")
    first.run("dvc", "remote", "add", "-d", "storage", str(tmp_path / "storage"))
    first.run("git", "add", "-A")
    first.run("git", "commit", "-qm", "first")
    first.run("git", "clone", "-q", "--bare", ".", str(tmp_path / "origin"))
    repositories: dict[str, Any] = {"/": Repo(str(tmp_path / "origin"))}
    git = make_wsgi_chain(DictBackend(repositories))
    wanted = f"Basic {b64encode(f'x-access-token:{TOKEN}'.encode()).decode()}"

    def guarded(environ: dict[str, Any], start: Any) -> Any:
        if environ.get("HTTP_AUTHORIZATION") == wanted:
            return git(environ, start)
        start("401 Unauthorized", [("WWW-Authenticate", "Basic realm=git")])
        return [b""]

    with make_server("127.0.0.1", 0, guarded, handler_class=Quiet) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_what_the_other_machine_trained_comes_back_as_experiments_even_if_the_command_fails(
    origin: str, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    usual = TASK["envs"]["RUN"]
    run = f"{usual} --name three -S lora.r=3 && {usual} --name four -S lora.r=4 && false"
    envs = {"REPOSITORY": origin, "REVISION": "main", "RUN": run} | TASK["secrets"] | {"GIT_TOKEN": TOKEN}
    own = {name: value for name, value in environment().items() if not name.startswith("GIT_")}
    printed = []
    for block, code in [("setup", 0), ("run", 1), ("setup", 0)]:  # again, as on a machine that it has already
        done = subprocess.run(
            ["bash", "-c", TASK[block]],
            cwd=there,
            env=own | envs | {"HOME": str(there)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        printed.append(done.stdout)
    assert "trained" in printed[1]

    here = Project(tmp_path / "here")
    subprocess.run(["git", "clone", "-q", tmp_path / "origin", here.folder], check=True)
    here.run("dvc", "exp", "pull", "origin", "--rev", "HEAD")
    here.run("dvc", "exp", "apply", "four")
    assert "r: 4" in (here.folder / "outputs/adapter").read_text(encoding="utf-8")
    assert "up to date" in here.run("dvc", "repro").stdout
    assert not [file for file in there.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
