"""Whole numbers for weights: the published update, zeros that stay, and folders that others read."""

import copy
import json

import pytest
import torch
from families import VOCABULARY, make_model
from hypothesis import given
from hypothesis import strategies as st
from matrices import damped, loss, random_case
from safetensors.torch import load_file, save_file

from stepdown.errors import UserError
from stepdown.measure.perplexity import perplexity
from stepdown.measure.sizes import size_of
from stepdown.models.decoder import load_whole, open_decoder
from stepdown.models.quantised_checkpoint import open_checkpoint, pack, unpack
from stepdown.plan.compressions import BITS, parse_quantised
from stepdown.prune.model_quantisation import quantise_checkpoint
from stepdown.prune.slicing import slice_checkpoint
from stepdown.tensors.masks import keep_n_of_m
from stepdown.tensors.quantisation import Quantised, gptq, round_to_nearest

TOKENS = torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(1))
IDENTITY = {"base_model": "0", "iteration": "1"}
NAMES = ["gptq4", "gptq4-g16", "gptq4-asym", "gptq4-g16-asym", "gptq8-g8", "gptq3-g16"]
MASKS = {"dense": torch.ones_like, "2of4": lambda weight: keep_n_of_m(weight.abs(), 2, 4)}


def quantise(folder, name, target):
    quantise_checkpoint(open_decoder(folder, "cpu"), TOKENS, 2, parse_quantised(name), target, IDENTITY)
    return target


# --- the mathematics -------------------------------------------------------------------------------------------------


def published(weight, hessian, asked):
    """GPTQ as published, column by column in float64 with the Cholesky factor of the inverse; masked weights stay zero,
    which the published steps do when the code of a masked weight is that of zero."""
    keep = weight != 0
    weight = weight.double().clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(hessian)), upper=True)
    size, steps = asked.group_size or weight.shape[1], 2**asked.bits - 1
    result = torch.empty_like(weight)
    for i in range(weight.shape[1]):
        if i % size == 0:
            group = weight[:, i : i + size] * keep[:, i : i + size]
            high, low = group.amax(1).clamp(min=0), group.amin(1).clamp(max=0)
            if asked.symmetric:
                high = torch.maximum(high, -low)
                low = -high
            # The grid is stored in float32.
            scale = ((high - low) / steps).float().double()
            zero = torch.full_like(scale, (steps + 1) / 2) if asked.symmetric else torch.round(-low / scale)
        code = (torch.round(weight[:, i] / scale) + zero).clamp(0, steps)
        result[:, i] = torch.where(keep[:, i], (code - zero) * scale, 0)
        error = (weight[:, i] - result[:, i]) / upper[i, i]
        weight[:, i:] -= error[:, None] * upper[i, i:]
    return result


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", MASKS)
def test_weights_are_those_of_the_published_update(name, mask):
    weight, hessian = random_case(24, 96, seed=5)
    weight = weight * MASKS[mask](weight)
    asked = parse_quantised(name)
    # A symmetric grid puts minus the largest weight of a group half-way between two codes but for the rounding of its
    # scale, so that in float32 the last bit of what the group was updated to would decide.
    found = gptq(weight.double(), hessian.double(), asked, torch.float32).weight
    torch.testing.assert_close(found.double(), published(weight, hessian, asked), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
@given(st.sampled_from(NAMES), st.integers(0, 99), st.integers(1, 20))
def test_it_beats_rounding_to_nearest_and_keeps_zeros(mask, name, seed, rows):
    weight, hessian = random_case(rows, 64, seed)
    weight = weight * MASKS[mask](weight)
    asked = parse_quantised(name)
    nearest = round_to_nearest(weight, asked, torch.float32).weight
    found = gptq(weight, hessian, asked, torch.float32).weight
    assert (found[weight == 0] == 0).all() and (nearest[weight == 0] == 0).all()
    # A single row can be unlucky, as the choice is greedy.
    assert loss(weight, found, hessian) < loss(weight, nearest, hessian) * (1 if rows >= 4 else 1.5)


@given(st.sampled_from(["int8", "int4-g16", "int4-asym", "int8-g8-asym"]), st.integers(0, 99))
def test_rounding_moves_a_weight_by_half_a_step_at_most(name, seed):
    asked = parse_quantised(name)
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
    found = round_to_nearest(weight, asked, torch.float32)
    steps = found.scales.repeat_interleave(32 // found.scales.shape[1], dim=1)
    # The zero point is rounded too, which may cost the end of a range half a step.
    assert ((found.weight - weight).abs() <= steps * (1.001 if not asked.symmetric else 0.5001)).all()


@given(st.sampled_from(BITS), st.booleans(), st.integers(1, 9), st.integers(1, 5))
def test_what_is_packed_is_unpacked(bits, symmetric, rows, groups):
    asked = parse_quantised(f"int{bits}-g8{'' if symmetric else '-asym'}")
    limit = 2 ** (bits - 1)
    codes = torch.randint(-limit, limit, (rows, 8 * groups), dtype=torch.int8)
    zeros = torch.randint(-limit, limit, (rows, groups), dtype=torch.int8)
    quantised = Quantised(codes, torch.rand(rows, groups), zeros * (not symmetric))
    assert torch.equal(unpack(pack(quantised, asked), bits), quantised.weight)


def test_a_matrix_of_zeros_stays_one():
    _, hessian = random_case(4, 32, 0)
    for name in NAMES:
        assert gptq(torch.zeros(4, 32), hessian, parse_quantised(name), torch.float32).weight.count_nonzero() == 0


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
@pytest.mark.parametrize("name", ["int8", "gptq4", "gptq4-g8-asym", "gptq3-g8"])
def test_transformers_loads_what_was_measured(family, name, tmp_path):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    folder = make_model(family, tmp_path / "model", dtype="bfloat16")
    target = quantise(folder, name, tmp_path / "quantised")
    # Zero points are packed, and only loading as weights unpacks them.
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "asym" in name else {}
    model = AutoModelForCausalLM.from_pretrained(target, **options).eval()
    decoder = open_decoder(target, "cpu")
    with torch.no_grad():
        losses = torch.stack([model(row[None], labels=row[None]).loss for row in TOKENS]).float()
    assert losses.mean().exp().item() == pytest.approx(perplexity(decoder, TOKENS, 2), rel=1e-3)
    assert size_of(target)["bytes"] < 0.8 * size_of(folder)["bytes"]
    assert size_of(target)["parameters"] == size_of(folder)["parameters"]
    for linear in decoder.linears():
        difference = decoder.checkpoint.matrix(linear) - open_checkpoint(folder).matrix(linear)
        assert difference.abs().max() < 0.35, linear


def test_what_was_pruned_stays_zero_and_layers_see_those_before(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_model("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in open_decoder(folder, "cpu").linears():
        weight = tensors[f"{name}.weight"]
        weight.mul_(keep_n_of_m(weight.abs(), 2, 4))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(quantise(folder, "gptq4-g8", tmp_path / "quantised"))
    for name in open_decoder(folder, "cpu").linears():
        assert (checkpoint.matrix(name)[tensors[f"{name}.weight"] == 0] == 0).all()
    quantise(folder, "int4-g8", tmp_path / "rounded")
    dense, by_gptq, by_rounding = (load_whole(tmp_path / name, "cpu") for name in ("model", "quantised", "rounded"))
    with torch.no_grad():
        errors = [(model(TOKENS).logits - dense(TOKENS).logits).norm() for model in (by_gptq, by_rounding)]
    assert errors[0] < errors[1]


def test_a_sliced_model_can_be_quantised(tmp_path):
    folder = make_model("llama", tmp_path / "model")
    slice_checkpoint(open_decoder(folder, "cpu"), TOKENS, 2, 32, tmp_path / "sliced", IDENTITY)
    target = quantise(tmp_path / "sliced", "gptq8-g8", tmp_path / "both")
    model = load_whole(target, "cpu")
    losses = torch.stack([model(row[None], labels=row[None]).loss for row in TOKENS])
    assert losses.mean().exp().item() == pytest.approx(perplexity(open_decoder(target, "cpu"), TOKENS, 2), rel=1e-4)


@pytest.mark.parametrize(
    ("family", "told"),
    [
        *(("gpt2", "no linears to compressed-tensors"), ("mixtral", "no linears to compressed-tensors")),
        *(("zamba2", "several layers use model.layers.1."), ("mamba", "it asks for their weights beforehand")),
    ],
)
def test_what_transformers_would_not_load_is_refused(family, told, tmp_path):
    with pytest.raises(UserError, match=told):
        quantise(make_model(family, tmp_path / "model"), "gptq4", tmp_path / "quantised")
    assert not (tmp_path / "quantised").exists()


def test_a_group_must_divide_the_inputs(tmp_path):
    with pytest.raises(UserError, match=r"group size 32: does not divide the 48 inputs of model\.layers\.0"):
        quantise(make_model("llama", tmp_path / "model"), "gptq4-g32", tmp_path / "quantised")


def test_weights_quantised_elsewhere_are_refused(tmp_path):
    folder = make_model("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    changed = copy.deepcopy(config) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="another format than pack-quantized"):
        open_checkpoint(folder)


@pytest.mark.parametrize("form", ["inputs in another order", "inputs rounded too"])
def test_what_packed_numbers_alone_do_not_tell_is_refused(form, tmp_path):
    """The same format of compressed-tensors, in which a weight is not all there is to know."""
    target = quantise(make_model("llama", tmp_path / "model"), "gptq8-g8", tmp_path / "quantised")
    if form == "inputs in another order":
        tensors = load_file(target / "rest.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight_g_idx"] = torch.arange(48) // 8
        save_file(tensors, target / "rest.safetensors", {"format": "pt"})
    else:
        config = json.loads((target / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {
            "num_bits": 8,
            "dynamic": True,
        }
        (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="another format than pack-quantized"):
        open_checkpoint(target)
