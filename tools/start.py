"""Start your own project: move the demo aside, write skeletons of your files, and commit both.

    python -m tools.start [--recipe RECIPE] [--name NAME]

Asks for the recipe and the name if they are not given. The demo's files, metrics and dvc.lock move to tests/demo, where
the tests use them; its README.md becomes PIPELINE.md. A file of data/ that was changed since the demo stays.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline.common.errors import UserError
from pipeline.common.outputs import remove
from pipeline.common.parameters.params_yaml import check, read_yaml
from pipeline.common.paths import GENERAL_EXAM
from pipeline.model.base import file_hash
from tools.dvc_command import dvc
from tools.use import PARAMETERS, recipe, recipes, use

DEMO = Path("tests/demo")
DEMO_FILES = Path("data/demo.sha256")  # output of sha256sum; it moves aside too, so that a second start stops
SKELETON = Path(__file__).parent / "skeleton"
LOCK = Path("dvc.lock")
MADE = (str(LOCK), "metrics")  # in git, and made by the stages
README, PIPELINE = Path("README.md"), Path("PIPELINE.md")
TITLE = "# qlora-dvc\n"  # the first line of the template's README
BUILT_IN = "tiny-base"  # the recipe of the base for which the demo's general exam was written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="", help="of recipes/")
    parser.add_argument("--name", default="", help="of the project")
    options = parser.parse_args()
    require_startable()
    values = recipe(options.recipe or asked("RECIPE", offer()))
    name = (options.name or asked("NAME", f"The project's name [{Path.cwd().name}]: ") or Path.cwd().name).strip()
    if not name or not name.isprintable():
        raise UserError(f"NAME is {name!r}: set it to a name on one line")

    remove_outputs()
    demo, own = demo_files()
    for path in [*demo, DEMO_FILES, *made()]:
        move(path, DEMO / path)
    copy(Path("params.yaml"), DEMO / "params.yaml")
    if README.exists() and README.read_text(encoding="utf-8").startswith(TITLE) and not PIPELINE.exists():
        move(README, PIPELINE)
    written = write_skeletons(values, name)
    use(values)
    commit(name, written)
    print_next_steps(written, own)


def require_startable() -> None:
    """Raises UserError if the project was started already, or git cannot restore or commit the files."""
    if not DEMO_FILES.exists() or DEMO.exists():
        raise UserError(f"this project was started already, and the demo is in {DEMO}: nothing was changed")
    if git("rev-parse", "--verify", "--quiet", "HEAD").returncode:
        raise UserError(
            "this folder is not a git repository: git init && git add -A && git commit -m Template, then run again"
        )
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in MADE)).stdout
    if changed:
        raise UserError(f"{changed.splitlines()[0][3:]} has an uncommitted change: commit or undo it")
    if git("symbolic-ref", "--quiet", "HEAD").returncode:
        raise UserError("git is not on a branch, so the commit could be lost: git switch -c main")
    if link := next((path for path in linked() if path.is_symlink()), None):
        raise UserError(f"{link} is a link, and the demo's files must be moved: replace the link by the files")
    if git("var", "GIT_COMMITTER_IDENT").returncode:
        raise UserError(
            "git has no name and address for commits: git config user.name NAME && git config user.email ADDRESS"
        )
    check(PARAMETERS)


def linked() -> Iterator[Path]:
    """The demo's files and their folders. Each may be a link."""
    for line in DEMO_FILES.read_text(encoding="utf-8").splitlines():
        path = Path(line.partition("  ")[2])
        yield from (path, *path.parents)


def offer() -> str:
    lines = [f"  {name:14} {path.read_text(encoding='utf-8').splitlines()[0][2:]}" for name, path in recipes().items()]
    return "\n".join(["Recipes:", *lines, "Which one? "])


def asked(variable: str, question: str) -> str:
    if not sys.stdin.isatty():
        raise UserError(
            f"{variable} is missing, and there is no terminal to ask for it: make start RECIPE=... NAME=..."
        )
    try:
        return input(question).strip()
    except EOFError:
        raise UserError(f"{variable} is missing: nothing was changed") from None


def remove_outputs() -> None:
    """Remove the outputs of the demo that equal dvc.lock, except persistent outputs."""
    if not LOCK.exists():
        return
    try:
        status = json.loads(dvc("data", "status", "--json"))
    except UserError as error:
        raise UserError(f"dvc data status fails: {error}: git checkout {LOCK}, then run again") from None
    changed = {path.rstrip("/") for path in status.get("uncommitted", {}).get("modified", [])}
    locked = {out["path"] for stage in read_yaml(LOCK)["stages"].values() for out in stage.get("outs", [])}
    for stage in read_yaml(Path("dvc.yaml"))["stages"].values():
        for out in stage.get("outs", []):
            path, settings = (out, {}) if isinstance(out, str) else next(iter(out.items()))
            if path in locked - changed and not settings.get("persist"):
                remove(Path(path))


def demo_files() -> tuple[list[Path], list[Path]]:
    """The unchanged files of the demo, and the files that the user changed."""
    demo: list[Path] = []
    own: list[Path] = []
    for line in DEMO_FILES.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if Path(name).exists():
            (demo if file_hash(Path(name)) == digest else own).append(Path(name))
    return demo, own


def made() -> list[Path]:
    return [Path(name) for name in git("ls-files", "--", *MADE).stdout.splitlines() if Path(name).exists()]


def move(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    path.rename(to)


def copy(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(path.read_bytes())


def write_skeletons(values: Path, name: str) -> list[Path]:
    """Copy the files of tools/skeleton that do not exist yet, for the recipe `values`. Return their paths."""
    written = []
    for skeleton in sorted(path for path in SKELETON.rglob("*") if path.is_file()):
        path = skeleton.relative_to(SKELETON)
        if path.exists():
            continue
        text = skeleton.read_text(encoding="utf-8")
        if path == README:
            text = text.format(name=name, model=read_yaml(values)["base"]["model"])
        if path == GENERAL_EXAM:
            of_built_in = values.stem == BUILT_IN and (DEMO / GENERAL_EXAM).exists()
            text += (DEMO / GENERAL_EXAM if of_built_in else Path("recipes/general.jsonl")).read_text(encoding="utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        written.append(path)
    return written


def commit(name: str, written: list[Path]) -> None:
    paths = [*map(str, written), str(DEMO), "params.yaml"]
    if PIPELINE.exists():
        paths.append(str(PIPELINE))
    for command in (["add", "--", *paths], ["commit", "--quiet", "--message", f"Start {name}", "--", "."]):
        done = git(*command)
        if done.returncode:
            said = " ".join(f"{done.stderr} {done.stdout}".split()) or "no message"
            raise UserError(f"git {command[0]} failed ({said}): everything else is done: git add -A && git commit")


def print_next_steps(written: list[Path], own: list[Path]) -> None:
    for path in written:
        if path.name != ".gitkeep":
            print(f"{path}: fill in your data")
    for path in own:
        print(f"{path}: you changed this file, so it stays as it is")
    manual = f", its README is {PIPELINE}" if PIPELINE.exists() else ""
    print(f"The demo is in {DEMO}{manual}; all changes are one commit.")
    print("Next: make check shows what is missing; git remote set-url origin ADDRESS connects your own git repository.")


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], capture_output=True, text=True)


if __name__ == "__main__":
    main()
