"""Packed models of whole numbers on disk: written with and without text, loaded, checked as any packed folder is."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from three_tiers import prune_by_magnitude
from tiny_configurations import tiny_configuration
from transformers import AutoModelForCausalLM, AutoTokenizer

import stepdown  # noqa: F401
from stepdown.errors import UserError
from stepdown.models.checkpoint import Checkpoint
from stepdown.models.decoder import load_whole, open_decoder
from stepdown.models.linears import computes_as_linear
from stepdown.packed.folder import read_index, read_shard, sha256, write_packed
from stepdown.packed.format import unpack
from stepdown.packed.integers import as_floats
from stepdown.packed.model import load_packed
from stepdown.prune.calibrated_packing import pack_calibrated

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "resources/pydoc-llama"
# Logits of the bundled model; bf16 has steps of a sixteenth there.
NEARLY_A_TIE = {"bf16": 0.13, "int8": 0.25, "int4": 0.25}
TEXT = "\n\n".join(module.__doc__ for module in (json, subprocess, sys))


def tokens_of(text, length):
    tokens = AutoTokenizer.from_pretrained(BUNDLED)(text * 20, return_tensors="pt").input_ids[0]
    return tokens[: len(tokens) // length * length].view(-1, length)


def twice(folder):
    return [open_decoder(folder, "cpu") for _ in range(2)]


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """The bundled model pruned; packed in 8 and 4 bits to nearest, and in 4 by GPTQ."""
    folder = tmp_path_factory.mktemp("bundled")
    checkpoint, tier_map = prune_by_magnitude(BUNDLED, folder)
    map_path = folder / "tier_map.safetensors"
    sizes = {
        values: write_packed(checkpoint, tier_map, map_path, folder / values, values)
        for values in ("bf16", "int8", "int4")
    }
    decoders, windows = twice(folder / "model"), tokens_of(TEXT, 64)[:16]
    pack_calibrated(*decoders, tier_map, map_path, windows, 4, "int4", folder / "gptq")
    return folder, checkpoint, sizes


def weights(folder):
    index, found = read_index(folder), {}
    for file in index["sha256"]:
        _, matrices = read_shard(folder / file, index)
        found |= {f"{name}.weight": unpack(as_floats(matrix)) for name, matrix in matrices.items()}
    return found


def test_sizes(bundled):
    _, _, sizes = bundled
    assert sizes["int8"] <= 0.70 and sizes["int4"] <= 0.44


@pytest.mark.parametrize(("name", "most"), [("int8", 0.02), ("int4", 0.11), ("gptq", 0.15)])
def test_zeros_are_exact_and_the_rest_is_near(bundled, name, most):
    folder, checkpoint, _ = bundled
    for weight, found in weights(folder / name).items():
        if weight == "lm_head.weight":
            continue
        exact = checkpoint.tensors([weight])[weight]
        assert not found[exact == 0].any()
        assert (found - exact).norm() < most * exact.norm(), weight


@torch.no_grad()
def test_gptq_is_nearer_to_the_model_than_rounding_is(bundled):
    folder = bundled[0]
    tokens = tokens_of(TEXT, 64)[:4]

    def logits(model):
        return model(tokens).logits.float().log_softmax(-1)

    exact = logits(AutoModelForCausalLM.from_pretrained(folder / "model"))
    errors = {
        name: (logits(load_packed(folder / name, "torch", "cpu")) - exact).norm().item()
        for name in ("int8", "gptq", "int4")
    }
    assert errors["int8"] < 0.4 * errors["gptq"] and errors["gptq"] < 0.9 * errors["int4"], errors


@torch.no_grad()
def test_every_way_to_load_gives_the_same_model(bundled):
    folder, tokens = bundled[0] / "gptq", torch.arange(24)[None]
    ours = load_packed(folder, "torch", "cpu")(tokens).logits
    for theirs in (load_packed(folder, device="cpu"), AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")):
        assert (theirs(tokens).logits - ours).norm() < 3e-2 * ours.norm()
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "stepdown", "format": "stepdown packed 2", "values": "int4"}


@pytest.mark.parametrize("name", ["int4", "gptq"])
def test_the_head_has_8_bits_whatever_computes_with_it(bundled, name):
    folder = bundled[0] / name
    ours, theirs = (load_packed(folder, kernel, "cpu") for kernel in ("torch", "auto"))
    head, exact = ours.lm_head.weight.float(), ours.get_input_embeddings().weight.float()
    assert torch.equal(head, theirs.lm_head.weight.float())
    assert 1e-3 < (head - exact).norm() / exact.norm() < 2e-2
    assert ("lm_head.dense" in load_file(folder / "rest.safetensors")) == (name == "gptq")


@torch.no_grad()
def test_the_head_is_rounded_for_what_it_is_given(bundled):
    folder, tokens = bundled[0], tokens_of(TEXT, 64)[16:20]
    states = AutoModelForCausalLM.from_pretrained(folder / "model").base_model(tokens).last_hidden_state
    nearest, rounded = (load_packed(folder / name, "torch", "cpu").lm_head.weight for name in ("int4", "gptq"))
    exact = AutoModelForCausalLM.from_pretrained(folder / "model").lm_head.weight
    errors = [(states.float() @ (weight - exact).float().T).norm() for weight in (nearest, rounded)]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("held", ["both", "embed_tokens", "lm_head"])
@torch.no_grad()
def test_a_head_is_stored_once_and_what_it_was_tied_to_stays(held, tmp_path):
    _, tier_map = prune_by_magnitude(
        make_model("llama", tmp_path / "base", tie_word_embeddings=held != "both"), tmp_path
    )
    if held == "lm_head":
        # Checkpoints are published so: the embedding is known by the head's name alone.
        rest = load_file(tmp_path / "model/rest.safetensors")
        rest["lm_head.weight"] = rest.pop("model.embed_tokens.weight")
        save_file(rest, tmp_path / "model/rest.safetensors", {"format": "pt"})
        index = (tmp_path / "model/model.safetensors.index.json").read_text()
        index = index.replace("model.embed_tokens.weight", "lm_head.weight")
        (tmp_path / "model/model.safetensors.index.json").write_text(index)
    windows = torch.randint(2, 128, (4, 24), generator=torch.Generator().manual_seed(0))
    decoders = twice(tmp_path / "model")
    pack_calibrated(*decoders, tier_map, tmp_path / "tier_map.safetensors", windows, 2, "int4", tmp_path / "packed")
    assert not {"lm_head.weight"} & load_file(tmp_path / "packed/rest.safetensors").keys()
    exact = load_whole(tmp_path / "model", "cpu")
    for model in (
        load_packed(tmp_path / "packed", device="cpu"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map="cpu"),
    ):
        assert not model.config.tie_word_embeddings
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert torch.equal(embedding, exact.get_input_embeddings().weight.bfloat16())
        rounding = head.float() - exact.get_output_embeddings().weight
        assert rounding.norm() < 2e-2 * exact.get_output_embeddings().weight.norm()


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "bert", "zamba2", "llama4", "deepseek_v4"])
@torch.no_grad()
def test_families(family, tmp_path):
    """Matrices held transposed; experts, of which some may see no token; ties beside that of the head; linears that
    answer with a router's choice, or take groups of inputs apart."""
    _, tier_map = prune_by_magnitude(make_model(family, tmp_path / "base"), tmp_path)
    windows = torch.randint(2, 128, (4, 24), generator=torch.Generator().manual_seed(0))
    decoders = twice(tmp_path / "model")
    pack_calibrated(*decoders, tier_map, tmp_path / "tier_map.safetensors", windows, 2, "int8", tmp_path / "packed")
    ours = load_packed(tmp_path / "packed", "torch", "cpu")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    # Routers choose other experts after roundings, and recurrences add them up.
    most = 0.3 if family in ("llama4", "deepseek_v4", "zamba2") else 5e-2
    assert (ours(windows).logits - exact(windows).logits).norm() < most * exact(windows).logits.norm()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model", "packed", "tier_map.safetensors"]


def test_linears_of_a_familys_own_class_run_packed_where_they_are_linears():
    with torch.device("meta"):
        models = {
            family: AutoModelForCausalLM.from_config(tiny_configuration(family)) for family in ("falcon", "phimoe")
        }
    assert computes_as_linear(models["falcon"].transformer.h[0].mlp.dense_h_to_4h)
    assert not computes_as_linear(models["phimoe"].model.layers[0].mlp.router)


# Beginnings of Python's own documentation and code, as the bundled model knows them.
PROMPTS = [line.strip() for line in inspect.getsource(json).splitlines() if len(line.strip()) > 30][:20]


@pytest.mark.parametrize("values", ["bf16", "int8", "int4"])
@torch.no_grad()
def test_greedy_tokens_are_those_of_torch_but_for_ties(bundled, values):
    """Where torch, on the same weights, would choose another token than the kernels did, both are about as good."""
    folder, tokenizer = bundled[0] / values, AutoTokenizer.from_pretrained(BUNDLED)
    ours, theirs = (load_packed(folder, kernel, "cpu") for kernel in ("auto", "torch"))
    assert len(PROMPTS) == 20
    others = []
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt").input_ids
        found = ours.generate(given, max_new_tokens=24, do_sample=False)
        new = found[0, given.shape[1] :]
        logits = theirs(found).logits[0, -len(new) - 1 : -1].float()
        lost = logits.amax(1) - logits.gather(1, new[:, None])[:, 0]
        assert lost.max() < NEARLY_A_TIE[values], (prompt, lost)
        others += (lost > 0).tolist()
    assert len(others) > 300 and sum(others) < 0.03 * len(others)


# ---------------------------------------------------------------- what is not whole


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("positions", lambda tensor: tensor * 0, "names a column twice"),
        ("dense", lambda tensor: tensor[1:], "dense is"),
        ("scales", lambda tensor: tensor * -1, "not a positive number"),
        ("two_four_multiples", lambda tensor: tensor.float(), "two_four_multiples is"),
        ("two_four_multiples", None, "two_four_multiples is missing"),
    ],
)
def test_parts_that_do_not_fit_are_refused_even_with_the_right_hash(bundled, tmp_path, part, change, match):
    folder = shutil.copytree(bundled[0] / "int4", tmp_path / "packed")
    file, name = folder / "model.layers.2.safetensors", f"model.layers.2.mlp.up_proj.{part}"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors[name] = change(tensors[name]) if change else tensors.pop(name)
    if not change:
        del tensors[name]
    save_file(tensors, file, metadata=metadata)
    index = json.loads((folder / "packed.json").read_text())
    index["sha256"][file.name] = sha256(file)
    (folder / "packed.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=match) as caught:
        load_packed(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A tiny model in float32 and the folder it is in, with its map."""
    folder = tmp_path_factory.mktemp("pruned")
    return folder, prune_by_magnitude(make_model("llama", folder / "base"), folder)[1]


LAYER = "model.layers.1.safetensors"
NOT_FINITE = [
    (LAYER, "model.layers.1.mlp.up_proj.weight", torch.nan),
    (LAYER, "model.layers.1.input_layernorm.weight", torch.inf),
    ("rest.safetensors", "model.norm.weight", torch.nan),
    ("rest.safetensors", "model.embed_tokens.weight", torch.nan),
    ("rest.safetensors", "lm_head.weight", torch.finfo(torch.float32).max),
]


@pytest.mark.parametrize("values", ["bf16", "int8", "int4 by GPTQ"])
@pytest.mark.parametrize(("shard", "name", "value"), NOT_FINITE)
def test_a_value_that_is_not_finite(pruned, shard, name, value, values, tmp_path):
    model, map_path = tmp_path / "model", pruned[0] / "tier_map.safetensors"
    shutil.copytree(pruned[0] / "model", model)
    tensors = load_file(model / shard)
    tensors[name][tuple(tensors[name].nonzero()[0])] = value
    save_file(tensors, model / shard, {"format": "pt"})
    with pytest.raises(UserError, match=f"{name} in bf16: a weight is NaN or infinite") as caught:
        if values == "int4 by GPTQ":
            windows = torch.ones(1, 8, dtype=torch.int64)
            pack_calibrated(*twice(model), pruned[1], map_path, windows, 1, "int4", tmp_path / "packed")
        else:
            write_packed(Checkpoint(model), pruned[1], map_path, tmp_path / "packed", values)
    assert str(model) in str(caught.value) and not (tmp_path / "packed").exists()


def test_the_script(bundled, tmp_path):
    folder = bundled[0]
    (tmp_path / "text.txt").write_text(TEXT * 20)
    options = ["--model", folder / "model", "--tier-map", folder / "tier_map.safetensors", "--values", "int4"]
    options += ["--text", tmp_path / "text.txt", "--samples", 4, "--sequence-length", 32, "--device", "cpu"]
    command = [sys.executable, ROOT / "workflow/scripts/pack_integers.py", *options, "--output", tmp_path / "packed"]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "bytes a weight" in finished.stderr
    assert read_index(tmp_path / "packed")["values"] == "int4"
