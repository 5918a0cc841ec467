"""Send all runs in DVC's run cache to the remote, with all their files.

    python -m tools.push_runs

After that, `dvc repro --pull` restores the runs on any machine.
`dvc push --run-cache` sends the records of all runs, but only the files of this commit, and never the metrics that git
keeps. If a file of a run is missing, `dvc repro --pull` runs the stage again.
"""

from pipeline.common.errors import UserError
from tools import dvc_internals


def main() -> None:
    try:
        runs, files, missing, unsent = dvc_internals.push_runs()
    except Exception as error:  # each type of remote raises its own errors
        raise UserError(f"the runs are not sent: {' '.join(str(error).split())} (docs/remotes.md)") from None
    if unsent:
        raise UserError(f"{unsent} files are not sent: repeat python -m tools.push_runs, which sends the rest")
    lost = f"; {missing} files are missing (removed by dvc gc): their stages would run again" if missing else ""
    print(f"{runs} runs are in the remote, with {files - missing} files{lost}")


if __name__ == "__main__":
    main()
