"""Send all runs that DVC remembers to the remote, whole: `dvc repro --pull` restores them on any machine.

    python -m tools.push_runs

`dvc push --run-cache` sends the records of all runs, but of their files those of this commit alone, and never the
metrics that git keeps. Where one of a run's files is missing, `dvc repro --pull` runs the stage again.
"""

from dvc.repo import Repo
from dvc.stage.cache import RunCacheNotSupported

from pipeline.refusal import Refused


def main() -> None:
    with Repo() as repo:
        try:
            runs = repo.stage_cache.push(remote=None)
        except RunCacheNotSupported:
            raise Refused("there is no remote that runs can be sent to: make remote URL=...") from None
        sent = [repo.cloud.push(objects) for objects in repo.stage_cache.get_used_objs(runs).values()]
    failed = sum(len(result.failed) for result in sent)
    if failed:
        raise Refused(f"{failed} files were not sent: repeat python -m tools.push_runs")
    print(f"{len(runs)} runs, {sum(len(result.transferred) for result in sent)} files sent")


if __name__ == "__main__":
    main()
