"""Reads the everyday prompts that the base answers for replay."""

from pathlib import Path

from pipeline.common.errors import UserError
from pipeline.common.user_files import read_text


def first_prompts(file: Path, wanted: int) -> dict[str, str]:
    """{"file:line": prompt} of the first `wanted` prompts. Blank lines and lines with # at the start are no prompts.

    Raises:
        UserError: the file is missing, is not UTF-8, or has fewer prompts.
    """
    if not file.exists():
        raise UserError(f"{file} is missing: write one prompt a line")
    lines = enumerate(read_text(file).splitlines(), start=1)
    prompts = {f"{file}:{number}": line.strip() for number, line in lines if line.strip() and not line.startswith("#")}
    if len(prompts) < wanted:
        raise UserError(
            f"generate.replay is {wanted}, but {file} has {len(prompts)} prompts: add prompts, or lower generate.replay"
        )
    return dict(list(prompts.items())[:wanted])
