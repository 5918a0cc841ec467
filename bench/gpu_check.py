"""Check on a GPU, in eight minutes, what was counted or assumed without one.

    python -m bench.gpu_check [CHECK ...]       # all by default, in the order of their importance
    python -m bench.gpu_check --tiny [CHECK ...]  # on a CPU, with tiny shapes: a test of the checks themselves

Each check (bench.gpu_check_case) is a process with a time limit, and prints one line of JSON when it ends. A check that
fails costs no other check. A check whose limit is longer than the rest of --seconds is not run, and says so. At the end
comes a table in Markdown for bench/README.md. Exit status 1: a check failed, or was not run.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SECONDS = 480.0
# Of each check, in seconds. A check mostly takes much less.
LIMITS = {
    "environment": 60.0,
    "quantization": 60.0,
    "float32": 60.0,
    "bfloat16": 60.0,
    "same_bits": 60.0,
    "resume": 75.0,
    "resume_on_gpu": 60.0,
    "memory": 150.0,
    "profile_of_step": 60.0,
    "savings": 80.0,
    "liger": 60.0,
    "trl_defaults": 60.0,
    "longest_rows": 60.0,
    "expandable_segments": 60.0,
    "answers_and_lengths": 75.0,
    "batches": 60.0,
}
# Whether torch's allocator may let its segments grow; the other checks leave this to the pipeline.
EXPANDABLE = {"longest_rows": False, "expandable_segments": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=", ".join(LIMITS))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all checks; the limits of each grow with it")
    asked = parser.parse_args()
    if unknown := set(asked.checks) - set(LIMITS):
        parser.error(f"no such check: {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    if not asked.tiny and not has_gpu():
        parser.error("torch sees no GPU here: --tiny shows on a CPU that the checks run")
    started = time.monotonic()
    outcomes = []
    for name in asked.checks or LIMITS:
        outcomes.append(outcome(name, asked.tiny, LIMITS[name] * asked.seconds / SECONDS, started + asked.seconds))
        print(json.dumps(outcomes[-1]), flush=True)
    print(f"\n{'a CPU, tiny shapes' if asked.tiny else card()}, torch {version('torch')}: ", end="")
    print(f"{time.monotonic() - started:.0f} s\n\n| check | counted | measured | result |\n| --- | --- | --- | --- |")
    print("\n".join(row for each in outcomes for row in rows(each)))
    sys.exit(not all(has_passed(each) for each in outcomes))


def has_gpu() -> bool:
    import torch  # takes seconds, which --tiny does not need

    return torch.cuda.is_available()


def outcome(name: str, tiny: bool, limit: float, end: float) -> dict[str, Any]:
    """Run a check of `limit` seconds before the time `end`. Return what it printed, or why it printed nothing."""
    left = end - time.monotonic()
    if left < limit:
        return {"check": name, "not_run": f"{max(left, 0):.0f} s are left, and its limit is {limit:g} s"}
    command = [sys.executable, "-m", "bench.gpu_check_case", name, *(["--tiny"] if tiny else [])]
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables(name), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        printed = process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        return {"check": name, "failed": f"not done in {limit:g} s"}
    finally:
        with suppress(ProcessLookupError):  # the check and the processes that it started have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        return {"check": name, "failed": f"exit status {process.returncode}"}
    return json.loads(printed.splitlines()[-1])


def variables(name: str) -> dict[str, str]:
    """Return the environment of a check: one GPU, and OpenMP that waits as in the stages."""
    found = {"CUDA_VISIBLE_DEVICES": "0", "OMP_WAIT_POLICY": "PASSIVE"} | dict(os.environ)
    if name in EXPANDABLE:
        found["PYTORCH_CUDA_ALLOC_CONF"] = f"expandable_segments:{EXPANDABLE[name]}"
    return found


def card() -> str:
    """The name of the GPU, and the version of its driver."""
    import torch

    name = torch.cuda.get_device_name()  # as CUDA_VISIBLE_DEVICES says, unlike nvidia-smi
    if not shutil.which("nvidia-smi"):
        return name
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return f"{name}, driver {driver}"


def rows(outcome: dict[str, Any]) -> Iterator[str]:
    """Yield the rows of the table of one check."""
    for result in ("failed", "not_run"):
        if result in outcome:
            yield f"| {outcome['check']} | | {outcome[result]} | {result.replace('_', ' ')} |"
    for figure in outcome.get("figures", []):
        result = {True: "passed", False: "failed", None: ""}[figure["passed"]]
        yield f"| {outcome['check']}: {figure['name']} | {figure['counted']} | {cell(figure['measured'])} | {result} |"


def cell(measured: object) -> str:
    return f"{measured:.4g}" if isinstance(measured, float) else str(measured)


def has_passed(outcome: dict[str, Any]) -> bool:
    return "figures" in outcome and not any(figure["passed"] is False for figure in outcome["figures"])


if __name__ == "__main__":
    main()
