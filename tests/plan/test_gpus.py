"""Each job has a GPU of its own; the driver's tool is replaced by one that lists what a test says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepdown.plan import gpus

PACKAGE = Path(gpus.__file__).parents[2]
CLAIM = """
import os, sys
sys.path.append(sys.argv[1])
from stepdown.plan.gpus import claim_gpus
claim_gpus(int(sys.argv[2]))
print(os.environ.get("CUDA_VISIBLE_DEVICES", "none"), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Make a machine with GPUs, a line of the driver's listing each."""

    def make(*lines):
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


@pytest.fixture
def job():
    """Start a job that claims so many GPUs and holds them."""
    jobs = []

    def start(count=1):
        command = [sys.executable, "-c", CLAIM, str(PACKAGE), str(count)]
        jobs.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return jobs[-1]

    yield start
    for process in jobs:
        process.kill()
        process.communicate()


def gpu(number):
    return f"GPU {number}: NVIDIA H200 (UUID: GPU-{number}a-b)"


def test_without_its_tool_the_driver_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "DRIVER", tmp_path)
    assert gpus.visible_gpus() == []
    for number in (0, 1):
        file = tmp_path / f"gpus/0000:0{number}:00.0/information"
        file.parent.mkdir(parents=True)
        file.write_text(f"Model: \t\t NVIDIA H200\nGPU UUID: \t GPU-{number}a-b\nDevice Minor: \t {number}\n")
    assert gpus.visible_gpus() == ["GPU-0a-b", "GPU-1a-b"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpus.visible_gpus() == ["GPU-1a-b"]


def test_each_job_has_its_own_gpu_and_a_third_waits_for_one_of_two(machine, job):
    machine(gpu(0), gpu(1))
    first, second = job(), job()
    devices = {first.stdout.readline(), second.stdout.readline()}
    assert devices == {"GPU-0a-b\n", "GPU-1a-b\n"}
    third = job()
    with pytest.raises(subprocess.TimeoutExpired):
        third.wait(1.5)
    first.kill()
    assert third.stdout.readline() in devices


def test_a_job_with_several_processes_has_all_its_gpus_or_none(machine, job):
    machine(gpu(0), gpu(1), gpu(2))
    assert job(2).stdout.readline() == "GPU-0a-b,GPU-1a-b\n"
    waiting = job(2)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(1.5)
    assert job().stdout.readline() == "GPU-2a-b\n"


def test_more_gpus_than_there_are(machine):
    machine(gpu(0))
    with pytest.raises(gpus.UserError, match="2 GPUs asked for, 1 there"):
        gpus.claim_gpus(2)


@pytest.mark.parametrize(
    ("chosen", "left"), [("1", ["GPU-1a-b"]), ("1,0", ["GPU-1a-b", "GPU-0a-b"]), ("", []), ("GPU-0a-b", ["GPU-0a-b"])]
)
def test_gpus_that_the_user_or_a_scheduler_chose(machine, monkeypatch, chosen, left):
    machine(gpu(0), gpu(1))
    assert gpus.visible_gpus() == ["GPU-0a-b", "GPU-1a-b"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert gpus.visible_gpus() == left


def test_a_divided_gpu_is_used_by_its_parts(machine):
    machine(gpu(0), "  MIG 1g.18gb     Device  0: (UUID: MIG-1-2)", "  MIG 1g.18gb     Device  1: (UUID: MIG-3-4)")
    assert gpus.visible_gpus() == ["MIG-1-2", "MIG-3-4"]


def test_without_the_driver_nothing_changes(monkeypatch):
    monkeypatch.setenv("PATH", "")
    before = dict(os.environ)
    gpus.claim_gpus()
    assert dict(os.environ) == before
