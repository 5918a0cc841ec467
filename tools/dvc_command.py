"""Runs DVC's command line, because most of DVC's Python code is not a public interface.

https://dvc.org/doc/command-reference
"""

import subprocess
import sys

from pipeline.common.errors import UserError

DVC = [sys.executable, "-m", "dvc"]


def dvc(*arguments: str) -> str:
    """Run `dvc` with `arguments` and return what it prints.

    Raises:
        UserError: the command failed; the message is DVC's.
    """
    done = subprocess.run([*DVC, *arguments], capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise UserError(" ".join(done.stderr.split()).removeprefix("ERROR: "))
    return done.stdout
