"""What Linux alone has is taken away from the stages, as far as this can be done: they run all the same."""

import json
import sys

from conftest import Project

# Python runs this first. macOS starts processes afresh, too.
TAKEN_AWAY = """
import ctypes, multiprocessing, os, sys

del os.sched_getaffinity
multiprocessing.set_start_method("spawn")

class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name in ("prctl", "mallopt"):
            raise AttributeError(name)
        return super().__getattr__(name)

ctypes.CDLL = Library

def without_proc(event, arguments):
    psutils = "/proc/meminfo", "/proc/zoneinfo"  # by which psutil, on Linux, knows the free memory
    if event == "open" and str(arguments[0]).startswith("/proc/") and arguments[0] not in psutils:
        raise FileNotFoundError(arguments[0])

sys.addaudithook(without_proc)
"""
STAGES = ("prepare_base", "generate", "merge", "tokenize", "train_qlora", "align", "merge_adapter")


def test_stages_run_without_what_linux_alone_has(project: Project) -> None:
    (project.folder / "away").mkdir()
    (project.folder / "away/sitecustomize.py").write_text(TAKEN_AWAY, encoding="utf-8")
    project.set(train__epochs=0.1)
    for stage in STAGES:
        project.env = {"PYTHONPATH": "away", "DVC_STAGE": stage}
        project.run(sys.executable, "-m", f"stages.{stage}")
    cost = json.loads((project.folder / "metrics/train_cost.json").read_text(encoding="utf-8"))
    assert cost["peak_memory_mb"] > 0
