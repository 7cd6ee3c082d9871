"""Which of a machine's GPUs a job may have: each belongs to one job at a time. Standard library only."""

import contextlib
import fcntl
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO

from ..errors import UserError

DRIVER = Path("/proc/driver/nvidia")
# A file that is closed is no longer locked.
_held: list[IO] = []


def claim_gpus(count: int = 1) -> None:
    """Wait until `count` GPUs are free, and make them the only ones this process sees, until it ends.

    To be called before CUDA looks for devices. Without NVIDIA's driver nothing is known of GPUs, and nothing changes.
    Raises UserError if there are fewer than `count`.
    """
    # NVIDIA's tool takes a second where its driver is not kept awake: it is asked once.
    if _held or not (devices := visible_gpus()):
        return
    if count > len(devices):
        raise UserError(f"{count} GPUs asked for, {len(devices)} there: ask for fewer, or set device: cpu")
    folder = Path(tempfile.gettempdir(), f"stepdown-gpus-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    while not (claimed := lock_free(devices, count, folder)):
        time.sleep(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(claimed)


def visible_gpus() -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, by the names the driver knows them by, which hold in every job."""
    names = re.findall(r"UUID:\s+([\w-]+)", driver_listing())
    # A GPU that is divided is used by its parts.
    names = [name for name in names if name.startswith("MIG")] or names
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return names
    chosen = [word.strip() for word in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
    by_number = dict(zip(map(str, range(len(names))), names, strict=True))
    return [by_number.get(word, word) for word in chosen if word in by_number or word in names]


def driver_listing() -> str:
    """What NVIDIA's driver says of its GPUs: by its tool or, where a container has none, by its files."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "".join(file.read_text() for file in sorted(DRIVER.glob("gpus/*/information")))


def memory_of_gpus() -> list[int]:
    """Bytes of each GPU of the machine, where NVIDIA's tool is there to tell."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [int(line) << 20 for line in listing.split() if line.isdigit()]


def lock_free(devices: list[str], count: int, folder: Path) -> list[str]:
    """Lock `count` of the devices that nobody has locked, and name them; none if there are fewer."""
    claimed = {}
    for device in devices:
        if len(claimed) < count:
            lock = (folder / device).open("w")
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                claimed[device] = lock
    if len(claimed) < count:
        return []
    _held.extend(claimed.values())
    return list(claimed)
