"""How a stage ends that cannot do what it was asked."""

import os
import subprocess
from collections.abc import Callable
from importlib.util import find_spec

OUT_OF_MEMORY = "the GPU's memory does not suffice: make check tells which parameter to turn"


class Refused(SystemExit):
    """The message is one line: what is wrong, where, and what to do. Uncaught, Python prints it and exits with 1."""


def run(stage: Callable[[], None]) -> None:
    """Run a stage's main function; if it fails, put back the outputs that DVC deleted before it started the stage."""
    try:
        stage()
    except (Exception, SystemExit) as error:  # of Ctrl-C see stages/__init__.py
        if "DVC_STAGE" in os.environ and find_spec("dvc"):  # not in a Python other than the environment's
            put_back_outputs(os.environ["DVC_STAGE"])
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which not every stage imports
            raise Refused(OUT_OF_MEMORY) from None
        raise


def put_back_outputs(stage: str) -> None:
    """Check the stage's outputs out as dvc.lock has them; a metric that was never made here, as git has it.

    `dvc checkout` cannot: the running `dvc repro` locks them. An output that persists was not deleted, and what the
    failed run added to it is kept.
    """
    from dvc.repo import Repo

    for out in Repo().stage.load_one(name=stage).outs:
        if out.persist:
            continue
        in_git, out.use_cache = not out.use_cache, True  # metrics lie in the cache too, as part of the run cache
        if out.hash_info and not out.changed_cache():
            out.checkout(force=True)
            if in_git:
                out.unprotect()  # a copy: git and `dvc exp apply` write it in place, and through a link into the cache
        elif in_git:
            subprocess.run(["git", "checkout", "--quiet", "--", out.fs_path], stderr=subprocess.DEVNULL, check=False)
