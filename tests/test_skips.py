"""A test whose program cannot be had is skipped, which the last line says, or fails where everything is demanded."""

from conftest import Project

SKIPPED = """
import pytest

@pytest.mark.parametrize("number", [1, 2])
def test_with_a_browser(number):
    pytest.skip("no browser: apt-get install browser")
"""


def test_the_last_line_names_what_was_skipped_unless_nothing_may_be(project: Project) -> None:
    (project.folder / "tests/test_example.py").write_text(SKIPPED, encoding="utf-8")
    command = ["pytest", "--numprocesses", "2", "tests/test_example.py"]
    printed = project.run(*command).stdout
    assert printed.endswith("skipped tests: 2 of test_example.py (no browser: apt-get install browser)\n")
    failed = project.run(*command, "--no-skips", check=False)
    assert failed.returncode == 1 and "2 failed" in failed.stdout and "no browser: " in failed.stdout
