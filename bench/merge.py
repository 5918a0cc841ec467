"""Compare the time and memory of `merge` with a plain implementation and with datasketch.

    pip install datasketch
    python -m bench.merge [ROWS ...]     # 10000 100000 1000000 by default: half an hour

bench/README.md has the output.

The rows have about 1 KB. 80 % are new, and 10 % repeat an earlier row in upper case. Another 10 % repeat an earlier row
with one word of the answer, of about 80, changed. "merge" is the unchanged stage, with its leak check. Peak memory is
the sum over all processes; shared pages count once per process.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
from ruamel.yaml import YAML

from pipeline.common.paths import EXAM
from pipeline.common.words import words
from pipeline.evaluation.questions import read_questions

ROOT = Path(__file__).parent.parent

PANDAS = """
import pandas
rows = pandas.read_json("data/curated/rows.jsonl", lines=True)
kept = rows.drop_duplicates(["question", "answer"])
kept.to_json("kept.jsonl", orient="records", lines=True, force_ascii=False)
print(len(kept))
"""
DATASKETCH = """
import json
from datasketch import MinHash, MinHashLSH
index, kept = MinHashLSH(threshold=0.9, num_perm=128), 0
with open("data/curated/rows.jsonl") as rows, open("kept.jsonl", "w") as out:
    for number, line in enumerate(rows):
        row = json.loads(line)
        words = (row["question"] + " " + row["answer"]).lower().split()
        sketch = MinHash(num_perm=128)
        sketch.update_batch([" ".join(three).encode() for three in zip(words, words[1:], words[2:])])
        if not index.query(sketch):
            index.insert(number, sketch)
            kept += out.write(line) > 0
print(kept)
"""


def main() -> None:
    sizes = [int(argument) for argument in sys.argv[1:]] or [10_000, 100_000, 1_000_000]
    print(f"{'rows':>9}  {'':32} {'seconds':>8} {'rows/s':>8} {'peak MiB':>9} {'kept':>8}", flush=True)
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            project = Path(folder)
            prepare(project, size)
            for name, near in {"merge, exact": None, "merge, exact and near": 0.9}.items():
                set_near_duplicate(project, near)
                report(size, name, [sys.executable, "-m", "stages.merge"], project)
            report(size, "pandas, exact", [sys.executable, "-c", PANDAS], project)
            report(size, "datasketch, near", [sys.executable, "-c", DATASKETCH], project)


def prepare(project: Path, size: int) -> None:
    """Write only what the stage needs: parameters, the demo's exam, and rows."""
    for folder in ("data/curated", "metrics"):
        (project / folder).mkdir(parents=True)
    for name in ("dvc.yaml", "params.yaml", "data/questions.jsonl", "data/general.jsonl", "metrics/generate.json"):
        shutil.copy(ROOT / name, project / name)
    (project / "data/train.jsonl").touch()
    with open(project / "data/curated/rows.jsonl", "w", encoding="utf-8") as file:
        for question, answer in rows(size):
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")


def rows(size: int) -> Iterator[tuple[str, str]]:
    """Yield (question, answer) with the word frequencies of a language: the n-th word is 1/n as frequent as the first.

    Every eighth of the most frequent words is a word of the exam, as in rows about the subject of the exam.
    """
    chance = random.Random(1)
    syllables = ["ka", "lo", "mi", "ren", "tas", "vel", "dor", "une", "pis", "gar", "shi", "bon"]
    asked = [question.question for question in read_questions(ROOT / EXAM) if question.question.isascii()]
    of_exam = [word for word, _ in Counter(word for question in asked for word in words(question)).most_common()]
    others = sorted({"".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(20_000)} - {*of_exam})
    chance.shuffle(others)
    vocabulary = list(others)
    for at, word in enumerate(of_exam):
        vocabulary.insert(8 * at, word)
    weights = [1 / n for n in range(1, len(vocabulary) + 1)]
    recent: list[list[str]] = []
    for _ in range(size):
        kind = chance.random()
        if kind < 0.8 or not recent:
            text = chance.choices(vocabulary, weights, k=chance.randint(80, 110))
            recent = [*recent[-999:], text]
        else:
            text = list(chance.choice(recent))
            if kind < 0.9:
                text = [word.upper() for word in text]
            else:
                text[chance.randrange(15, len(text))] = chance.choice(vocabulary)
        yield " ".join(text[:15]) + "?", " ".join(text[15:])


def set_near_duplicate(project: Path, threshold: float | None) -> None:
    yaml = YAML()
    parameters = yaml.load(project / "params.yaml")
    parameters["merge"] |= {"near_duplicate": threshold, "on_leak": "drop"}
    yaml.dump(parameters, project / "params.yaml")


def report(size: int, name: str, command: list[str], project: Path) -> None:
    """Run the command and print its time and memory."""
    started, peak = time.monotonic(), 0
    process = psutil.Popen(
        command, cwd=project, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None:
        peak = max(peak, resident(process))
        time.sleep(0.02)
    seconds = time.monotonic() - started
    if process.returncode:
        print(f"{size:9}  {name:32} failed: {process.stderr.read().decode().strip().splitlines()[-1]}", flush=True)
        return
    kept = process.stdout.read().decode().strip() or lines_kept(project)
    print(f"{size:9}  {name:32} {seconds:8.1f} {size / seconds:8.0f} {peak / 2**20:9.0f} {kept:>8}", flush=True)


def resident(process: psutil.Process) -> int:
    """Return the resident bytes of the process and of all processes that it started."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += one.memory_info().rss
    return total


def lines_kept(project: Path) -> int:
    counts = json.loads((project / "metrics/data.json").read_text(encoding="utf-8"))["rows"]
    return counts["train"] + counts["valid"]


if __name__ == "__main__":
    main()
