"""Send all runs that DVC remembers to the remote, whole: `dvc repro --pull` restores them on any machine.

    python -m tools.push_runs

`dvc push --run-cache` sends the records of all runs, but of their files those of this commit alone, and never the
metrics that git keeps. Where one of a run's files is missing, `dvc repro --pull` runs the stage again. The run cache's
Python side is no public interface: this is written for DVC 3.67.
"""

from typing import Any

from dvc.repo import Repo

from pipeline.common.errors import UserError


def main() -> None:
    try:
        with Repo() as repo:
            runs = repo.stage_cache.push(remote=None)
            files = set[Any]().union(*repo.stage_cache.get_used_objs(runs).values())
            repo.cloud.push(files)
            status = repo.cloud.status(files)
            unsent = {record for _, record in runs} - records_in_remote(repo) | status.new
    except Exception as error:  # every client of a remote has its own
        raise UserError(f"the runs are not sent: {' '.join(str(error).split())} (docs/remotes.md)") from None
    if unsent:
        raise UserError(f"{len(unsent)} files are not sent: repeat python -m tools.push_runs, which sends the rest")
    gone = f"; {len(status.missing)} are gone (dvc gc), their runs would run again" if status.missing else ""
    print(f"{len(runs)} runs are in the remote, with {len(files) - len(status.missing)} files{gone}")


def records_in_remote(repo: Any) -> set[str]:
    remote = repo.cloud.get_remote_odb(command="push --run-cache", hash_name="md5-dos2unix")
    return {remote.fs.name(path) for path in remote.fs.find(remote.fs.join(remote.path, "runs"))}


if __name__ == "__main__":
    main()
