"""DVC's command line, whose Python side is no public interface: https://dvc.org/doc/command-reference"""

import subprocess
import sys

from pipeline.common.errors import UserError

DVC = [sys.executable, "-m", "dvc"]


def dvc(*arguments: str) -> str:
    """What the command prints.

    Raises:
        UserError: the command failed, for the reason that DVC gives.
    """
    done = subprocess.run([*DVC, *arguments], capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise UserError(" ".join(done.stderr.split()).removeprefix("ERROR: "))
    return done.stdout
