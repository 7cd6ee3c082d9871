"""A `--use-conda` run is driven by the packages of workflow/envs/workflow.yaml and what they bring along, no others."""

import importlib.metadata
import os
import re
import subprocess
import sys
import venv

import pytest
import yaml
from packaging.requirements import Requirement
from projects import ROOT, command, make_project

PACKAGES = yaml.safe_load((ROOT / "workflow/envs/workflow.yaml").read_text())["dependencies"][-1]["pip"]


def brought_along(packages):
    """The installed packages of these names, and all that they require, in any depth."""
    found, waiting = {}, [Requirement(package) for package in packages]
    while waiting:
        requirement = waiting.pop()
        key = (requirement.name.lower(), *sorted(requirement.extras))
        if key not in found:
            found[key] = importlib.metadata.distribution(requirement.name)
            for needed in map(Requirement, found[key].requires or []):
                if not needed.marker or any(needed.marker.evaluate({"extra": of}) for of in ("", *requirement.extras)):
                    waiting.append(needed)
    return found.values()


def assert_planned(folder, python, **variables):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    order = [*python, *command("-n")[1:]]
    plan = subprocess.run(order, cwd=folder, env=environment, capture_output=True, text=True)
    assert plan.returncode == 0, plan.stdout[-2000:] + plan.stderr[-2000:]
    assert re.search(r"^total +\d{2}", plan.stdout, re.MULTILINE)
    code = "import snakemake, torch"
    torch = subprocess.run([*python, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert "No module named 'torch'" in torch.stderr


def test_the_driver_needs_nothing_else(tmp_path):
    """A Python that sees links to these packages and nothing else of what is installed."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for package in brought_along(PACKAGES):
        for name in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
            if not (packages / name).exists():
                (packages / name).symlink_to(package.locate_file(name))
    folder, python = make_project(tmp_path / "project"), [sys.executable, "-S"]
    assert_planned(folder, python, PYTHONPATH=str(packages))
    # Jobs need more, which is told before the first of them.
    order, environment = [*python, *command()[1:]], os.environ | {"PYTHONPATH": str(packages)}
    run = subprocess.run(order, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr and not (folder / "results").exists()
    assert "has no torch, which jobs need; add --use-conda" in run.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_driver_is_enough_in_an_environment_of_its_own(tmp_path):
    """The same in a new environment, from the package index."""
    venv.create(tmp_path / "driver", with_pip=True)
    python = tmp_path / "driver/bin/python"
    order = [python, "-m", "pip", "install", "-q", "-c", ROOT / "requirements.lock", *PACKAGES]
    subprocess.run(order, check=True, capture_output=True)
    assert_planned(make_project(tmp_path / "project"), [python])
