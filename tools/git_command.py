"""Runs git."""

import subprocess

from pipeline.common.errors import UserError


def git(*arguments: str) -> str:
    """Run git with `arguments` and return what git prints.

    Raises:
        UserError: the command failed; the message is git's.
    """
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise UserError(" ".join(done.stderr.split()))
    return done.stdout.strip()
