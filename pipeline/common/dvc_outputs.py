"""What a stage asks DVC of its outputs."""

import subprocess


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
