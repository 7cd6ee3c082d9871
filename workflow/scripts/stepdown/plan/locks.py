"""One run of the workflow at a time in a folder, and no leftovers of one that was killed. Standard library only.

A run is a Snakemake process and the jobs it has started. It holds one file, which tells its token and its process; all
its jobs share another. Both are locks of the kernel: however a process ends, they end with it, and none goes stale.
"""

import contextlib
import fcntl
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import IO

from ..errors import UserError

FOLDER = Path(".snakemake/stepdown")
RUN, JOBS = FOLDER / "run", FOLDER / "jobs"
GONE = "this job belongs to a run that was interrupted: nothing is done"
# A file that is closed is no longer locked.
_held: list[IO] = []


def start_run(token: str) -> None:
    """Make this process the run of the folder, until it ends, and end what an earlier one has left at work.

    Jobs on this machine are ended, as only their run could tell that they finished; a training loses no more than what
    came after its last checkpoint. Those on other machines are waited for; those that have not begun yet find that
    they are out of date. Raises UserError while another run holds the folder.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    run = RUN.open("a+", encoding="utf-8")
    if not _try_lock(run):
        run.seek(0)
        holder = run.readline().strip() or "another process"
        raise UserError(f"{Path.cwd()}: {holder} runs the workflow here: wait for it, or end it first")
    run.truncate(0)
    run.write(f"process {os.getpid()} on {socket.gethostname()}\n{token}\n")
    run.flush()
    _held.append(run)
    _end_leftovers()


def join_run(token: str) -> None:
    """Share the lock of the jobs until this process ends. Raises UserError if another run has begun since."""
    jobs = JOBS.open(encoding="utf-8")
    fcntl.flock(jobs, fcntl.LOCK_SH)
    if token not in RUN.read_text(encoding="utf-8"):
        raise UserError(GONE)
    _held.append(jobs)


def _end_leftovers() -> None:
    said = ""
    with JOBS.open("w", encoding="utf-8") as jobs:
        while not _try_lock(jobs):
            ended = sorted(pid for pid in _holders(JOBS) if _end(pid))
            line = f"ending processes {', '.join(map(str, ended))}" if ended else "waiting for jobs on other machines"
            if line != said:
                print(f"{line}, left of a run that was interrupted", file=sys.stderr)
                said = line
            time.sleep(0.5)


def _try_lock(file: IO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holders(path: Path) -> list[int]:
    """The processes of this machine, but for this one, that have a file open."""
    processes = [process for process in Path("/proc").glob("[0-9]*") if process.name != str(os.getpid())]
    return [int(process.name) for process in processes if _has_open(process, path)]


def _has_open(process: Path, path: Path) -> bool:
    # Processes and files come and go meanwhile, and those of other users cannot be looked at.
    with contextlib.suppress(OSError):
        for file in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                if file.samefile(path):
                    return True
    return False


def _end(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGTERM)
    except (ProcessLookupError, PermissionError):
        return False
    return True
