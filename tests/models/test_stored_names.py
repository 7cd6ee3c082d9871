"""Under which names, in which types and forms weights are stored, and that they count the same everywhere."""

import json
import logging

import pytest
import torch
from families import VOCABULARY, make_model
from safetensors.torch import load_file, save_file

from stepdown.errors import UserError
from stepdown.measure.perplexity import perplexity
from stepdown.measure.speed import measure_speed
from stepdown.models.checkpoint import Checkpoint, rewrite_checkpoint
from stepdown.models.decoder import find_layers, load_whole, open_decoder
from stepdown.models.importing import tell_what_is_pruned
from stepdown.models.layer_walk import LayerWalk
from stepdown.models.tier_maps import dense_tier_map
from stepdown.packed.folder import write_packed
from stepdown.packed.model import load_packed
from stepdown.plan.compressions import parse_quantised
from stepdown.prune.layer_removal import write_without_layers
from stepdown.prune.model_quantisation import quantise_checkpoint
from stepdown.prune.slicing import slice_checkpoint

IDENTITY = {"base_model": "0" * 64, "iteration": "1"}
TOKENS = torch.randint(2, VOCABULARY - 8, (5, 24), generator=torch.Generator().manual_seed(1))


def load(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def change(folder, **tensors):
    """Put tensors, by name, with `__` for dots, into the one file of a folder; None takes one away."""
    weights = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        weights.pop(name.replace("__", "."), None)
        if tensor is not None:
            weights[name.replace("__", ".")] = tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def logits(folder):
    walk = LayerWalk(open_decoder(folder, "cpu"), [TOKENS])
    for _, _, replay in walk.layers(None):
        replay()
    return next(walk.logits())


def whole(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def pack(folder, tmp_path):
    """The packed model of a folder, every block Dense."""
    shapes = {name: tuple(linear.weight.shape) for name, linear in open_decoder(folder, "cpu").linears().items()}
    tier_map = dense_tier_map(shapes, 16, 10, IDENTITY["base_model"])
    rewrite_checkpoint(folder, tmp_path / "base", lambda _: None, IDENTITY | {"iteration": "0"})
    write_packed(Checkpoint(tmp_path / "base"), tier_map, "map", tmp_path / "packed")
    return load_packed(tmp_path / "packed", "torch", "cpu")


def perplexity_of(model):
    with torch.no_grad():
        return torch.stack([model(row[None], labels=row[None]).loss for row in TOKENS]).mean().exp().item()


# --- types -----------------------------------------------------------------------------------------------------------


def test_what_transformers_keeps_in_float32_stays_in_it(tmp_path):
    """Rounded to bfloat16, differences between these biases are gone, and tokens go to other experts."""
    folder = make_model("deepseek_v3", tmp_path / "model", dtype="bfloat16")
    name = "model.layers.4.mlp.gate.e_score_correction_bias"
    bias = 1 + torch.arange(4) * 1e-3
    change(folder, **{name.replace(".", "__"): bias})
    assert load(folder).get_buffer(name.removesuffix(".weight")).dtype == torch.float32
    assert torch.equal(logits(folder), whole(load(folder)))
    assert torch.equal(load_whole(folder, "cpu").state_dict()[name], bias)
    rewrite_checkpoint(folder, tmp_path / "again", lambda _: None, IDENTITY)
    assert torch.equal(Checkpoint(tmp_path / "again").tensors([name])[name], bias)
    packed = pack(folder, tmp_path)
    assert torch.equal(packed.state_dict()[name], bias)
    assert torch.equal(whole(packed), whole(load(folder)))


def test_what_a_family_makes_float32_stays_in_it_when_packed(tmp_path):
    """Of a float32 model it is told from the rest by nothing but how the model is built in bfloat16."""
    folder = make_model("zamba", tmp_path / "model")
    model, packed = load(folder, dtype=torch.bfloat16), pack(folder, tmp_path)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    kept = {name for name, kind in types.items() if kind == torch.float32}
    assert kept and kept == {name for name, tensor in packed.state_dict().items() if tensor.dtype == torch.float32}
    assert torch.equal(whole(packed), whole(model))


# --- ties ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def contradicted(tmp_path):
    """config.json ties the head to the embedding, and the file has another head."""
    folder = make_model("llama_tied", tmp_path / "contradicted")
    change(folder, lm_head__weight=torch.randn(VOCABULARY, 48, generator=torch.Generator().manual_seed(2)) / 10)
    return folder


def test_weights_count_and_not_what_config_says_of_them(contradicted, tmp_path):
    model = load(contradicted)
    expected = whole(model)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    torch.testing.assert_close(logits(contradicted), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole(load_whole(contradicted, "cpu")), expected, rtol=0, atol=1e-6)
    decoder = open_decoder(contradicted, "cpu")
    slice_checkpoint(decoder, TOKENS, 2, 48, tmp_path / "sliced", IDENTITY)
    assert perplexity(open_decoder(tmp_path / "sliced", "cpu"), TOKENS, 2) == pytest.approx(perplexity_of(model), 1e-4)
    torch.testing.assert_close(whole(load_whole(tmp_path / "sliced", "cpu")), expected, rtol=0, atol=1e-4)
    quantise_checkpoint(decoder, None, 2, parse_quantised("int8"), tmp_path / "int8", IDENTITY)
    assert perplexity(open_decoder(tmp_path / "int8", "cpu"), TOKENS, 2) == pytest.approx(perplexity_of(model), 1e-2)
    packed = pack(contradicted, tmp_path)
    torch.testing.assert_close(whole(packed), whole(load(contradicted, dtype=torch.bfloat16)), rtol=0, atol=1e-2)
    write_without_layers(open_decoder(contradicted, "cpu"), [1], tmp_path / "shorter", IDENTITY)
    torch.testing.assert_close(logits(tmp_path / "shorter"), whole(load(tmp_path / "shorter")), rtol=0, atol=1e-6)


def test_ties_count_in_both_directions(tmp_path):
    folder = make_model("llama_tied", tmp_path / "model")
    expected = whole(load(folder))
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, lm_head__weight=table, model__embed_tokens__weight=None)
    torch.testing.assert_close(logits(folder), expected, rtol=0, atol=1e-6)


# --- blocks that several layers use ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "uses", "reason"),
    [
        ("zamba", [2, 5, 8], r"layer 5 uses model\.layers\.2\.shared_transf.*, which it would not find any more"),
        ("zamba2", [1, 4, 5, 6], "would be another kind of layer under its new number"),
    ],
)
def test_layers_whose_block_others_use_are_not_removed(family, uses, reason, tmp_path):
    decoder = open_decoder(make_model(family, tmp_path / "model"), "cpu")
    places = range(len(decoder.layers))
    sharing = [place for place in places if any("shared_transf" in name for name in decoder.linears_of(place))]
    assert sharing == uses
    with pytest.raises(UserError, match=reason):
        write_without_layers(decoder, uses[:1], tmp_path / "shorter", IDENTITY)
    assert not (tmp_path / "shorter").exists()
    with pytest.raises(UserError, match=r"another kind of layer|no zamba that transformers builds"):
        write_without_layers(decoder, uses[1:], tmp_path / "shorter", IDENTITY)
    write_without_layers(decoder, [3], tmp_path / "shorter", IDENTITY)
    torch.testing.assert_close(logits(tmp_path / "shorter"), whole(load(tmp_path / "shorter")), rtol=0, atol=1e-5)


# --- what stays dense ------------------------------------------------------------------------------------------------


def test_what_cannot_be_pruned_is_named_with_its_share(tmp_path, caplog):
    decoder = open_decoder(make_model("dbrx", tmp_path / "model"), "cpu")
    with caplog.at_level(logging.INFO):
        tell_what_is_pruned(decoder)
    assert "33.8% of those in the decoder layers" in caplog.text
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [line.partition(" stays dense")[0] for line in warned] == [
        f"transformer.blocks.*.ffn.experts.mlp.{name}" for name in ("v1", "w1", "w2")
    ]
    assert all("of DbrxExpertGLU, no linears" in line for line in warned)


# --- vision-language models ------------------------------------------------------------------------------------------


def test_the_text_decoder_is_walked_and_shortened(tmp_path):
    vision = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 9, "num_attention_heads": 4}
    folder = make_model("gemma3", tmp_path / "model", vision_config=vision | {"image_size": 28, "patch_size": 14})
    decoder = open_decoder(folder, "cpu")
    assert find_layers(decoder.model) == "model.language_model.layers"
    torch.testing.assert_close(logits(folder), whole(load(folder)), rtol=0, atol=1e-6)
    write_without_layers(decoder, [1, 3], tmp_path / "shorter", IDENTITY)
    config = json.loads((tmp_path / "shorter/config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 3 and config["vision_config"]["num_hidden_layers"] == 9
    model = load(tmp_path / "shorter")
    assert len(model.model.language_model.layers) == 3
    torch.testing.assert_close(logits(tmp_path / "shorter"), whole(model), rtol=0, atol=1e-6)


# --- other than keys and values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "rwkv", "bamba", "bert", "mistral"])
def test_models_with_other_memories_are_measured(family, tmp_path):
    changes = {"is_decoder": False, "use_cache": False} if family == "bert" else {}
    model = load(make_model(family, tmp_path / "model", **changes))
    (speed,) = measure_speed([model], 8, 2, 1)
    assert speed.keys() == ({"prefill"} if family == "bert" else {"prefill", "decode"})


def test_lora_leaves_out_what_is_not_called(tmp_path, caplog):
    from stepdown.recover.lora import add_masked_adapter

    model = load(make_model("mamba", tmp_path / "model"))
    names = [f"backbone.layers.0.mixer.{name}" for name in ("in_proj", "x_proj", "out_proj")]
    masks = {name: torch.ones_like(model.get_submodule(name).weight, dtype=torch.bool) for name in names}
    adapted = add_masked_adapter(model, masks, ["all-linear"], 4, 8.0, 0.0)
    assert "mixer.out_proj and 0 others get no adapter" in caplog.text
    trained = {name.split(".lora_")[0] for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"in_proj", "x_proj"}
    with pytest.raises(UserError, match="none of them can have an adapter"):
        add_masked_adapter(load(tmp_path / "model"), masks, ["out_proj"], 4, 8.0, 0.0)


@pytest.mark.parametrize(
    ("family", "reason"), [("zamba2", "used by several layers"), ("falcon_mamba", "used without calls")]
)
def test_what_is_merged_is_what_was_trained(family, reason, tmp_path, caplog):
    """An adapter on one use of a shared block, or on weights that nothing calls, would be merged unseen."""
    from stepdown.recover.lora import add_masked_adapter

    model = load(make_model(family, tmp_path / "model"))
    linears = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and "." in name}
    masks = {name: torch.ones(linear.weight.shape, dtype=torch.bool) for name, linear in linears.items()}
    adapted = add_masked_adapter(model, masks, ["all-linear"], 4, 8.0, 0.0).eval()
    assert f"others get no adapter: their weights are {reason}" in caplog.text
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.01)
    trained = whole(adapted)
    assert not torch.equal(trained, whole(load(tmp_path / "model")))
    torch.testing.assert_close(whole(adapted.merge_and_unload()), trained, rtol=0, atol=1e-5)


# --- other forms -----------------------------------------------------------------------------------------------------


def test_a_form_that_nothing_explains_is_named(tmp_path):
    folder = make_model("llama", tmp_path / "model")
    matrix = load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    change(folder, model__layers__1__mlp__up_proj__weight=None, model__layers__1__mlp__w3__weight=matrix)
    with pytest.raises(UserError, match=r"no tensor 'model.layers.1.mlp.up_proj.weight', but 'model.layers.1.mlp.w3"):
        logits(folder)


def test_what_transformers_computes_while_loading_is_imported_first(tmp_path):
    folder = make_model("kimi_linear", tmp_path / "model")
    with pytest.raises(
        UserError, match=r"'kimi_linear' stores .*k_conv1d.weight in another form .*Concatenate.*import"
    ):
        open_decoder(folder, "cpu")


# --- walking twice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gptj", "qwen2"])
def test_a_decoder_is_walked_as_often_as_asked(family, tmp_path):
    """What no checkpoint holds, such as the table of positions inside GPT-J's layers, is there the second time too."""
    decoder = open_decoder(make_model(family, tmp_path / "model"), "cpu")
    assert perplexity(decoder, TOKENS, 2) == perplexity(decoder, TOKENS, 2)
