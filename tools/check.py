"""Check params.yaml without running anything.

    python -m tools.check

Exit status 1, and one line that names each wrong key, if a stage would refuse it.
"""

from pathlib import Path

from pipeline.parameters import check


def main() -> None:
    check(Path("params.yaml"))


if __name__ == "__main__":
    main()
