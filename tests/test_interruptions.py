"""However a run ends, the same plain command goes on, and it ends byte for byte as a run that nothing disturbed."""

import contextlib
import hashlib
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from projects import command, make_project, snakemake

SEED = 4
RULES = (
    "base_model",
    "evaluate_base",
    "prune_oneshot",
    "calibrate",
    "score",
    "degrade_dense_to_2_4",
    "degrade_2_4_to_topk",
    "finetune",
    "evaluate",
    "summarize",
    "plot",
    "compare",
    "html_report",
)


# --- ways to end a run -----------------------------------------------------------------------------------------------


def end_job(main, jobs):
    for job in jobs:
        job.kill()


def end_main(main, jobs):
    main.kill()


def end_both(main, jobs):
    main.kill()
    end_job(main, jobs)


def interrupt(main, jobs):
    """Ctrl-C, which the terminal sends to all."""
    for process in (main, *jobs):
        process.send_signal(signal.SIGINT)


def terminate(main, jobs):
    main.terminate()


WAYS = (end_job, end_main, end_both, interrupt, terminate)


def strike(folder, due, end, delay, *targets):
    """Run the workflow, and end it `delay` seconds after `due(jobs)` is true; whether it came to that.

    jobs: the processes that run below Snakemake.
    """
    main = psutil.Popen(command(*targets), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while main.poll() is None:
        if due(main.children(recursive=True)):
            time.sleep(delay)
            with contextlib.suppress(psutil.NoSuchProcess):
                end(main, main.children(recursive=True))
            main.wait()
            return True
        time.sleep(0.02)
    assert main.returncode == 0
    return False


def running(rule):
    def due(jobs):
        return any(f"{rule}.py" in word for job in jobs for word in command_line(job))

    return due


def command_line(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def in_training(folder):
    return lambda jobs: any(folder.glob("results/state/**/checkpoint-*"))


# --- what it comes to ------------------------------------------------------------------------------------------------


def contents(results):
    """Hash of each file but for those that tell times."""
    tell_times = ("logs", "benchmarks", "report.html", "compare.csv", "compare.txt")
    paths = [path for path in Path(results).rglob("*") if path.is_file()]
    inside = {path.relative_to(results): path for path in paths}
    return {
        str(name): hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in inside.items()
        if name.parts[0] not in tell_times and name.name != "comparison.svg"
    }


def goes_on(folder, *targets):
    finished = snakemake(folder, *targets)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert not list(folder.rglob("*.partial"))
    assert "Nothing to be done" in snakemake(folder, *targets).stderr
    return contents(folder / "results")


def test_a_run_goes_on(project, tmp_path):
    folder, target = make_project(tmp_path), "results/iter1/eval.json"
    assert strike(folder, running("degrade_2_4_to_topk"), end_both, 1.0, target)
    assert strike(folder, in_training(folder), end_main, 0.0, target)
    found = goes_on(folder, target)
    expected = contents(project / "results")
    assert found == {name: expected[name] for name in found}
    assert {name.split("/")[0] for name in found} == {"iter0", "iter1"}


@pytest.mark.slow
def test_a_run_that_is_killed_everywhere_goes_on(project, tmp_path):
    folder, chance = make_project(tmp_path), random.Random(SEED)
    strikes = [(running(rule), way) for rule in RULES for way in chance.sample(WAYS, 2)]
    strikes += [(in_training(folder), way) for way in chance.sample(WAYS, 4)]
    struck = [strike(folder, due, way, chance.uniform(0, 3)) for due, way in strikes]
    assert sum(struck) >= 20
    assert goes_on(folder) == contents(project / "results")


@pytest.mark.slow
def test_a_run_goes_on_once_there_is_room_again(project, tmp_path):
    """No file may be longer than the limit, which stands for a disk of which so much is free."""
    folder = make_project(tmp_path)
    for limit in (30_000, 300_000, 1_500_000):
        finished = snakemake(
            folder, preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        )
        assert finished.returncode == 1
        assert "File too large" in finished.stderr and "Traceback" not in finished.stderr, finished.stderr
    assert goes_on(folder) == contents(project / "results")


def test_a_training_left_in_the_middle_is_not_resumed_by_another(project, tmp_path):
    """What is left of a training with other settings is dropped."""
    folder = tmp_path / "project"
    shutil.copytree(project, folder, symlinks=True)
    (folder / "results/iter1/training.json").unlink()
    target, other = "results/iter1/training.json", "recovery={learning_rate: 2.0e-3}"
    assert strike(folder, in_training(folder), end_both, 0.0, target, "--config", other)
    finished = snakemake(folder, target)
    assert finished.returncode == 0, finished.stderr[-3000:]
    expected = contents(project / "results")
    assert contents(folder / "results") == expected
