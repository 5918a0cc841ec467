"""Send all runs that DVC remembers to the remote, whole: `dvc repro --pull` restores them on any machine.

    python -m tools.push_runs

`dvc push --run-cache` sends the records of all runs, but of their files those of this commit alone, and never the
metrics that git keeps. Where one of a run's files is missing, `dvc repro --pull` runs the stage again.
"""

from dvc.exceptions import DvcException
from dvc.repo import Repo

from pipeline.refusal import Refused


def main() -> None:
    try:
        with Repo() as repo:
            runs = repo.stage_cache.push(remote=None)
            sent = [repo.cloud.push(objects) for objects in repo.stage_cache.get_used_objs(runs).values()]
    except (DvcException, OSError) as error:
        why = " ".join(str(error).split())
        raise Refused(f"the runs are not sent: {why}: docs/remotes.md tells how to set up a remote") from None
    failed = sum(len(result.failed) for result in sent)
    if failed:
        raise Refused(f"{failed} files are not sent: repeat python -m tools.push_runs, which sends the rest")
    print(f"{len(runs)} runs, {sum(len(result.transferred) for result in sent)} files sent")


if __name__ == "__main__":
    main()
