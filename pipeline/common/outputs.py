"""Writes the outputs of stages (complete or not at all), and reads them."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError


@contextmanager
def atomic_output(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder. It is renamed to `path` if the block ends without error."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(aside)
    try:
        yield aside
    except BaseException:
        remove(aside)
        raise
    if aside.is_dir() or path.is_dir():
        remove(path)
    aside.replace(path)  # atomic for a file


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, and remove it at the end."""
    folder = path.with_name(f".{path.name}.scratch.partial")
    remove(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        remove(folder)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    with atomic_output(path) as aside:
        aside.write_text(json.dumps(rounded(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_details(path: Path, content: Any) -> None:
    """Write details beside metrics. The file is a JSON list, in which `dvc metrics` finds no numbers to show.

    dvc.yaml declares the file as a metric nevertheless. DVC remembers a run of a stage only if every output in git is a
    metric or a plot: https://github.com/iterative/dvc/blob/3.67.1/dvc/stage/__init__.py (`no_cache_outs`).
    """
    write_json(path, [content])


def read_details(path: Path) -> Any:
    [content] = read_json(path)
    return content


def read_json(path: Path) -> Any:
    """Raises UserError if the file is missing."""
    return json.loads(existing(path).read_text(encoding="utf-8"))


def existing(path: Path) -> Path:
    """The path. Raises UserError if nothing is there."""
    if not path.exists():
        raise UserError(f"{path} is missing: run dvc repro, dvc pull, or git restore")
    return path


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    with atomic_output(path) as aside, open(aside, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(rounded(row), ensure_ascii=False) + "\n" for row in rows)
        if not file.tell():
            file.write("\n")  # DVC warns of an empty file


def rounded(content: Any) -> Any:
    """`content` with floats rounded to six significant digits: further digits are noise and make diffs hard to read."""
    if isinstance(content, float):
        return float(f"{content:.6g}")
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [rounded(value) for value in content]
    return content
