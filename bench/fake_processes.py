"""The first of several processes that train with DDP on fake GPUs. It has DDP's buckets. The others do not exist."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel import distributed as ddp
from torch.testing._internal.distributed.fake_pg import FakeStore

set_up = DistributedDataParallel.__init__


@contextmanager
def first_of(processes: int) -> Iterator[None]:
    """Inside the block this process is the first of `processes` on this machine."""
    if processes == 1:
        yield
        return
    number = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    with (
        patch.dict(os.environ, number),
        patch.object(ddp, "_verify_param_shape_across_processes", nothing),  # reads numbers, which fake tensors lack
        patch.object(ddp, "_sync_module_states", nothing),
        patch.object(DistributedDataParallel, "__init__", set_up_alone),
    ):
        dist.init_process_group(backend="fake", store=FakeStore(), rank=0, world_size=processes)
        yield
        dist.destroy_process_group()


def set_up_alone(model: DistributedDataParallel, *arguments: Any, **options: Any) -> None:
    set_up(model, *arguments, **options)
    model.register_comm_hook(None, own_gradients)
    model.reducer, model.logger = Reducer(model.reducer), Logger()


def own_gradients(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    done = torch.futures.Future[torch.Tensor]()
    done.set_result(bucket.buffer())
    return done


class Reducer:
    """DDP's reducer, which keeps its first buckets: new ones, of the same size, would be agreed on by all processes."""

    def __init__(self, reducer: dist.Reducer) -> None:
        self.reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


class Logger:
    """DDP's logger, which would ask the GPU for the time."""

    def set_runtime_stats_and_log(self) -> None:
        pass


def nothing(*_: Any, **__: Any) -> None:
    pass
