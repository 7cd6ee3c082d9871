"""Each conda environment, built from its own file, runs its rules with nothing of any other Python in sight.

Where no conda is to be had, a stand-in answers Snakemake's calls over venv and pip.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from projects import ROOT, make_project
from test_workflow_plan import copy_project
from test_zero_shot import QUESTIONS, TASK

ENVIRONMENTS = ROOT / "workflow/envs"
# What belongs to one environment alone, by what it is imported as.
OWN = {
    "prune": [],
    "finetune": ["peft"],
    "evaluate": [],
    "report": ["matplotlib"],
    "workflow": ["snakemake"],
    "zero_shot": ["lm_eval"],
}


@pytest.fixture
def standin(shared):
    """The environment variables that put the stand-in for conda before everything else."""
    folder = shared / "tools/conda-standin/bin"
    if not folder.is_dir():
        pytest.skip("no stand-in for conda here")
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


def build(name, prefix, environment):
    """An environment as Snakemake has it built."""
    order = ["conda", "env", "create", "--file", str(ENVIRONMENTS / f"{name}.yaml"), "--prefix", str(prefix)]
    subprocess.run(order, env=environment, check=True, capture_output=True)
    return prefix / "bin/python"


def installed(prefix):
    """Names and versions of what an environment holds, and which of the packages of others it can import."""
    others = sorted(set().union(*OWN.values()) | {"torch", "pytest"})
    code = (
        "import importlib.metadata, importlib.util, json;"
        "print(json.dumps([{d.name.replace('-', '_'): d.version for d in importlib.metadata.distributions()},"
        f"[name for name in {others} if importlib.util.find_spec(name)]]))"
    )
    printed = subprocess.run([prefix / "bin/python", "-I", "-c", code], capture_output=True, text=True, check=True)
    return json.loads(printed.stdout)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_page_runs_rules_in_the_environments_they_name(standin, tmp_path):
    """Every line of the first block of docs/conda.md, by somebody whose home is empty."""
    folder, home = make_project(tmp_path / "project"), tmp_path / "home"
    home.mkdir()
    (folder / "tasks").mkdir()
    (folder / "tasks/continue.yaml").write_text(TASK.format(files=folder / "questions.jsonl"))
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    config = yaml.safe_load((folder / "mine.yaml").read_text())
    config["zero_shot"] = {"tasks": ["continue"], "task_folder": "tasks"}
    (folder / "config/config.yaml").write_text(yaml.safe_dump(config))
    for line in re.search(r"```\n(.*?)```", (ROOT / "docs/conda.md").read_text(), re.DOTALL)[1].splitlines():
        environment = standin | {"HOME": str(home)}
        finished = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr[-3000:]
        # Snakemake runs in an environment that has nothing else: a rule outside its own would find no torch.
        assert (folder / "results/report.html").exists() == line.endswith("--use-conda")
    assert (folder / "results/iter2/zero_shot.json").exists()
    for file in (folder / ".snakemake/conda").glob("*.yaml"):
        check_environment(file, file.with_suffix(""))
    shutil.rmtree(folder / ".snakemake/conda")


def check_environment(file, prefix):
    name = next(path.stem for path in ENVIRONMENTS.glob("*.yaml") if path.read_bytes() == file.read_bytes())
    versions, importable = installed(prefix)
    pins = dict(re.findall(r"- ([\w-]+)==(\S+)", file.read_text()))
    pins = {name.replace("-", "_"): version for name, version in pins.items()}
    assert {pin: versions[pin].partition("+")[0] for pin in pins} == pins
    torch = ["torch"] if "torch" in pins else []
    assert sorted(importable) == sorted(OWN[name] + torch)


# --- a driver with nothing of the jobs in it -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_driver_alone_plans_and_runs_a_job_in_its_environment(standin, tmp_path):
    folder = copy_project(tmp_path).folder
    python = build("workflow", tmp_path.with_name("driver"), standin)
    for step in ("iter0", "iter1", "iter2", "iter3", "iter4", "iter5", "oneshot/three-tier"):
        for name in ("eval.json", "training.json"):
            (folder / "results" / step).mkdir(parents=True, exist_ok=True)
            (folder / "results" / step / name).write_text("{}")

    def run(*arguments):
        words = [python, "-m", "snakemake", "-j1", *arguments]
        return subprocess.run(words, cwd=folder, env=standin, capture_output=True, text=True)

    summary = ("--allowed-rules", "summarize", "--", "results/summary.csv")
    assert run("--dry-run").returncode == 0
    plain = run(*summary)
    assert plain.returncode == 1 and "Traceback" not in plain.stderr
    assert "has no torch, which jobs need; add --use-conda" in plain.stderr.splitlines()[-1]
    finished = run("--use-conda", *summary)
    assert finished.returncode == 0, finished.stderr[-3000:]
    log = (folder / "results/logs/summarize.log").read_text()
    assert log.startswith(str(folder / ".snakemake/conda")), log


def test_use_conda_without_conda_is_one_line(tmp_path):
    folder = copy_project(tmp_path).folder
    (tmp_path / "python").symlink_to(sys.executable)
    path = ":".join([str(tmp_path), "/usr/bin", "/bin"])
    if shutil.which("conda", path=path):
        pytest.skip("conda is everywhere here")
    command = [sys.executable, "-m", "snakemake", "-n", "--use-conda"]
    finished = subprocess.run(command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    assert finished.stderr.splitlines()[-1].startswith("error: --use-conda: no conda on PATH")
