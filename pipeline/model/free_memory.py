"""The memory of a GPU, and the memory that is free on a GPU or on this machine."""

from pathlib import Path

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Return the bytes that a new process can use on `device`. A container's limit (cgroups, version 2) counts."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    available = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    limit, used, stat = (group / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.exists() and (bound := limit.read_text(encoding="ascii").strip()) != "max":
        reclaimable = dict(line.split() for line in stat.read_text(encoding="ascii").splitlines())["inactive_file"]
        available = min(available, int(bound) - int(used.read_text(encoding="ascii")) + int(reclaimable))
    return available


def gpu_memory() -> int:
    """Return the bytes of the GPU, free or not."""
    return torch.cuda.mem_get_info()[1]
