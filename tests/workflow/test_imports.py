"""A job does not wait for libraries that it has no use for: torch takes a second or two, transformers twice that."""

import subprocess
import sys

import pytest
from projects import ROOT

ITER = "results/iter1"
MASKS = f"{ITER}/tier_map.safetensors"
STEP = ("--model", "results/iter0/model", "--calibration", f"{ITER}/calibration.safetensors")
EVALS = ("--evals", "results/iter0/eval.json", f"{ITER}/eval.json")
SHARES = ("--dense", "0.5", "--mid-2-4", "0.3", "--topk", "0.2", "--iteration", "1")
TO_DENSE = ("--tier-map", "results/iter0/tier_map.safetensors")
TRAINING = ("--epochs", "0", "--step", "iter1", "--text", "pydoc", "--sequence-length", "8")

# Of each script the words, in a project that has run; outputs go to the folder {out}.
WITHOUT_TORCH = {
    "schedule.py": ("--output", "{out}/schedule.csv"),
    "summarize.py": (*EVALS, "--output", "{out}/summary.csv"),
    "compare.py": (
        *(*EVALS, "--benchmarks", "results/benchmarks"),
        *("--output", "{out}/compare.csv", "--output-figure", "{out}/compare.svg"),
    ),
    "plot.py": (
        *(*EVALS, "--training", f"{ITER}/training.json"),
        *("--tier-maps", MASKS, "--output-folder", "{out}"),
    ),
}
WITHOUT_TRANSFORMERS = {
    "score.py": (*STEP, *TO_DENSE, "--output", "{out}/scores.safetensors"),
    "degrade_dense_to_2_4.py": (
        *("--scores", f"{ITER}/scores.safetensors", *TO_DENSE, *SHARES),
        *("--output", "{out}/tier_map.safetensors"),
    ),
    "degrade_2_4_to_topk.py": (
        *(*STEP, "--tier-map-before", TO_DENSE[1], "--tier-map", f"{ITER}/tier_map_2_4.safetensors"),
        *("--output-tier-map", "{out}/tier_map.safetensors", "--output-model", "{out}/model"),
    ),
    "finetune.py": (
        *("--model", f"{ITER}/pruned_model", "--masks", MASKS, *TRAINING),
        *("--state", "{out}/state", "--output-model", "{out}/model", "--output-log", "{out}/training.json"),
    ),
    "pack.py": ("--model", f"{ITER}/finetuned_model", "--tier-map", MASKS, "--output", "{out}/packed"),
}


def imported(project, script, words):
    """The packages that a script imports as it runs."""
    order = [sys.executable, "-X", "importtime", ROOT / "workflow/scripts" / script, *words]
    run = subprocess.run(order, cwd=project, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = (line for line in run.stderr.splitlines() if line.startswith("import time:"))
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize("script", [*WITHOUT_TORCH, *WITHOUT_TRANSFORMERS])
def test_no_job_imports_what_it_does_not_need(project, tmp_path, script):
    words = (WITHOUT_TORCH | WITHOUT_TRANSFORMERS)[script]
    packages = imported(project, script, [word.format(out=tmp_path) for word in words])
    assert "stepdown" in packages and not packages & {"transformers", "accelerate", "peft", "datasets"}
    assert "torch" not in packages or script in WITHOUT_TRANSFORMERS
