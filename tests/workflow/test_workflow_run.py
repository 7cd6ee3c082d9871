"""The real workflow, with its real scripts, on a tiny model: two iterations, one-shot runs, tables and report."""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from projects import ROOT, ROWS, snakemake

from stepdown.models.checkpoint import Checkpoint
from stepdown.models.tier_maps import read_tier_map
from stepdown.packed.model import load_packed
from stepdown.tensors.patterns import n_of_m
from stepdown.tensors.tiers import count_tiers, keep_mask, tier_counts, violations

SCRIPTS = ROOT / "workflow/scripts"


def result(project, step, name="eval.json"):
    return json.loads((project / "results" / step / name).read_text())


@pytest.mark.parametrize(("step", "row"), [("iter1", 0), ("iter2", 1), ("oneshot/three-tier", 1)])
@pytest.mark.parametrize("model", ["pruned_model", "refitted_model", "finetuned_model"])
def test_tiers_hold_in_every_matrix_of_every_checkpoint(project, step, row, model):
    folder = project / "results" / step
    tier_map, checkpoint = read_tier_map(folder / "tier_map.safetensors"), Checkpoint(folder / model)
    before = read_tier_map(project / "results/iter1/tier_map.safetensors").tiers if step == "iter2" else {}
    assert len(tier_map.tiers) == 35
    counts = [count_tiers(tiers) for tiers in tier_map.tiers.values()]
    blocks = sum(map(sum, counts))
    assert tuple(map(sum, zip(*counts, strict=True))) == tier_counts(ROWS[row][:3], blocks)
    for name, tiers in tier_map.tiers.items():
        assert violations(checkpoint.matrix(name), tiers, tier_map.block_size, tier_map.k) == 0
        assert name not in before or (tiers >= before[name]).all()


def test_finetuning_keeps_every_zero_and_changes_the_rest(project):
    folder = project / "results/oneshot/three-tier"
    refitted, finetuned = Checkpoint(folder / "refitted_model"), Checkpoint(folder / "finetuned_model")
    tier_map = read_tier_map(folder / "tier_map.safetensors")
    assert result(project, "oneshot/three-tier", "training.json")["best_step"] > 0
    for name, tiers in tier_map.tiers.items():
        before, after = refitted.matrix(name), finetuned.matrix(name)
        assert not after[~keep_mask(before, tiers, tier_map.block_size)].any()
    assert (before != after).any()


def test_swaps_leave_as_many_zeros_elsewhere(project):
    folder = project / "results/oneshot/three-tier"
    pruned, refitted = Checkpoint(folder / "pruned_model"), Checkpoint(folder / "refitted_model")
    names = read_tier_map(folder / "tier_map.safetensors").tiers
    before, after = (torch.cat([model.matrix(name).flatten() == 0 for name in names]) for model in (pruned, refitted))
    assert before.sum() == after.sum() and (before != after).any()


def test_evaluations_say_what_was_found(project):
    found = result(project, "iter2")
    assert found["tier_shares"].keys() == {"dense", "mid_2_4", "topk"}
    assert found["sparsity"]["per_tier"]["mid_2_4"] == pytest.approx(0.5, abs=0.02)
    assert found["finetuning"] == {"method": "full", "epochs": 2, "tokens": 1024}
    assert found["perplexity"]["pydoc"]["base"] == result(project, "iter0")["perplexity"]["pydoc"]["base"]
    assert "windows of 32 tokens" in found["protocol"] and str(project) not in json.dumps(found)


def test_the_one_shot_run_trains_on_as_many_tokens(project):
    tokens = [result(project, step, "training.json")["tokens"] for step in ("iter1", "iter2", "oneshot/three-tier")]
    assert tokens[0] + tokens[1] == tokens[2] == 3 * 512


def test_a_run_by_method_and_pattern_is_exact_and_stays_so(project):
    folder = project / "results/oneshot/sparsegpt-2of4"
    report, finetuned = (
        result(project, "oneshot/sparsegpt-2of4", "pruning.json"),
        Checkpoint(folder / "finetuned_model"),
    )
    assert len(report["matrices"]) == 35
    assert all(n_of_m(2, 4).fault(finetuned.matrix(name)) == "" for name in report["matrices"])
    assert result(project, "oneshot/sparsegpt-2of4", "training.json")["best_step"] > 0
    found = result(project, "oneshot/sparsegpt-2of4")
    assert found["sparsity"]["overall"] == found["sparsity"]["target"] == 0.5
    assert (
        set(found["sparsity"]["target_per_matrix"].values()) == set(found["sparsity"]["per_matrix"].values()) == {0.5}
    )


def test_all_runs_are_compared_with_their_cost(project):
    with (project / "results/compare.csv").open() as file:
        table = list(csv.DictReader(file))
    runs = ["iter0", "iter1", "iter2", "oneshot/sparsegpt-2of4", "oneshot/three-tier"]
    assert [row["run"] for row in table] == runs
    assert all(float(row["pruning_seconds"]) > 0 and float(row["finetuning_seconds"]) > 0 for row in table[1:])
    assert max(float(row["peak_memory_mb"]) for row in table[1:]) > 100


def test_table_figures_and_report_are_there(project):
    with (project / "results/summary.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["iter0", "iter1", "iter2", "oneshot/three-tier"]
    assert "oneshot/three-tier" in (project / "results/summary.txt").read_text()
    report = (project / "results/report.html").read_text()
    assert all(name in report for name in ("perplexity", "tier_shares", "tier_maps", "training", "comparison"))


def test_a_finetuned_checkpoint_loads_as_usual(project):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = project / "results/iter2/finetuned_model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model(**tokenizer("import os", return_tensors="pt")).logits.isfinite().all()


def test_there_is_nothing_left_to_do(project):
    assert "Nothing to be done" in snakemake(project).stderr


def test_the_users_model_is_linked_and_never_written_to(project):
    files = {path.name for path in (project / "model").iterdir()}
    assert files == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (project / "results/iter0/unsorted/model/model.safetensors").is_symlink()


def script(name, *words, folder=None):
    command = [sys.executable, SCRIPTS / name, *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--tier-map": "results/iter0/tier_map.safetensors"}, "tier map of iteration 0, but"),
        (
            {"--model": "results/iter0/model", "--tier-map": "results/iter2/tier_map.safetensors"},
            "tier map of iteration 2, but",
        ),
        ({"--calibration": "results/iter1/tier_map.safetensors"}, "norms found"),
        (
            {"--calibration": "results/iter1/calibration.safetensors"},
            "not the calibration of the tier map's model",
        ),
        ({"--model": "nowhere"}, "nowhere: is not a folder"),
        ({"--tier-map": "schedule.csv"}, "not a readable"),
        ({"--output": "schedule.csv/scores"}, "schedule.csv"),
    ],
)
def test_a_script_tells_a_mistake_in_one_line(project, change, message):
    words = {
        "--model": "results/iter1/finetuned_model",
        "--calibration": "results/iter2/calibration.safetensors",
        "--tier-map": "results/iter1/tier_map.safetensors",
        "--output": "scores.safetensors",
    } | change
    finished = script("score.py", *(part for flag, path in words.items() for part in (flag, project / path)))
    assert finished.returncode == 1
    assert len(finished.stderr.splitlines()) == 1 and message in finished.stderr, finished.stderr
    assert not (project / "scores.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--text": "wikitext2"}, "iter0/eval.json: measured on other texts"),
        ({"--sequence-length": "16"}, "in other windows"),
        ({"--base-eval": "results/iter1/training.json"}, "training.json: not the eval.json of the base model model"),
        ({"--training": "results/iter0/eval.json"}, "eval.json: not the training.json of iter1"),
        ({"--training": "schedule.csv"}, "schedule.csv: not the training.json of iter1: no JSON"),
        ({"--training": "results/iter2/training.json"}, 'key step is "iter2", not "iter1"'),
        (
            {"--base-eval": "results/iter1/eval.json"},
            "iter1/eval.json: not the eval.json of the base model model: key step",
        ),
        (
            {"--model-name": "another"},
            'iter0/eval.json: not the eval.json of the base model another: key model is "model"',
        ),
        ({"--masks": "results/iter2/tier_map.safetensors"}, "iter2/tier_map.safetensors: of iteration 2, while iter1"),
    ],
)
def test_a_step_is_held_against_a_base_that_was_measured_alike(project, change, message):
    words = {
        **{"--pruned-model": "results/iter1/pruned_model", "--finetuned-model": "results/iter1/finetuned_model"},
        **{"--training": "results/iter1/training.json", "--base-eval": "results/iter0/eval.json", "--step": "iter1"},
        **{"--masks": "results/iter1/tier_map.safetensors", "--model-name": "model", "--output": "again.json"},
        **{"--text": "pydoc", "--sequence-length": "32", "--tokens": "2048", "--device": "cpu"},
    } | change
    finished = script("evaluate.py", *(part for pair in words.items() for part in pair), folder=project)
    assert finished.returncode == 1 and message in finished.stderr, finished.stderr
    assert len(finished.stderr.splitlines()) == 1 and not (project / "again.json").exists()


def test_every_script_explains_itself():
    names = sorted(path.name for path in SCRIPTS.glob("*.py"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, finished in zip(names, pool.map(lambda name: script(name, "--help"), names), strict=True):
            assert finished.stdout.startswith("usage:"), name


def test_an_iteration_becomes_a_gguf_file_when_asked_for(project):
    finished = snakemake(project, "results/iter2/model.gguf", "results/iter2/model-q8_0.gguf")
    assert finished.returncode == 0, finished.stderr[-3000:]
    # The rows of this model are no whole blocks of Q8_0, and stay as they are there.
    for name in ("model", "model-q8_0"):
        assert (project / f"results/iter2/{name}.gguf").read_bytes().startswith(b"GGUF")


def test_an_iteration_is_packed_when_asked_for(project):
    finished = snakemake(project, *(f"results/iter2/packed/{values}/packed.json" for values in ("bf16", "int4")))
    assert finished.returncode == 0, finished.stderr[-3000:]
    name = "model.layers.1.mlp.down_proj"
    weight = Checkpoint(project / "results/iter2/finetuned_model").matrix(name)
    packed, rounded = (
        load_packed(project / "results/iter2/packed" / values, "torch", "cpu").get_submodule(name).weight
        for values in ("bf16", "int4")
    )
    assert torch.equal(packed, weight.bfloat16())
    assert not rounded[weight == 0].any() and 0 < (rounded - weight).norm() < 0.2 * weight.norm()


def test_packed_models_are_measured_as_they_run(project, tmp_path):
    finished = snakemake(project, "results/iter2/packed/bf16/packed.json")
    assert finished.returncode == 0, finished.stderr[-3000:]
    words = ["--step", "iter0", "results/iter0/model", "--step", "iter2/packed/bf16", "results/iter2/packed/bf16"]
    words += ["--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1", "--output", tmp_path / "measurements.json"]
    finished = subprocess.run(
        [sys.executable, SCRIPTS / "measure.py", *words], cwd=project, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "three-tier linears run" in finished.stderr
    dense, packed = json.loads((tmp_path / "measurements.json").read_text())["steps"].values()
    assert packed["tokens_per_second"].keys() == {"prefill", "decode"}
    assert packed["parameters"] == dense["parameters"] and packed["bytes"] < dense["bytes"]
    pruned = Checkpoint(project / "results/iter2/finetuned_model")
    zeros = sum((pruned.tensors([name])[name] == 0).sum().item() for name in pruned.names)
    assert packed["parameters"] - packed["nonzeros"] == zeros
