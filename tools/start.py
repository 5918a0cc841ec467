"""Begin a project of your own: the demo goes aside, skeletons of your files come, and a commit holds both.

    python -m tools.start [--recipe RECIPE] [--name NAME]

Asks for the recipe and the name that are not given. The demo's files, metrics and dvc.lock move to tests/demo, where
the tests use them, and its README.md becomes PIPELINE.md. A file of data/ that is not the demo's any more stays.
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
from tools.use import PARAMETERS, recipe, recipes, use

DEMO = Path("tests/demo")
DEMO_FILES = Path("data/demo.sha256")  # as sha256sum writes them; it goes aside too, so a second start finds none
SKELETON = Path(__file__).parent / "skeleton"
LOCK = Path("dvc.lock")
MADE = (str(LOCK), "metrics")  # kept in git, and made by the stages
README, PIPELINE = Path("README.md"), Path("PIPELINE.md")
TITLE = "# qlora-dvc\n"  # of the README that is not the user's
BUILT_IN = "tiny-base"  # the recipe of the base that the demo's general exam is for


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
    tell(written, own)


def require_startable() -> None:
    """Raises UserError if the project was started already, or git could not bring back or commit what is there."""
    if not DEMO_FILES.exists() or DEMO.exists():
        raise UserError(f"this project was started already, and the demo is in {DEMO}: nothing was changed")
    if git("rev-parse", "--verify", "--quiet", "HEAD").returncode:
        raise UserError(
            "this folder is no git repository: git init && git add -A && git commit -m Template, then again"
        )
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in MADE)).stdout
    if changed:
        raise UserError(f"{changed.splitlines()[0][3:]} has a change that is not committed: commit it or take it back")
    if git("symbolic-ref", "--quiet", "HEAD").returncode:
        raise UserError("git is on no branch, and would lose the commit: git switch -c main")
    if link := next((path for path in linked() if path.is_symlink()), None):
        raise UserError(f"{link} is a link, and the demo is moved: put the files themselves there")
    if git("var", "GIT_COMMITTER_IDENT").returncode:
        raise UserError("git does not know who commits: git config user.name NAME && git config user.email ADDRESS")
    check(PARAMETERS)


def linked() -> Iterator[Path]:
    """The demo's files and folders, each of which may be a link."""
    for line in DEMO_FILES.read_text(encoding="utf-8").splitlines():
        path = Path(line.partition("  ")[2])
        yield from (path, *path.parents)


def offer() -> str:
    lines = [f"  {name:14} {path.read_text(encoding='utf-8').splitlines()[0][2:]}" for name, path in recipes().items()]
    return "\n".join(["Recipes:", *lines, "Which one? "])


def asked(variable: str, question: str) -> str:
    if not sys.stdin.isatty():
        raise UserError(f"{variable} is missing, and there is no terminal to ask on: make start RECIPE=... NAME=...")
    try:
        return input(question).strip()
    except EOFError:
        raise UserError(f"{variable} is missing: nothing was changed") from None


def remove_outputs() -> None:
    """Remove what the stages made of the demo, as far as dvc.lock knows it; what a run may only add to stays."""
    if not LOCK.exists():
        return
    command = [sys.executable, "-m", "dvc", "data", "status", "--json"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise UserError(f"dvc data status fails: {' '.join(found.stderr.split())}: git checkout {LOCK}, then again")
    changed = {path.rstrip("/") for path in json.loads(found.stdout).get("uncommitted", {}).get("modified", [])}
    locked = {out["path"] for stage in read_yaml(LOCK)["stages"].values() for out in stage.get("outs", [])}
    for stage in read_yaml(Path("dvc.yaml"))["stages"].values():
        for out in stage.get("outs", []):
            path, settings = (out, {}) if isinstance(out, str) else next(iter(out.items()))
            if path in locked - changed and not settings.get("persist"):
                remove(Path(path))


def demo_files() -> tuple[list[Path], list[Path]]:
    """Those that are still the demo's, and those that became the user's."""
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
    """Every file of tools/skeleton whose place is free, for the recipe `values`."""
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
            said = " ".join(f"{done.stderr} {done.stdout}".split()) or "without a word"
            raise UserError(f"git {command[0]} failed ({said}): all else is done: git add -A && git commit")


def tell(written: list[Path], own: list[Path]) -> None:
    for path in written:
        if path.name != ".gitkeep":
            print(f"{path}: yours to fill")
    for path in own:
        print(f"{path}: yours already, and left as it is")
    manual = f", its README is {PIPELINE}" if PIPELINE.exists() else ""
    print(f"The demo is in {DEMO}{manual}; all of that is one commit.")
    print(
        "Next: make check tells what is missing; git remote set-url origin ADDRESS points git to a repository of yours."
    )


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], capture_output=True, text=True)


if __name__ == "__main__":
    main()
