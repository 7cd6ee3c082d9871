"""What a training in progress keeps on disk: for itself alone, and only while it is the same training."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import peft
import safetensors
import torch
import transformers
from torch import Tensor

from ..errors import UserError

# The code that trains.
TRAINING = ("recovery", "settings", "trainer", "losses", "bf16_adamw", "distillation", "lora", "sharding")


def fingerprint(settings: object, windows: Iterable[Tensor], files: Iterable[Path]) -> str:
    """A hash of all that a training depends on: settings, by their `repr`, tokens, the contents of files (model, tier
    map), and code."""
    digest = hashlib.sha256()
    for package in (torch, transformers, peft):
        digest.update(f"{package.__name__} {package.__version__}\n".encode())
    digest.update(repr(settings).encode())
    for tokens in windows:
        digest.update(f"{tuple(tokens.shape)}".encode() + tokens.contiguous().numpy().tobytes())
    for path in (*(Path(__file__).with_name(f"{name}.py") for name in TRAINING), *files):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextlib.contextmanager
def training_state(folder: Path, fingerprint: str) -> Iterator[Path]:
    """The folder a training keeps its checkpoints in, locked; gone once the block ends well, kept if it does not.

    What was started from anything else than `fingerprint` says is wiped. Raises UserError if another process holds it.
    """
    with _locked(folder):
        checkpoints, record = folder.resolve() / "checkpoints", folder / "fingerprint"
        # The Trainer notes its best checkpoint by path: a folder that was moved is another one.
        identity = f"{fingerprint} {checkpoints}\n"
        if not record.exists() or record.read_text(encoding="utf-8") != identity:
            shutil.rmtree(checkpoints, ignore_errors=True)
            record.write_text(identity, encoding="utf-8")
        checkpoints.mkdir(exist_ok=True)
        yield checkpoints
        shutil.rmtree(checkpoints)
        record.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder against every other process; the kernel frees it with the process, however that ends."""
    path = folder / "lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read() or "another process"
                raise UserError(f"{folder}: {holder} is training here: wait for it, or end it first") from None
            # Whoever held it may have removed the file since it was opened here.
            if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                continue
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            yield
            path.unlink()
            with contextlib.suppress(OSError):
                folder.rmdir()
            return


def last_checkpoint(state: Path) -> Path | None:
    """The last complete checkpoint in a state folder; later ones that a kill has left unfinished are removed."""
    for checkpoint in sorted(state.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if _is_complete(checkpoint):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def _is_complete(checkpoint: Path) -> bool:
    """Whether every file the Trainer resumes from is there and has not lost its end."""
    shards = list(checkpoint.glob("*.safetensors"))
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for shard in shards:
            # Opening compares the header with the length of the file.
            with safetensors.safe_open(shard, "pt"):
                pass
    except (OSError, ValueError, safetensors.SafetensorError):
        return False
    # One state of the random numbers for each process, and in shards one of the optimizer.
    optimizers, random = (list(checkpoint.glob(names)) for names in ("optimizer*.pt", "rng_state*.pth"))
    if not shards or not random or len(optimizers) not in (1, len(random)):
        return False
    # torch saves zip archives, whose directory is at the end.
    return all(zipfile.is_zipfile(path) for path in (*optimizers, *random, checkpoint / "scheduler.pt"))
