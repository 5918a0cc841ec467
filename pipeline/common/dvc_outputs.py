"""What the stages use of DVC beyond its documentation: restoring outputs, and the hash of an output.

tests/test_library_internals.py tests these uses, for DVC 3.67. The uses of the tools are in tools/dvc_internals.py.
"""

import subprocess


def put_back_outputs(stage: str) -> None:
    """Restore the stage's outputs from DVC's cache; a metric that is not in the cache, from git.

    `dvc checkout` cannot do this, because the running `dvc repro` holds the lock
    (https://github.com/iterative/dvc/blob/main/dvc/rwlock.py). `dvc.api` copies files instead of linking them, and can
    download files. A persistent output is not restored: DVC has not deleted it, and it keeps what the failed run added.
    """
    from dvc.repo import Repo

    for out in Repo().stage.load_one(name=stage).outs:
        if out.persist:
            continue
        in_git, out.use_cache = not out.use_cache, True  # the run cache has the metrics too
        if out.hash_info and not out.changed_cache():
            out.checkout(force=True)
            if in_git:
                out.unprotect()  # git and `dvc exp apply` write in place, which would change a linked cache file
        elif in_git:
            subprocess.run(["git", "checkout", "--quiet", "--", out.fs_path], stderr=subprocess.DEVNULL, check=False)


def output_hash(path: str) -> str:
    """The MD5 of an output as it is on disk now; of a folder, the MD5 that ends in .dir.

    dvc.lock has the hash of the last `dvc repro`, which a stage that was run alone has not changed:
    https://github.com/iterative/dvc/blob/main/dvc/output.py (get_hash)
    """
    from dvc.repo import Repo

    [output] = Repo().find_outs_by_path(path)
    return str(output.get_hash().value)
