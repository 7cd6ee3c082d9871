"""What a channel is worth, and a model sorted by it, script by script."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from families import make_model
from safetensors import safe_open

from stepdown.cli import log
from stepdown.models.channels import Channels
from stepdown.models.checkpoint import Checkpoint
from stepdown.models.decoder import open_decoder
from stepdown.models.permutation import read_orders
from stepdown.models.tier_maps import read_tier_map
from stepdown.prune.calibration import Calibration
from stepdown.prune.channel_sorting import importances

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("cost", ["fisher", "wanda"])
def test_a_channel_is_worth_what_the_matrices_lose_with_it(cost, tmp_path):
    decoder = open_decoder(make_model("llama", tmp_path / "model"), "cpu")
    generator = torch.Generator().manual_seed(0)
    norms, gradients = {}, {}
    for name, linear in decoder.linears().items():
        norms[name] = torch.rand(linear.in_features, generator=generator)
        gradients[name] = torch.rand(linear.out_features, generator=generator)
    metric = {}
    for name in decoder.linears():
        weight = decoder.checkpoint.matrix(name).double()
        if cost == "fisher":
            metric[name] = weight.square() * norms[name] * gradients[name][:, None]
        else:
            metric[name] = weight.abs() * norms[name].sqrt()
            metric[name] /= metric[name].sum()
    layer = "model.layers.1.self_attn"
    # Query heads 0 and 1 share the first twelve values, 2 and 3 the others.
    numbers = torch.arange(24).view(2, 1, 12).expand(2, 2, 12).flatten()
    sides = {(f"{layer}.v_proj.weight", 0): torch.arange(24), (f"{layer}.o_proj.weight", 1): numbers}
    values = Channels("values", torch.zeros(24, dtype=torch.int64), sides)
    found = importances(decoder, [values], Calibration(norms, gradients if cost == "fisher" else {}))[0]
    of_inputs = metric[f"{layer}.o_proj"].sum(0).view(2, 2, 12).sum(1).flatten()
    torch.testing.assert_close(found, metric[f"{layer}.v_proj"].sum(1) + of_inputs, rtol=1e-5, atol=0)


def run(script, **options):
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    sys.argv[:] = [script, *words, "--log", "log"]
    try:
        runpy.run_path(str(ROOT / f"workflow/scripts/{script}.py"), run_name="__main__")
    except SystemExit as end:
        assert not end.code, Path("log").read_text()
    finally:
        # As it was before the script made it its own.
        log.propagate = True
        log.handlers.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a model that was sorted twice."""
    folder = tmp_path_factory.mktemp("sorted")
    make_model("qwen2", folder / "source", vocab_size=4096, dtype="bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "resources/pydoc-llama" / name, folder / "source" / name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [])
        monkeypatch.syspath_prepend(str(ROOT / "workflow/scripts"))
        run("base_model", model="source", output_model="model", output_tier_map="map")
        text = {"text": "pydoc", "samples": 4, "sequence_length": 32, "batch_size": 2, "device": "cpu"}
        for name in ("first", "second"):
            outputs = {"output_model": f"{name}/model", "output_tier_map": f"{name}/map"}
            outputs |= {"output_permutation": f"{name}/permutation"}
            Path(name).mkdir()
            run("sort_channels", model="model", tier_map="map", **text, **outputs)
    return folder


def test_a_sorted_model_is_a_base_model_like_any_other(folder):
    before, after = Checkpoint(folder / "model"), Checkpoint(folder / "first/model")
    map_before, map_after = read_tier_map(folder / "map"), read_tier_map(folder / "first/map")
    assert after.identity() == map_after.identity == {"base_model": after.content_hash(), "iteration": "0"}
    assert map_before.base_model == before.content_hash() != after.content_hash()
    assert map_after.shapes == map_before.shapes and not any(tiers.any() for tiers in map_after.tiers.values())
    config = json.loads((folder / "first/model/config.json").read_text())
    assert config == json.loads((folder / "source/config.json").read_text())
    with safe_open(folder / "first/permutation", framework="pt") as file:
        assert file.metadata()["base_model"] == before.content_hash()
        assert file.metadata()["sorted_model"] == after.content_hash()


def test_every_weight_is_found_where_the_permutation_says(folder):
    before, after = Checkpoint(folder / "model"), Checkpoint(folder / "first/model")
    orders = read_orders(folder / "first/permutation")
    assert {name for name, _ in orders} <= set(before.names)
    for name in before.names:
        tensor = before.tensors([name])[name]
        for dim in range(tensor.dim()):
            tensor = tensor.index_select(dim, orders.get((name, dim), torch.arange(tensor.shape[dim])))
        assert torch.equal(tensor, after.tensors([name])[name]), name


def test_the_same_inputs_give_the_same_bytes(folder):
    files = {path.relative_to(folder / "first") for path in (folder / "first").rglob("*") if path.is_file()}
    assert files == {path.relative_to(folder / "second") for path in (folder / "second").rglob("*") if path.is_file()}
    for file in files:
        assert (folder / "first" / file).read_bytes() == (folder / "second" / file).read_bytes(), file
