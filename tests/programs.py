"""The programs that tests need and pip cannot install, so that a test is skipped without its own.

python tests/programs.py   # gets those that are missing, as far as this machine lets it
"""

import os
import shutil
import subprocess
from ctypes.util import find_library
from pathlib import Path

LIGER = Path(__file__).parent.parent / ".venv/liger"  # apart from the other packages, of which no CPU needs Triton


def chromium() -> str | None:
    """Of the system. Ubuntu's is a snap, which does not see the files of tests."""
    found = filter(None, map(shutil.which, ("chromium", "google-chrome")))
    return next((path for path in found if not path.startswith("/snap/")), None)


def sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")  # which only root has in PATH


def compiler() -> str | None:
    return shutil.which("c++")


def main() -> None:
    node = find_library("atomic")  # which Playwright's own node needs
    wanted = {"chromium": chromium(), "openssh-server": sshd(), "libatomic1": node, "g++": compiler()}
    if not all(wanted.values()) and os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "-q"], check=False)
        for package in (package for package, found in wanted.items() if not found):  # Ubuntu has no chromium
            subprocess.run(["apt-get", "install", "-qy", "--no-install-recommends", package], check=False)
    if not chromium():
        subprocess.run(["playwright", "install", "chromium"], check=False)


if __name__ == "__main__":
    main()
