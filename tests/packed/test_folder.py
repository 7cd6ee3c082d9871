"""A packed model on disk: the same model as its checkpoint, whole, and refused when it is not as it was written."""

import argparse
import decimal
import heapq
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from three_tiers import pack_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import stepdown
from stepdown.errors import UserError
from stepdown.packed.folder import read_index, read_shard, sha256, write_packed
from stepdown.packed.format import unpack
from stepdown.packed.linear import ThreeTierLinear
from stepdown.packed.model import load_packed

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "resources/pydoc-llama"


def unpacked(folder):
    """All tensors of a packed folder as a checkpoint has them."""
    index, found = read_index(folder), {}
    for file in index["sha256"]:
        tensors, matrices = read_shard(folder / file, index)
        found |= tensors | {f"{name}.weight": unpack(matrix) for name, matrix in matrices.items()}
    return found


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """The bundled model pruned, and packed."""
    folder = tmp_path_factory.mktemp("bundled")
    return folder, *pack_model(BUNDLED, folder)


def test_unpacking_gives_the_checkpoint_bit_for_bit(bundled):
    folder, checkpoint, _, _ = bundled
    found = unpacked(folder / "packed")
    assert sorted(found) == checkpoint.names
    for name, tensor in checkpoint.tensors(checkpoint.names).items():
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


def test_size(bundled):
    folder, _, _, size = bundled
    assert size <= 1.26
    assert not list(folder.glob("*.partial"))


@pytest.fixture(scope="module")
def models(bundled):
    """The model as packed, and as transformers loads it from its checkpoint."""
    folder = bundled[0]
    return stepdown.load_packed(folder / "packed", device="cpu"), AutoModelForCausalLM.from_pretrained(folder / "model")


def test_every_linear_runs_packed(bundled, models):
    layers = {name: module for name, module in models[0].named_modules() if isinstance(module, ThreeTierLinear)}
    assert layers.keys() >= set(bundled[2].tiers)
    dense = {name for name, module in models[0].named_modules() if isinstance(module, torch.nn.Linear)}
    # Where this machine has no kernel torch computes, and the head stays what it is.
    assert dense == ({"lm_head"} if {layer.kernel for layer in layers.values()} == {"torch"} else set())


@torch.no_grad()
def test_perplexity_is_that_of_the_checkpoint(models):
    text = "\n\n".join(module.__doc__ for module in (argparse, decimal, heapq, statistics))
    tokens = AutoTokenizer.from_pretrained(BUNDLED)(text, return_tensors="pt").input_ids[:, :1024]
    packed, dense = (model(tokens, labels=tokens).loss.exp().item() for model in models)
    # Both round to bf16 after every layer, in another order of adding: as far apart as one rounding of bf16 at most.
    assert packed == pytest.approx(dense, rel=2**-8)


@torch.no_grad()
def test_generates_what_the_checkpoint_generates(models):
    """Token for token, but where the checkpoint itself holds two tokens for equally likely, as far as bf16 can tell."""
    dense, same = models[1], 0
    generator = torch.Generator().manual_seed(0)
    for length in (1, 5, 17, 40):
        prompt = torch.randint(0, 4096, (1, length), generator=generator)
        ours, theirs = (model.generate(prompt, max_new_tokens=16, do_sample=False)[0] for model in models)
        same += torch.equal(ours, theirs)
        if not torch.equal(ours, theirs):
            place = int((ours[: len(theirs)] != theirs[: len(ours)]).nonzero()[0])
            first, second = (
                dense(theirs[None, :place]).logits[0, -1, torch.stack([ours[place], theirs[place]])].tolist()
            )
            assert first == pytest.approx(second, rel=2**-6)
    assert same >= 2


@torch.no_grad()
def test_torch_computes_what_the_checkpoint_computes(bundled, models):
    tokens = torch.randint(0, 4096, (2, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_packed(bundled[0] / "packed", "torch", "cpu")(tokens).logits, models[1](tokens).logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_any_family(family, tmp_path):
    """Tied and untied heads, biases, transposed matrices, ragged shapes, float32 checkpoints run in bf16."""
    checkpoint, _, _ = pack_model(make_model(family, tmp_path / "base"), tmp_path)
    found = unpacked(tmp_path / "packed")
    for name, tensor in checkpoint.tensors(checkpoint.names).items():
        # What was packed is bf16, whatever the checkpoint is.
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    tokens = torch.randint(2, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    packed_logits, logits = load_packed(tmp_path / "packed", device="cpu")(tokens).logits, dense(tokens).logits
    assert (packed_logits - logits).norm() < 3e-2 * logits.norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_tied_head_and_its_embedding_are_one_tensor(dtype, tmp_path):
    pack_model(make_model("llama_tied", tmp_path / "base", dtype=dtype), tmp_path)
    model = load_packed(tmp_path / "packed", "torch", "cpu")
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_a_packed_model_is_not_saved_anew(bundled, tmp_path):
    model = load_packed(bundled[0] / "packed", device="cpu")
    for each in (model, model.base_model):
        with pytest.raises(UserError, match="not saved anew"):
            each.save_pretrained(tmp_path / "saved")


# ---------------------------------------------------------------- what is not whole


@pytest.fixture
def packed(bundled, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(bundled[0] / "packed", tmp_path / "packed")


def shard(packed):
    return packed / "model.layers.2.safetensors"


def rewrite_shard(packed, change, metadata=None):
    """Change the tensors of a shard, and its hash in packed.json too, as somebody would who knows the format."""
    tensors = load_file(shard(packed))
    with safe_open(shard(packed), "pt") as opened:
        known = opened.metadata()
    change(tensors)
    save_file(tensors, shard(packed), metadata=known | (metadata or {}))
    edit_index(packed, lambda index: index["sha256"].update({shard(packed).name: sha256(shard(packed))}))


def edit_index(packed, change):
    index = json.loads((packed / "packed.json").read_text())
    change(index)
    (packed / "packed.json").write_text(json.dumps(index))


def refused(packed, match):
    with pytest.raises(UserError, match=match) as caught:
        load_packed(packed, device="cpu")
    assert str(packed) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("left", [0, 5, 1000, -1])
def test_a_truncated_file(packed, left):
    shard(packed).write_bytes(shard(packed).read_bytes()[:left])
    refused(packed, "truncated")


@pytest.mark.parametrize("place", [-1, -4000])
def test_a_flipped_bit(packed, place):
    content = bytearray(shard(packed).read_bytes())
    content[place] ^= 4
    shard(packed).write_bytes(content)
    refused(packed, "sha256 differs")


NAME = "model.layers.2.mlp.up_proj"


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("tiers", lambda tensor: tensor + 3, "from 0 to 2"),
        ("tiers", lambda tensor: tensor[:, :-1].contiguous(), "tiers are not"),
        ("tiers", lambda tensor: tensor.flip(0, 1) * 0, "tiers call for"),
        ("dense", lambda tensor: tensor[1:], "dense is"),
        ("dense", lambda tensor: tensor.view(torch.int16), "dense is"),
        ("two_four", lambda tensor: tensor.float(), "two_four is"),
        ("positions", lambda tensor: tensor * 0 + 255, "names a column twice"),
        ("top_k", lambda tensor: tensor[:, :9].contiguous(), "top_k is"),
        ("top_k_positions", lambda tensor: tensor.flip(1), "names a place twice"),
    ],
)
def test_parts_that_do_not_fit_are_refused_even_with_the_right_hash(packed, part, change, match):
    def damage(tensors):
        tensors[f"{NAME}.{part}"] = change(tensors[f"{NAME}.{part}"])

    rewrite_shard(packed, damage)
    refused(packed, f"{NAME}: .*{match}")


def test_a_missing_part(packed):
    rewrite_shard(packed, lambda tensors: tensors.pop(f"{NAME}.top_k"))
    refused(packed, f"{NAME}.top_k is missing")


@pytest.mark.parametrize(
    "shapes", ["", "[[]]", "{", '{"a": 3}', f'{{"{NAME}": [0, 16]}}', f'{{"{NAME}": ["1", 16]}}', "[" * 100000]
)
def test_metadata_that_say_nonsense(packed, shapes):
    rewrite_shard(packed, lambda tensors: None, {"shapes": shapes})
    refused(packed, "which matrices it holds")


def test_a_wrong_shape(packed):
    with safe_open(shard(packed), "pt") as opened:
        shapes = json.loads(opened.metadata()["shapes"])
    # As many blocks as there are.
    rewrite_shard(packed, lambda tensors: None, {"shapes": json.dumps(shapes | {NAME: [688, 250]})})
    refused(packed, rf"config.json makes {NAME}.weight \[688, 256\], the files hold \[688, 250\]")


def test_metadata_that_are_none(packed):
    """A header of the same length, so that all but the metadata stays as it was."""
    content = shard(packed).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end]) | {"__metadata__": None}
    shard(packed).write_bytes(
        content[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(end - 8) + content[end:]
    )
    edit_index(packed, lambda index: index["sha256"].update({shard(packed).name: sha256(shard(packed))}))
    refused(packed, "format None")


def test_a_norm_of_whole_numbers(packed):
    norm = "model.layers.2.input_layernorm.weight"
    rewrite_shard(packed, lambda tensors: tensors.update({norm: tensors[norm].to(torch.int8)}))
    refused(packed, f"{norm} is torch.int8")


def test_a_head_in_a_layer(packed):
    """Whole numbers of 8 bits are the head's alone, which is in no layer."""
    rewrite_shard(packed, lambda tensors: None, {"head": NAME})
    load_packed(packed, device="cpu")


def test_a_missing_buffer(tmp_path):
    folder = tmp_path / "packed"
    pack_model(make_model("deepseek_v3", tmp_path / "base"), tmp_path)
    name, path = "model.layers.4.mlp.gate.e_score_correction_bias", folder / "model.layers.4.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    del tensors[name]
    save_file(tensors, path, metadata=metadata)
    edit_index(folder, lambda index: index["sha256"].update({path.name: sha256(path)}))
    refused(folder, f"no tensor for {name}")


def test_a_layer_too_much(packed):
    rewrite_shard(packed, lambda tensors: tensors.update({"model.layers.6.mlp.up_proj.weight": torch.zeros(16, 16)}))
    refused(packed, "also hold model.layers.6.mlp.up_proj.weight")


def test_a_bias_the_model_has_not(packed):
    rewrite_shard(packed, lambda tensors: tensors.update({f"{NAME}.bias": torch.zeros(688)}))
    refused(packed, f"also hold {NAME}.bias")


def test_a_weight_the_model_has_not(packed):
    """As of Qwen3, whose attention has norms, beside the config.json of a Llama."""
    rewrite_shard(packed, lambda tensors: tensors.update({"model.layers.2.self_attn.q_norm.weight": torch.ones(32)}))
    refused(packed, "also hold model.layers.2.self_attn.q_norm.weight")


@pytest.mark.parametrize("name", ["model.layers.1.input_layernorm.weight", "model.norm.weight", f"{NAME}.weight"])
def test_a_second_copy(packed, name):
    rewrite_shard(packed, lambda tensors: tensors.update({name: torch.zeros(256)}))
    refused(packed, f"{shard(packed).name}: holds {name}, which has no place")


def test_a_later_version(packed):
    edit_index(packed, lambda index: index.update(format="stepdown packed 3"))
    refused(packed, "'stepdown packed 3', this version reads 'stepdown packed 1' and 'stepdown packed 2'")


def test_a_shard_of_a_later_version(packed):
    rewrite_shard(packed, lambda tensors: None, {"format": "stepdown packed 3"})
    refused(packed, "'stepdown packed 3', but packed.json says 'stepdown packed 2'")


def test_a_shard_of_other_values(packed):
    rewrite_shard(packed, lambda tensors: None, {"values": "int8"})
    refused(packed, "values 'int8', but packed.json says 'bf16'")


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("k"),
        lambda index: index.update(k=0),
        lambda index: index.update(block_size=32),
        lambda index: index.update(values="int2"),
        lambda index: index.update(sha256=3),
    ],
)
def test_an_index_that_says_nonsense(packed, change):
    edit_index(packed, change)
    refused(packed, "not readable as the index")


def test_an_index_too_deep_or_of_names_too_long(packed):
    edit_index(packed, lambda index: index["sha256"].update({"x" * 300: "0"}))
    refused(packed, "x, named in packed.json, is missing")
    (packed / "packed.json").write_text("[" * 200000)
    refused(packed, "not readable as the index")


def test_the_first_version_is_still_read(bundled, packed):
    """It had no `values`, neither in packed.json nor in a shard, and no entry in config.json."""
    index = json.loads((packed / "packed.json").read_text())
    for name in index["sha256"]:
        with safe_open(packed / name, "pt") as opened:
            metadata = opened.metadata()
        del metadata["values"]
        save_file(load_file(packed / name), packed / name, metadata=metadata | {"format": "stepdown packed 1"})
        index["sha256"][name] = sha256(packed / name)
    del index["values"]
    (packed / "packed.json").write_text(json.dumps(index | {"format": "stepdown packed 1"}))
    shutil.copyfile(bundled[0] / "model/config.json", packed / "config.json")
    tokens = torch.arange(20)[None]
    ours, theirs = (load_packed(folder, "torch", "cpu") for folder in (packed, bundled[0] / "packed"))
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_a_missing_file(packed):
    shard(packed).unlink()
    refused(packed, "model.layers.2.safetensors, named in packed.json, is missing")


def test_a_file_outside_the_folder(packed):
    edit_index(packed, lambda index: index["sha256"].update({"../model/rest.safetensors": ""}))
    refused(packed, "missing")


def test_a_missing_layer(packed):
    edit_index(packed, lambda index: index["sha256"].pop("model.layers.2.safetensors"))
    refused(packed, "no tensor for model.layers.2")


def test_a_folder_that_is_none(tmp_path):
    refused(tmp_path, "no packed.json; give a folder that pack.py wrote$")
    refused(tmp_path / "nowhere", "no such folder")


@pytest.mark.parametrize("step", [False, True])
def test_a_folder_of_packed_models(bundled, tmp_path, step):
    """As where `bf16` was forgotten, or `packed/bf16`."""
    for values in ("bf16", "int8"):
        shutil.copytree(bundled[0] / "packed", tmp_path / "packed" / values)
    folder = tmp_path if step else tmp_path / "packed"
    finished = run("generate.py", "--model", folder, "--prompt", "Return")
    assert finished.returncode == 1 and finished.stderr.count("\n") == 1
    assert f"such as {tmp_path}/packed/bf16, {tmp_path}/packed/int8" in finished.stderr


# ---------------------------------------------------------------- packing


def run(script, *arguments):
    command = [sys.executable, ROOT / "workflow/scripts" / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_scripts(bundled, tmp_path):
    folder = bundled[0]
    options = ["--model", folder / "model", "--tier-map", folder / "tier_map.safetensors"]
    assert run("pack.py", *options, "--output", tmp_path / "packed").returncode == 0
    for file in (folder / "packed").iterdir():
        assert (tmp_path / "packed" / file.name).read_bytes() == file.read_bytes(), "the same bytes every time"
    # A byte that is no UTF-8 is no token either.
    prompt = "Return the length\udce9"
    finished = run("generate.py", "--model", tmp_path / "packed", "--prompt", prompt, "--tokens", 8)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert lines[0].startswith("Return the length") and finished.stdout.count("tokens/s") == 2
    assert lines[-1] == "the same text"


def test_a_map_of_another_model_packs_nothing(bundled, tmp_path):
    base = BUNDLED, bundled[0] / "tier_map.safetensors"
    finished = run("pack.py", "--model", base[0], "--tier-map", base[1], "--output", tmp_path / "packed")
    assert finished.returncode == 1 and finished.stderr.count("\n") == 1
    assert "more weights than their tier allows" in finished.stderr
    assert list(tmp_path.iterdir()) == []


def test_other_block_sizes_are_refused(bundled, tmp_path):
    _, checkpoint, tier_map, _ = bundled
    with pytest.raises(UserError, match="for blocks of 16"):
        write_packed(checkpoint, replace(tier_map, block_size=32), "map", tmp_path / "packed")
