"""The tests marked `gpu`, by pytest in a process of its own; without a GPU, with a pretended one."""

import re
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parents[2] / "tests"


def run(device: torch.device, tiny: bool) -> dict:
    pretended = ["-p", "pretend_gpu"] if device.type == "cpu" else []
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
    finished = subprocess.run(
        [*command, *pretended, str(TESTS / "gpu")], cwd=TESTS, capture_output=True, text=True, timeout=400
    )
    found = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", finished.stdout)}
    if finished.returncode:
        print(finished.stdout[-8000:], finished.stderr[-2000:])
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", finished.stdout, re.MULTILINE)
        raise RuntimeError(f"{found}: {' '.join(failed)}")
    return found


def table(found: dict) -> list[str]:
    return [", ".join(f"{count} {word}" for word, count in found.items() if word != "seconds")]
