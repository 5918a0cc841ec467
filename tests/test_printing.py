"""What a stage prints where nobody watches: lines, few of them."""

import sys

from conftest import Project

SLOW = """
import tools, time
from tqdm.auto import tqdm
for _ in tqdm(range(1000), desc="fast"):
    pass
started = time.monotonic()
bar = tqdm(desc="slow", total=115)
for _ in range(115):
    time.sleep(0.1)
    bar.update()
bar.close()
"""


def test_in_a_pipe_a_bar_is_a_line_every_ten_seconds_and_none_if_it_takes_less(project: Project) -> None:
    printed = project.run(sys.executable, "-c", SLOW).stderr
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    assert len(lines) == 2 and all(line.startswith("slow: ") for line in lines)
    assert "100%" in lines[-1]


def test_in_a_pipe_a_short_training_prints_nothing(tokenized: Project) -> None:
    tokenized.set(train__epochs=0.3)
    done = tokenized.run(sys.executable, "-m", "stages.train_qlora")
    assert (done.stdout + done.stderr).strip() == ""
