"""Register the artifacts of dvc.yaml in this commit as a version, if the gate passes.

    python -m tools.release VERSION

VERSION is a semantic version, higher than the last one. Everything must be committed, up to date and in DVC's remote,
and the gate must pass against the last version. Makes one GTO tag per artifact, with `dvc metrics diff` against the
last version as message; or, after an error, no tag at all. Pushes nothing.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import gto.api
from gto.exceptions import GTOException
from semver import Version

from pipeline.common.errors import UserError
from pipeline.common.parameters.params_yaml import read_yaml
from pipeline.common.paths import EXAM_METRICS, GENERAL_METRICS, GGUF_METRICS
from tools.dvc_command import dvc

METRICS = [EXAM_METRICS, GENERAL_METRICS, GGUF_METRICS]  # the metrics that the message of a tag compares


def main() -> None:
    version, artifacts = " ".join(sys.argv[1:]), list(read_yaml(Path("dvc.yaml"))["artifacts"])
    if "origin" in git("remote").split():
        git("fetch", "--quiet", "--tags", "origin")  # another clone may have registered a version
    versions, withdrawn = registered(artifacts)
    require_higher(version, versions)
    require_shared()
    last = max(versions.keys() - withdrawn, key=versions.__getitem__, default=None)
    if subprocess.run([sys.executable, "-m", "tools.gate", *([last] if last else [])]).returncode:
        raise UserError("release: the gate failed, see above; nothing is registered")
    tags = register(artifacts, f"v{version}", changelog(last) if last else "The first version.")
    print(f"registered {', '.join(tags)}: git push origin {' '.join(tags)}")


def registered(artifacts: list[str]) -> tuple[dict[str, Version], set[str]]:
    """{tag: version} of tags such as adapter@v1.0.0; and the tags that `gto deprecate` withdrew.

    GTO withdraws a tag by another tag, such as adapter@v1.0.0!
    """
    tags = git("tag", "--list", *(f"{artifact}@v*" for artifact in artifacts)).split()
    numbers = {tag: tag.partition("@v")[2] for tag in tags}
    versions = {tag: Version.parse(number) for tag, number in numbers.items() if Version.is_valid(number)}
    return versions, {tag.partition("!")[0] for tag in tags if "!" in tag}


def require_higher(version: str, versions: dict[str, Version]) -> None:
    if not Version.is_valid(version):
        raise UserError(f"VERSION is {version!r}: set it to a semantic version such as 1.2.0")
    highest = max(versions, key=versions.__getitem__, default=None)
    if highest and Version.parse(version) <= versions[highest]:
        raise UserError(f"VERSION is {version}, but {highest} is registered: choose a higher version")


def require_shared() -> None:
    """Raises UserError unless everything is committed, up to date, and in the remote."""
    if git("status", "--porcelain"):
        raise UserError("release: uncommitted changes: git commit or git stash them")
    if stale := json.loads(dvc("status", "--json")):
        raise UserError(f"release: dvc status names {', '.join(stale)}: dvc repro or dvc pull, and commit")
    if absent := json.loads(dvc("data", "status", "--not-in-remote", "--granular", "--json")).get("not_in_remote"):
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise UserError(f"release: not in the remote: {', '.join(sorted(absent)[:5])}{more}: dvc push")


def changelog(last: str) -> str:
    """The metrics that changed since the last version, as a Markdown table."""
    revisions = [last, git("rev-parse", "--short", "HEAD")]
    return dvc("metrics", "diff", "--md", *revisions, "--targets", *map(str, METRICS)).strip()


def register(artifacts: list[str], version: str, message: str) -> list[str]:
    """Make all tags or none: they are made in a clone, and fetched from there in one transaction.

    Raises:
        UserError: GTO or git refuses a tag.
    """
    author, _, email = git("var", "GIT_COMMITTER_IDENT").rpartition(">")[0].partition(" <")
    commit = git("rev-parse", "HEAD")
    with TemporaryDirectory() as scratch:
        git("clone", "--quiet", "--shared", "--no-checkout", ".", scratch)
        try:
            for artifact in artifacts:
                gto.api.register(scratch, artifact, commit, version, message, author=author, author_email=email)
        except GTOException as error:
            raise UserError(f"release: {error}; nothing is registered") from None
        tags = [f"{artifact}@{version}" for artifact in artifacts]
        git("fetch", "--quiet", "--atomic", scratch, *(f"refs/tags/{tag}:refs/tags/{tag}" for tag in tags))
    return tags


def git(*arguments: str) -> str:
    """What git prints. Raises UserError if the command fails; git prints its own error."""
    done = subprocess.run(["git", *arguments], stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if done.returncode:
        raise UserError("release: stopped, see above; nothing is registered")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
