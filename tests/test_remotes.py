"""Remotes on real servers of this machine: OpenSSH, S3 (moto), HTTP and WebDAV.

The first machine has made an adapter, the second one clones its repository. Each has a working directory, a cache and a
home folder of its own.
"""

import getpass
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any

import boto3
import programs
import psutil
import pytest
from conftest import ROOT, Project, environment

FILES, SIZE = 40, 2**20  # of the adapter: enough that a kill comes in the middle
BUCKET = "bucket"


class Server:
    """One that a remote is on, at `url`; killed, it can be started again on the same port."""

    url: str
    secret: str  # of the credentials

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, folder / "store"
        self.store.mkdir(parents=True)
        with socket.create_server(("127.0.0.1", 0)) as any_free:
            self.port = any_free.getsockname()[1]

    def run(self, *command: str | Path, **variables: str) -> None:
        with open(self.folder / "log", "a", encoding="utf-8") as log:
            self.process = psutil.Popen(command, env=environment() | variables, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.05)

    def answers(self) -> bool:
        with socket.socket() as probe:
            return not probe.connect_ex(("127.0.0.1", self.port))

    def kill(self) -> None:
        """With the processes that serve its connections."""
        for process in [*self.process.children(recursive=True), self.process]:
            process.kill()
        self.process.wait()

    def names(self) -> set[str]:
        """The hashes of the objects that are there; a folder's ends in .dir."""
        return set(contents(self.store))

    def read(self, name: str) -> bytes:
        return contents(self.store)[name].read_bytes()

    def write(self, name: str, content: bytes) -> None:
        contents(self.store)[name].write_bytes(content)

    def delete(self, name: str) -> None:
        contents(self.store)[name].unlink()


class OpenSSH(Server):
    def __init__(self, folder: Path) -> None:
        if not programs.sshd():
            pytest.skip("no OpenSSH server: apt-get install openssh-server")
        super().__init__(folder)
        self.secret = token_hex()
        self.url = f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}{self.store}"
        for name, passphrase in {"host": "", "right": self.secret, "wrong": self.secret}.items():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", folder / name], check=True)
        settings = {
            "ListenAddress": f"127.0.0.1:{self.port}",
            "HostKey": folder / "host",
            "AuthorizedKeysFile": folder / "right.pub",
            "StrictModes": "no",  # pytest's folder is in one that everybody may write to
            "PidFile": "none",
            "Subsystem": "sftp internal-sftp",
        }
        (folder / "config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))

    def start(self) -> None:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd demands it of root; systemd would make it
        self.run(str(programs.sshd()), "-D", "-e", "-f", self.folder / "config")

    def admit(self, machine: Project, key: str = "right") -> None:
        """Give the machine the credentials."""
        configure(machine, keyfile=str(self.folder / key), passphrase=self.secret)

    def mislead(self, machine: Project) -> None:
        """Give it wrong ones."""
        self.admit(machine, "wrong")


class S3(Server):
    """It keeps everything in memory: back again, it has nothing, and other keys."""

    url = f"s3://{BUCKET}/store"

    def start(self) -> None:
        self.run("moto_server", "--port", str(self.port), INITIAL_NO_AUTH_ACTION_COUNT="3")  # then it asks for keys
        self.endpoint = f"http://127.0.0.1:{self.port}"
        everything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
        iam = self.client("iam", "any", "any")
        iam.create_user(UserName="user")
        iam.put_user_policy(UserName="user", PolicyName="everything", PolicyDocument=json.dumps(everything))
        key = iam.create_access_key(UserName="user")["AccessKey"]
        self.key, self.secret = key["AccessKeyId"], key["SecretAccessKey"]
        self.s3 = self.client("s3", self.key, self.secret)
        self.s3.create_bucket(Bucket=BUCKET)

    def client(self, service: str, key: str, secret: str) -> Any:
        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=key,
            aws_secret_access_key=secret,
        )

    def admit(self, machine: Project) -> None:
        configure(machine, endpointurl=self.endpoint)
        machine.env |= {"AWS_ACCESS_KEY_ID": self.key, "AWS_SECRET_ACCESS_KEY": self.secret, "AWS_MAX_ATTEMPTS": "1"}

    def mislead(self, machine: Project) -> None:
        self.admit(machine)
        machine.env["AWS_SECRET_ACCESS_KEY"] = "wrong"

    def names(self) -> set[str]:
        listed = self.s3.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return {"".join(each["Key"].split("/")[-2:]) for each in listed}

    def read(self, name: str) -> bytes:
        return self.s3.get_object(Bucket=BUCKET, Key=path(name))["Body"].read()

    def write(self, name: str, content: bytes) -> None:
        self.s3.put_object(Bucket=BUCKET, Key=path(name), Body=content)

    def delete(self, name: str) -> None:
        self.s3.delete_object(Bucket=BUCKET, Key=path(name))


Guarded = OpenSSH | S3


def path(name: str) -> str:
    return f"store/files/md5/{name[:2]}/{name[2:]}"


def configure(machine: Project, **settings: str) -> None:
    """As `dvc remote modify --local storage` does, a second faster."""
    lines = [f"    {name} = {value}\n" for name, value in settings.items()]
    (machine.folder / ".dvc/config.local").write_text("".join(["['remote \"storage\"']\n", *lines]))


def contents(folder: Path) -> dict[str, Path]:
    """The objects of a cache or of a remote in a folder, by their hashes."""
    files = folder.glob("files/md5/??/*")
    return {file.parent.name + file.name: file for file in files if not file.name.startswith(".")}


def cache(machine: Project) -> dict[str, Path]:
    return contents(machine.folder / ".dvc/cache")


def is_complete(name: str, content: bytes) -> bool:
    return hashlib.md5(content).hexdigest() == name.removesuffix(".dir")


def adapter(machine: Project) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (machine.folder / "adapter").iterdir()}


def add_remote(machine: Project, url: str) -> None:
    machine.run("make", "--old-file", ".venv/.remotes", "remote", f"URL={url}")  # which installs


def second_machine(first: Project) -> Project:
    first.run("git", "commit", "-qam", "the remote")
    second = Project(first.folder.with_name("second"))
    first.run("git", "clone", "-q", ".", str(second.folder))
    second.env = {"HOME": str(second.folder)}
    return second


def cut(server: Server, machine: Project, *command: str, moved: Callable[[], int]) -> str:
    """What the command says when the server dies with some of the objects `moved`, but not all."""
    transfer = subprocess.Popen(
        [*command, "--jobs", "1"],
        cwd=machine.folder,
        env=environment() | machine.env,
        stderr=subprocess.PIPE,
        text=True,
    )
    while (count := moved()) < 2:
        assert transfer.poll() is None
        time.sleep(0.01)
    server.kill()
    _, said = transfer.communicate(timeout=60)
    assert count < FILES and transfer.returncode == 1
    return said


@pytest.fixture
def first(tmp_path: Path) -> Project:
    """With the project's DVC settings and Makefile, and no pipeline, which only takes time."""
    machine = Project(tmp_path / "first")
    machine.env = {"HOME": str(tmp_path / "first")}
    for name in ("Makefile", ".dvc/config", ".dvc/.gitignore"):
        (machine.folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, machine.folder / name)
    machine.run("git", "init", "-q")
    (machine.folder / "adapter").mkdir()
    for number in range(FILES):
        (machine.folder / f"adapter/{number}.safetensors").write_bytes(os.urandom(SIZE))
    machine.run("dvc", "add", "adapter")
    machine.run("git", "add", "-A")
    return machine


@pytest.fixture(params=[OpenSSH, S3])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Guarded]:
    server: Guarded = request.param(tmp_path / "server")
    server.start()
    yield server
    server.kill()


def test_what_is_pushed_with_the_right_credentials_is_pulled_on_another_machine(
    server: Guarded, first: Project
) -> None:
    add_remote(first, server.url)
    server.mislead(first)
    refused = first.run("dvc", "push", "adapter", check=False)
    assert refused.returncode != 0 and "Traceback" not in refused.stderr
    [line] = [line for line in refused.stderr.splitlines() if line.startswith("ERROR")]
    assert "Permission denied for user" in line or "Forbidden" in line
    assert server.names() == set()

    server.admit(first)
    first.run("dvc", "push", "adapter")
    assert all(is_complete(name, server.read(name)) for name in server.names())
    second = second_machine(first)
    server.admit(second)
    second.run("dvc", "pull", "adapter")
    assert adapter(second) == adapter(first)
    for machine in (first, second):
        machine.run("git", "add", "-A")
        assert machine.run("git", "grep", "--cached", "--quiet", server.secret, check=False).returncode == 1


def test_a_server_that_dies_in_the_middle_costs_no_more_than_a_repetition(server: Guarded, first: Project) -> None:
    add_remote(first, server.url)
    server.admit(first)
    said = cut(server, first, "dvc", "push", "adapter", moved=lambda: len(server.names()))
    assert "files failed to upload" in said
    server.start()
    server.admit(first)
    assert len(server.names()) < FILES and all(is_complete(name, server.read(name)) for name in server.names())
    first.run("dvc", "push", "adapter")
    assert server.names() == set(cache(first)) and all(is_complete(name, server.read(name)) for name in server.names())

    second = second_machine(first)
    server.admit(second)
    said = cut(server, second, "dvc", "pull", "adapter", moved=lambda: len(cache(second)))
    assert "files failed to download" in said
    assert len(cache(second)) < FILES and all(
        is_complete(name, file.read_bytes()) for name, file in cache(second).items()
    )
    server.start()
    for machine in (first, second):
        server.admit(machine)
    first.run("dvc", "push", "adapter")  # S3 has forgotten all
    second.run("dvc", "pull", "adapter")
    assert adapter(second) == adapter(first)


def test_a_damaged_object_is_named_and_not_taken_for_what_it_should_be(server: Guarded, first: Project) -> None:
    add_remote(first, server.url)
    server.admit(first)
    shutil.copytree(first.folder / "adapter", first.folder / "trained")  # files may be of several outputs
    (first.folder / "trained/more").touch()
    first.run("dvc", "add", "trained")
    first.run("git", "add", "-A")
    first.run("dvc", "push")
    listings = {name for name in server.names() if name.endswith(".dir")}
    damaged = min(name for name, file in cache(first).items() if file.stat().st_size == SIZE)
    server.write(damaged, os.urandom(SIZE))
    second = second_machine(first)
    server.admit(second)
    refused = second.run("dvc", "pull", "--verbose", "adapter", check=False)
    assert refused.returncode != 0 and "Checkout failed for following targets:\nadapter\n" in refused.stderr
    [line] = [line for line in refused.stdout.splitlines() if "corrupted cache file" in line]
    assert f"{damaged[:2]}/{damaged[2:]}" in line and damaged not in cache(second)
    for name in {damaged} | listings:  # where a folder's listing is, DVC takes all its files to be
        server.delete(name)
    first.run("dvc", "push")
    second.run("dvc", "pull", "adapter")
    assert adapter(second) == adapter(first)


@pytest.mark.parametrize(
    ("protocol", "command"),
    [
        ("http", [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", "{store}", "{port}"]),
        ("webdav", ["wsgidav", "--auth", "anonymous", "--host", "127.0.0.1", "--root", "{store}", "--port", "{port}"]),
    ],
    ids=["HTTP", "WebDAV"],
)
def test_a_folder_that_was_pushed_to_is_read_over_the_web(
    first: Project, tmp_path: Path, protocol: str, command: list[str]
) -> None:
    server = Server(tmp_path / "server")
    add_remote(first, str(server.store))
    first.run("dvc", "push", "adapter")
    second = second_machine(first)
    configure(second, url=f"{protocol}://127.0.0.1:{server.port}")
    server.run(*(part.format(port=server.port, store=server.store) for part in command))
    try:
        second.run("dvc", "pull", "adapter")
    finally:
        server.kill()
    assert adapter(second) == adapter(first)


def test_an_output_is_a_link_that_cannot_be_written_through_into_the_cache(first: Project) -> None:
    file = first.folder / "adapter/0.safetensors"
    [cached] = [each for each in cache(first).values() if each.samefile(file)]
    assert not file.stat().st_mode & 0o222
    first.run("dvc", "unprotect", "adapter")
    file.write_bytes(b"edited")
    assert cached.stat().st_size == SIZE and "modified" in first.run("dvc", "status", "adapter.dvc").stdout
