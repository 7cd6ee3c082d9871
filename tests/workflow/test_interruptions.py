"""However a run ends, the same plain command goes on, and it ends byte for byte as a run that nothing disturbed."""

import contextlib
import hashlib
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from projects import command, make_project, snakemake

SEED = 4
TRAINING = "a training with a checkpoint"


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


def strike(folder, choose, end, delay, *targets):
    """Run the workflow, and end it `delay` seconds after `choose(what is at work)` names something; returns that.

    None says that the run came to its own end.
    """
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    main = psutil.Popen(command(*targets), cwd=folder, preexec_fn=heed_ctrl_c, **quiet)
    while main.poll() is None:
        if chosen := choose(at_work(folder, main)):
            time.sleep(delay)
            # The job may have ended meanwhile, and the next not have begun.
            while main.poll() is None and not jobs_of(main):
                time.sleep(0.02)
            with contextlib.suppress(psutil.NoSuchProcess):
                end(main, jobs_of(main))
            main.wait()
            return chosen
        time.sleep(0.02)
    assert main.returncode == 0
    return None


def heed_ctrl_c():
    """What a shell starts in the background ignores it, and so does all that is started by that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def jobs_of(main):
    with contextlib.suppress(psutil.NoSuchProcess):
        return main.children(recursive=True)
    return []


def at_work(folder, main):
    """The rules whose jobs run below Snakemake, and whether a training could be resumed."""
    found = set()
    for job in jobs_of(main):
        with contextlib.suppress(psutil.Error):
            found |= {Path(word).stem for word in job.cmdline() if word.endswith(".log")}
    resumable = "finetune" in found and any(folder.glob("results/state/**/checkpoint-*"))
    return found | ({TRAINING} if resumable else set())


def only(name):
    return lambda names: name in names and name


# --- what it comes to ------------------------------------------------------------------------------------------------


def contents(results):
    """Hash of each file but for those that tell times."""
    tell_times = ("logs", "benchmarks", "report.html", "compare.csv", "compare.txt", "measurements.json")
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
    assert strike(folder, only("degrade_2_4_to_topk"), end_both, 1.0, target)
    assert strike(folder, only(TRAINING), end_main, 0.0, target)
    found = goes_on(folder, target)
    expected = contents(project / "results")
    assert found == {name: expected[name] for name in found}
    assert {name.split("/")[0] for name in found} == {"iter0", "iter1"}


@pytest.mark.slow
def test_a_run_that_is_killed_everywhere_goes_on(project, tmp_path):
    folder, chance, struck = make_project(tmp_path), random.Random(SEED), Counter()

    def choose(names):
        return next((name for name in sorted(names) if struck[name] < 2), None)

    while name := strike(folder, choose, chance.choice(WAYS), chance.uniform(0, 3)):
        struck[name] += 1
    rules = {path.stem for path in (project / "results/logs").rglob("*.log")}
    assert struck.keys() == rules | {TRAINING}
    assert struck.total() >= 20
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
    assert strike(folder, only(TRAINING), end_both, 0.0, target, "--config", other)
    finished = snakemake(folder, target)
    assert finished.returncode == 0, finished.stderr[-3000:]
    expected = contents(project / "results")
    assert contents(folder / "results") == expected
