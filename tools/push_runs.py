"""Send all runs that DVC remembers to the remote, whole: `dvc repro --pull` restores them on any machine.

    python -m tools.push_runs

`dvc push --run-cache` sends the records of all runs, but of their files those of this commit alone, and never the
metrics that git keeps. Where one of a run's files is missing, `dvc repro --pull` runs the stage again.
"""

from pipeline.common.errors import UserError
from tools import dvc_internals


def main() -> None:
    try:
        runs, files, gone, unsent = dvc_internals.push_runs()
    except Exception as error:  # every client of a remote has its own
        raise UserError(f"the runs are not sent: {' '.join(str(error).split())} (docs/remotes.md)") from None
    if unsent:
        raise UserError(f"{unsent} files are not sent: repeat python -m tools.push_runs, which sends the rest")
    lost = f"; {gone} are gone (dvc gc), their runs would run again" if gone else ""
    print(f"{runs} runs are in the remote, with {files - gone} files{lost}")


if __name__ == "__main__":
    main()
