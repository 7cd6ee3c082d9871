"""One run at a time in a folder; what a run that was killed has left at work is ended before the next begins."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stepdown.plan import locks

PACKAGE = Path(locks.__file__).parents[2]
START = (
    "from stepdown.plan.locks import start_run; start_run(sys.argv[1]); print('started', flush=True); time.sleep(60)"
)


class Run:
    """A process that is the run of a folder, as Snakemake is."""

    def __init__(self, folder, token):
        code = f"import sys, time; sys.path.append({str(PACKAGE)!r}); {START}"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", code, token], cwd=folder, **pipes)
        self.started = self.process.stdout.readline() == "started\n"

    def end(self):
        self.process.kill()
        return self.process.communicate()[1]


@pytest.fixture
def start(tmp_path):
    runs = []
    yield lambda token: runs.append(Run(tmp_path, token)) or runs[-1]
    for run in runs:
        run.end()


@pytest.fixture
def job(tmp_path):
    """A job's shell that leaves the file `begun` and goes on for a minute."""
    jobs = []

    def begin(token):
        environment = os.environ | {"STEPDOWN_RUN": token, "OMP_NUM_THREADS": "1"}
        command = ["bash", "-c", f"set -euo pipefail; source {PACKAGE}/begin_job.sh; touch begun; sleep 60 & wait"]
        jobs.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True))
        return jobs[-1]

    yield begin
    for process in jobs:
        process.kill()
        process.wait()


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_run_is_refused_with_the_process_of_the_first(start):
    first = start("one")
    assert first.started
    second = start("two")
    assert not second.started
    assert f"process {first.process.pid} on " in second.end()


def test_a_killed_run_leaves_no_lock(start):
    start("one").end()
    assert start("two").started


def test_what_a_killed_run_left_at_work_is_ended_first(start, job, tmp_path):
    run, left = start("one"), job("one")
    wait_for((tmp_path / "begun").exists)
    run.end()
    assert left.poll() is None
    following = start("two")
    assert following.started
    assert left.wait() == -signal.SIGTERM
    assert f"ending processes {left.pid}, " in following.end()


def test_a_job_that_begins_after_its_run_was_killed_does_nothing(start, job, tmp_path):
    start("one").end()
    assert start("two").started
    late = job("one")
    assert late.wait() == 1
    assert locks.GONE in late.communicate()[1]
    assert not (tmp_path / "begun").exists()


def test_a_scheduled_job_of_another_run_does_nothing(start, tmp_path, monkeypatch):
    assert start("two").started
    monkeypatch.chdir(tmp_path)
    with pytest.raises(locks.UserError, match="interrupted"):
        locks.join_run("one")
    locks.join_run("two")
    locks._held.pop().close()
