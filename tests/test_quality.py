"""The benchmark of what each ingredient brings: its tables are of real configurations, and add up."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from stepdown.plan.preflight import complete_config
from stepdown.plan.schedule import read_schedule

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("quality", ROOT / "benchmarks/quality.py")
quality = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(quality)


@pytest.mark.parametrize("name", quality.TABLES)
def test_every_variant_is_a_configuration(name):
    schema = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())
    default = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    variants = quality.TABLES[name](read_schedule(ROOT / "config/progressive_schedule.csv"))
    for variant in quality.at_rates(variants, [1e-3]):
        complete = complete_config(quality.merged(default, variant.overlay), schema)
        assert complete["recovery"]["learning_rate"] == 1e-3
    assert len({variant.name for variant in variants}) == len(variants)


def test_steps_are_compared_at_equal_tokens():
    rows = read_schedule(ROOT / "config/progressive_schedule.csv")
    *trained, dense = quality.steps(rows)
    assert dense.rows == (("1", "0", "0", 11),)
    assert {step for variant in trained for step in variant.steps} == {"oneshot/three-tier", "iter5"}


def test_the_table_has_means_and_half_of_the_range():
    rows = [("a", 0, 30.0), ("a", 1, 31.0), ("a", 2, 32.5), ("b", 0, 40.0)]
    figures = pd.DataFrame(
        [
            {"variant": name, "step": "iter1", "seed": seed, "text": "t", "moment": "finetuned", "perplexity": value}
            for name, seed, value in rows
        ]
    )
    table = quality.table(figures)
    assert table["t", "finetuned"].tolist() == ["31.17 ± 1.25", "40.00"]
    assert ("t", "refitted") not in table


@pytest.mark.slow
def test_a_table_is_made_through_the_workflow(tmp_path):
    sizes = {
        "calibration": {"samples": 4, "sequence_length": 32, "batch_size": 4},
        "reconstruction": {"samples": 4, "steps": 2},
        "evaluation": {"sequence_length": 32, "tokens": 1024},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(sizes))
    command = [sys.executable, ROOT / "benchmarks/quality.py", "--configfile", tmp_path / "tiny.yaml"]
    command += ["--folder", tmp_path / "runs", "--only", "fisher, over", "and channels", "--cores", "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "fisher, over the model" in printed and "reconstructed" in printed
    figures = pd.read_csv(tmp_path / "runs/ingredients/quality.csv")
    assert set(figures.moment) == {"base", "pruned", "refitted", "reconstructed", "finetuned"}
    pruned = figures[figures.moment == "pruned"].set_index("variant").perplexity
    assert pruned["fisher, over the model"] != pruned["and channels sorted"]
