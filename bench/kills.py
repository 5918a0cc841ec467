"""Kill training at random times, let `dvc repro` finish it, and compare the adapters with that of an undisturbed run.

    python -m bench.kills 20 [train_qlora|align]

It runs in a clone of this repository, without uncommitted changes to tracked files: commit first. align trains with
DPO on the pairs of examples/preferences.
"""

import argparse
import random
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import yaml

VICTIMS = ["trainer", "dvc", "both"]
ADAPTERS = {"train_qlora": "outputs/trained", "align": "outputs/aligned"}
BEFORE = {"train_qlora": ["tokenize"], "align": ["tokenize_pairs", "train_qlora"]}
# Short, with a checkpoint every eight steps, and with dropout, whose random numbers a checkpoint has to restore.
PARAMETERS: dict[str, dict[str, object]] = {
    "train_qlora": {"lora.dropout": 0.1, "train.epochs": 4, "train.eval_steps": 8},
    "align": {"train.epochs": 1, "align.method": "dpo", "align.epochs": 0.5, "align.eval_steps": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    parser.add_argument("stage", choices=ADAPTERS, nargs="?", default="train_qlora")
    options = parser.parse_args()
    kills, stage = options.kills, options.stage
    train = ["dvc", "repro", "--single-item", "--force", stage]
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        repository = Path(scratch, "clone")
        subprocess.run(["git", "clone", "--quiet", ".", repository], check=True)
        for key, value in PARAMETERS[stage].items():
            change(repository / "params.yaml", key, value)
        if stage == "align":
            pairs = repository / "examples/preferences/preferences"
            shutil.copytree(pairs, repository / "data/preferences", dirs_exist_ok=True)
        run(["dvc", "repro", *BEFORE[stage]], repository)
        started = time.monotonic()
        run(train, repository)
        complete = time.monotonic() - started
        expected = adapter(repository, stage)
        print(f"undisturbed: {complete:.0f} s, adapter {expected}\n")
        print(f"{'kill':>4}  {'after':>6}  {'victim':8}{'continues at':>14}  adapter")
        same = 0
        for number in range(1, kills + 1):
            victim = VICTIMS[number % 3]
            while not kill(train, repository, after := chance.uniform(0, complete), victim):
                pass  # it had ended: this machine is faster now
            step = re.search(r"continuing from checkpoint-(\d+)", run(train, repository))
            same += adapter(repository, stage) == expected
            at = f"step {step[1]}" if step else "the start"
            print(f"{number:>4}  {after:>4.0f} s  {victim:8}{at:>14}  {adapter(repository, stage)}", flush=True)
        print(f"\n{same} of {kills} adapters are the same")


def change(file: Path, key: str, value: object) -> None:
    parameters = yaml.safe_load(file.read_text(encoding="utf-8"))
    *section, name = key.split(".")
    (parameters[section[0]] if section else parameters)[name] = value
    file.write_text(yaml.safe_dump(parameters), encoding="utf-8")


def run(command: list[str], repository: Path) -> str:
    done = subprocess.run(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert not done.returncode, done.stdout
    return done.stdout


def kill(train: list[str], repository: Path, after: float, victim: str) -> bool:
    """Start training, and send SIGKILL to the trainer, to dvc or to both (`victim`) after `after` seconds.

    Return False if training ended earlier. Fail if a process of the training still runs at the end.
    """
    with open(repository.parent / "killed.log", "w") as log:
        dvc = psutil.Popen(train, cwd=repository, stdout=log, stderr=log)
        time.sleep(after)
        if dvc.poll() is not None:
            return False
        trainer = dvc.children(recursive=True)
        for process in {"trainer": trainer, "dvc": [dvc], "both": [dvc, *trainer]}[victim]:
            process.kill()
        dvc.wait()
        _, alive = psutil.wait_procs(trainer, timeout=10)
        assert not alive, f"{victim} was killed, and training continues"
        return True


def adapter(repository: Path, stage: str) -> str:
    """Return the hash of the adapter's folder in dvc.lock."""
    outs = yaml.safe_load((repository / "dvc.lock").read_text(encoding="utf-8"))["stages"][stage]["outs"]
    return next(out["md5"] for out in outs if out["path"] == ADAPTERS[stage])


if __name__ == "__main__":
    main()
