"""Without a GPU: what needs one runs on one that is pretended, and the GPU check runs in small."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

CHECK = REPOSITORY / "benchmarks/gpu_check"
TESTS = REPOSITORY / "tests"


def run(*words: object, limit: int = 1200) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, words)], cwd=TESTS, capture_output=True, text=True, timeout=limit)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which these tests run as they are")
def test_what_needs_a_gpu_runs_on_a_pretended_one():
    finished = run("-m", "pytest", "-o", "addopts=", "-m", "gpu", "-p", "pretend_gpu", TESTS / "gpu")
    assert finished.returncode == 0, finished.stdout[-6000:]
    assert "skipped" not in finished.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_gpu_check_in_small(tmp_path):
    finished = run(CHECK, "--tiny", "--output", tmp_path / "found.json")
    assert finished.returncode == 0, finished.stdout[-6000:]
    sections = json.loads((tmp_path / "found.json").read_text())["sections"]
    assert sections.keys() == {"kernels", "tests", "scripts", "pruning_time", "training_memory"}
    assert not [name for name, found in sections.items() if "error" in found]


@pytest.mark.slow
def test_every_script_on_a_pretended_gpu(tmp_path):
    """In numbers a pretended GPU is the CPU; what a real one would refuse raises."""
    pretended = (TESTS / "pretend_gpu.py", CHECK / "__main__.py")
    finished = run(*pretended, "--tiny", "--only", "scripts", "pruning_time", "--output", tmp_path / "found.json")
    assert finished.returncode == 0, finished.stdout[-6000:]
    apart = json.loads((tmp_path / "found.json").read_text())["sections"]["scripts"]["apart"]
    assert max(apart.values()) == 0


def test_a_section_that_fails_does_not_end_the_others(tmp_path):
    """`scripts` needs the bundled model; here its scripts are hidden from it."""
    code = (
        "import sys, pathlib, runpy; sys.argv = sys.argv[1:]; sys.path[:0] = [sys.argv[0], '../workflow/scripts']\n"
        "import scripts; scripts.SCRIPTS = pathlib.Path('nowhere')\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    finished = run(
        "-c", code, CHECK, "--tiny", "--only", "scripts", "training_memory", "--output", tmp_path / "found.json"
    )
    assert finished.returncode == 1
    sections = json.loads((tmp_path / "found.json").read_text())["sections"]
    assert "nowhere" in sections["scripts"]["error"] and "error" not in sections["training_memory"]
    assert "scripts: FAILED" in finished.stdout and "training_memory: ok" in finished.stdout
