"""A step of the chain, script by script, on the families whose matrices are no linears: Conv1D and fused experts."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from families import as_it_computes, make_model
from safetensors.torch import load_file

from stepdown.cli import log
from stepdown.files import INDEX_NAME
from stepdown.models.checkpoint import Checkpoint, rewrite_checkpoint
from stepdown.models.tier_maps import read_tier_map
from stepdown.tensors.tiers import violations

ROOT = Path(__file__).parents[2]
CALIBRATION = {"text": "pydoc", "samples": 4, "sequence_length": 32, "batch_size": 2}
EVALUATION = {"text": "pydoc", "sequence_length": 32, "tokens": 256, "model_name": "tiny", "device": "cpu"}
FINETUNING = {"text": "pydoc", "sequence_length": 32, "tokens_per_epoch": 256, "epochs": 1, "batch_size": 4}
FINETUNING |= {"gradient_accumulation": 1, "learning_rate": 0.01, "evaluation_steps": 1, "step": "iter1"}
SHARES = {"dense": "0.35", "mid_2_4": "0.45", "topk": "0.20"}


def run(monkeypatch, script, **options):
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", [script, *words, "--log", "log"])
    monkeypatch.syspath_prepend(str(ROOT / "workflow/scripts"))
    try:
        runpy.run_path(str(ROOT / f"workflow/scripts/{script}.py"), run_name="__main__")
    except SystemExit as end:
        assert not end.code, (script, Path("log").read_text())
    finally:
        # As it was before the script made it its own.
        log.propagate = True
        log.handlers.clear()


@pytest.fixture(scope="module", params=["gpt2", "mixtral", "qwen2_moe"])
def folder(request, tmp_path_factory):
    """The folder of a family in which a whole step has been made, in bfloat16."""
    folder = tmp_path_factory.mktemp(request.param)
    make_model(request.param, folder / "source", vocab_size=4096, dtype="bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "resources/pydoc-llama" / name, folder / "source" / name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        run(monkeypatch, "base_model", model="source", output_model="model", output_tier_map="map0")
        run(monkeypatch, "calibrate", model="model", **CALIBRATION, output="calibration")
        run(monkeypatch, "score", model="model", calibration="calibration", tier_map="map0", output="scores")
        stage_1 = {"scores": "scores", "tier_map": "map0", "iteration": 1, "output": "map1", **SHARES}
        run(monkeypatch, "degrade_dense_to_2_4", **stage_1)
        stage_2 = {"model": "model", "calibration": "calibration", "tier_map_before": "map0", "tier_map": "map1"}
        run(monkeypatch, "degrade_2_4_to_topk", **stage_2, output_tier_map="map", output_model="pruned")
        outputs = {"state": "state", "output_model": "finetuned", "output_log": "training"}
        run(monkeypatch, "finetune", model="pruned", masks="map", **FINETUNING, **outputs, device="cpu")
        run(monkeypatch, "evaluate_base", model="model", masks="map0", **EVALUATION, output="base.json")
        models = {"pruned_model": "pruned", "finetuned_model": "finetuned", "masks": "map", "training": "training"}
        run(monkeypatch, "evaluate", **models, base_eval="base.json", step="iter1", **EVALUATION, output="eval.json")
    return folder


def test_every_matrix_of_the_decoder_layers_keeps_its_tiers(folder):
    tier_map = read_tier_map(folder / "map")
    for name in ("pruned", "finetuned"):
        checkpoint = Checkpoint(folder / name)
        for matrix, tiers in tier_map.tiers.items():
            assert violations(checkpoint.matrix(matrix), tiers, tier_map.block_size, tier_map.k) == 0
    stored = [
        name for name in Checkpoint(folder / "source").names if ".0." in name and len(checkpoint.shape(name)) == 2
    ]
    routers = {"model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"}
    assert {name.removesuffix(".weight") for name in stored} - routers == {
        name for name in tier_map.tiers if ".0." in name
    }


def test_finetuning_trains_them_and_stores_them_as_they_were(folder):
    before, pruned, after = ({}, {}, {})
    for name, found in (("source", before), ("pruned", pruned), ("finetuned", after)):
        for file in (folder / name).glob("*.safetensors"):
            found |= load_file(file)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in after.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in before.items()
    }
    for name in read_tier_map(folder / "map").tiers:
        assert not torch.equal(after[f"{name}.weight"], pruned[f"{name}.weight"]), name


def test_transformers_loads_what_was_measured(folder):
    from transformers import AutoModelForCausalLM

    result = json.loads((folder / "eval.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "finetuned")
    matrices = list(as_it_computes(model))
    zeros = sum(int((matrix == 0).sum()) for matrix in matrices)
    assert zeros / sum(matrix.numel() for matrix in matrices) == pytest.approx(result["sparsity"]["overall"])
    # Of ragged blocks, of which some families have many, each holds less.
    assert result["sparsity"]["overall"] == pytest.approx(0.41, abs=0.05)
    perplexity = result["perplexity"]["pydoc"]
    assert perplexity["finetuned"] < perplexity["pruned"]


def test_experts_stored_in_one_parameter_are_read_and_written_one_by_one(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    source = make_model("mixtral", tmp_path / "source")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "fused", save_original_format=False)
    monkeypatch.chdir(tmp_path)
    assert "model.layers.0.mlp.experts.gate_up_proj" in Checkpoint("fused").names
    run(monkeypatch, "base_model", model="fused", output_model="model", output_tier_map="map")
    checkpoint, separate = Checkpoint("model"), Checkpoint("source")
    for part, stored in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        matrix = checkpoint.matrix(f"model.layers.1.mlp.experts.2.{part}")
        assert torch.equal(matrix, separate.matrix(f"model.layers.1.block_sparse_moe.experts.2.{stored}"))
    assert checkpoint.content_hash() == Checkpoint("fused").content_hash()

    def halve(tensors):
        tensors.update({name: tensor / 2 for name, tensor in tensors.items() if ".experts.1.up_proj" in name})

    rewrite_checkpoint(checkpoint, "halved", halve, checkpoint.identity())
    before, after = (load_all(folder) for folder in ("fused", "halved"))
    assert before.keys() == after.keys()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    half = before[name].shape[1] // 2
    assert torch.equal(after[name][1, half:], before[name][1, half:] / 2)
    after[name][1, half:] *= 2
    assert torch.equal(after[name], before[name])


def load_all(folder):
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_weights_in_several_files_are_linked_and_their_index_is_our_own(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model("llama", tmp_path / "source"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    index = (tmp_path / "sharded" / INDEX_NAME).read_bytes()
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "base_model", model="sharded", output_model="model", output_tier_map="map")
    assert Path("sharded", INDEX_NAME).read_bytes() == index and not Path("model", INDEX_NAME).is_symlink()
    assert Checkpoint("model").identity() == read_tier_map("map").identity
    assert Checkpoint("model").content_hash() == Checkpoint("source").content_hash()
    # A model that was pruned before is a base model like any other.
    run(monkeypatch, "base_model", model="model", output_model="again", output_tier_map="map_again")
    assert Checkpoint("again").identity() == read_tier_map("map_again").identity


def test_pickled_weights_are_imported_as_safetensors(tmp_path, monkeypatch):
    source = make_model("gpt2", tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "base_model", model="source", output_model="model", output_tier_map="map")
    assert load_file("model/model.safetensors").keys() == weights.keys()
    assert not list(Path("model").glob("*.bin"))
