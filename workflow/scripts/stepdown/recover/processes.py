"""One training in several processes: started together, ended together, and an error told as if there were only one."""

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from ..errors import UserError
from ..memory import map_large_tensors


def check_processes(count: int, device: str) -> None:
    """Raises UserError for more processes than there are devices: GPUs on `cuda`, cores on `cpu`."""
    devices = torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))
    if count > devices:
        kind = "GPUs" if device == "cuda" else "cores"
        raise UserError(f"recovery: processes is {count}: there are {devices} {kind} here, give at most that")


def run_in_processes(function: Callable[..., None], count: int, *arguments: Any) -> None:
    """Call `function(*arguments)` in `count` processes that torch.distributed and accelerate know of each other.

    With one, in this process. A mistake or system error of any is raised here as a UserError; when one fails, or this
    one dies, all of them end.
    """
    if count == 1:
        function(*arguments)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    errors = multiprocessing.get_context("spawn").SimpleQueue()
    threads = max(1, torch.get_num_threads() // count)
    # Tensors would go through shared memory, of which a container has little.
    arguments = tuple(each.numpy() if isinstance(each, Tensor) else each for each in arguments)
    try:
        multiprocessing.spawn(_work, (count, port, threads, errors, function, arguments), nprocs=count)
    except (ProcessExitedException, ProcessRaisedException) as error:
        if not errors.empty():
            raise UserError(errors.get()) from None
        if isinstance(error, ProcessRaisedException):
            raise
        how = error.signal_name or f"exit status {error.exit_code}"
        raise UserError(
            f"recovery: process {error.error_index} of {count} was ended from outside ({how}); is there memory enough?"
        ) from None


def _work(rank: int, count: int, port: int, threads: int, errors: Any, function: Callable, arguments: tuple) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in where.items()})
    torch.set_num_threads(threads)
    map_large_tensors()
    try:
        function(*(torch.from_numpy(each) if isinstance(each, np.ndarray) else each for each in arguments))
    except (UserError, OSError) as error:
        errors.put(str(error))
        # At once: NCCL would have this process wait for the others, which wait for it.
        os._exit(1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # At once: a thread of gloo that is still ending would abort an interpreter that is.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def is_first() -> bool:
    """Whether this process is the one that writes files, as the only one is."""
    return os.environ.get("RANK", "0") == "0"
