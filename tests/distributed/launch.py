"""Several processes on one machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes


def spawn(world_size: int, function: Callable[..., Any], *args: Any, backend: str = "gloo", timeout: float = 120) -> list[Any]:
    """Run `function(rank, *args)` in processes of one group, and return what each one gives, in the order of ranks.

    Args:
        function: at the top of a module, so that processes which start afresh can import it.
        backend: with "nccl" in it each process has the GPU of its rank.
        timeout: seconds for all of it; a collective that waits for half as long fails.

    Raises:
        ProcessRaisedException: with the traceback of the first process that failed; the others are ended.
        TimeoutError: where they are not done in time.
    """
    with TemporaryDirectory() as folder:
        job = (world_size, function, args, backend, timeout, folder)
        context = start_processes(_process, job, nprocs=world_size, join=False, start_method="spawn")
        assert context is not None
        end = time.monotonic() + timeout
        while not context.join(timeout=1):
            if time.monotonic() > end:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{world_size} processes did not finish {function.__name__} within {timeout} s")
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(world_size)]


def _process(
    rank: int, world_size: int, function: Callable[..., Any], args: tuple[Any, ...], backend: str, timeout: float, folder: str
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout / 2)
    )
    torch.save(function(rank, *args), f"{folder}/{rank}")
    dist.barrier()
    os._exit(0)  # taking a gloo group down can deadlock: its thread wants the interpreter's lock, which its destructor holds
