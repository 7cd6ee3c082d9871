"""A copy of the project with a tiny model and texts of Python's own documentation, in which the real workflow runs."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from families import make_model

ROOT = Path(__file__).parent.parent
ROWS = [("0.90", "0.10", "0.00", 1), ("0.50", "0.30", "0.20", 2)]
CONFIG = {
    "model": "model",
    "device": "cpu",
    "schedule": "schedule.csv",
    "oneshot": ["three-tier", "sparsegpt-2of4"],
    "oneshot_epochs": 1,
    "calibration": {"samples": 4, "sequence_length": 32, "batch_size": 4},
    "recovery": {
        "sequence_length": 32,
        "tokens_per_epoch": 512,
        "batch_size": 8,
        "gradient_accumulation": 1,
        "learning_rate": 1.0e-3,
        "evaluation_steps": 2,
    },
    "evaluation": {"sequence_length": 32, "batch_size": 16, "tokens": 2048},
    "speed": {"prompt_tokens": 8, "new_tokens": 2, "repeats": 1},
}


def command(*arguments):
    return [sys.executable, "-m", "snakemake", "-j1", "--configfile=mine.yaml", *arguments]


def snakemake(folder, *arguments, **options):
    return subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, **options)


def make_project(folder):
    """Copy what belongs to the project into `folder`, and make the model, schedule and configuration beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("Snakefile", "workflow", "config", "profiles"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, folder / name)
    make_model("llama", folder / "model", vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "resources/pydoc-llama" / name, folder / "model" / name)
    with (folder / "schedule.csv").open("w") as file:
        csv.writer(file).writerows(
            [("iteration", "dense", "mid_2_4", "topk", "dense_to_2_4", "mid_2_4_to_topk", "epochs")]
            + [(i, *shares, "-", "-", epochs) for i, (*shares, epochs) in enumerate(ROWS, 1)]
        )
    (folder / "mine.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder
