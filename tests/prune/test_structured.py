"""SliceGPT and ShortGPT: rotations that change nothing, layers by their influence, models that load again."""

import json
import math
from fractions import Fraction

import pytest
import torch
from families import FAMILIES, VOCABULARY, make_model, with_uneven_norms
from torch.nn.functional import cosine_similarity

from stepdown.errors import UserError
from stepdown.measure.perplexity import perplexity
from stepdown.measure.sizes import remaining, size_of
from stepdown.models.checkpoint import Checkpoint
from stepdown.models.decoder import load_whole, open_decoder
from stepdown.models.layer_walk import LayerWalk
from stepdown.plan.compressions import REMOVALS, check_step, parse_step, sliced_width
from stepdown.prune.layer_removal import block_influence, choose_layers, taylor_importance, write_without_layers
from stepdown.prune.slicing import principal_directions, slice_checkpoint

TOKENS = torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(1))
IDENTITY = {"base_model": "0", "iteration": "1"}
SLICED = [
    ("llama", {}),
    ("llama_tied", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("opt", {}),
    ("opt", {"word_embed_proj_dim": 48}),
    ("opt", {"word_embed_proj_dim": 48, "tie_word_embeddings": False}),
]


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def cut(folder, width, target):
    slice_checkpoint(open_decoder(folder, "cpu"), TOKENS, 2, width, target, IDENTITY)
    return target


# --- SliceGPT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "changes"), SLICED)
def test_rotation_alone_leaves_the_logits_as_they_were(family, changes, tmp_path):
    folder = with_uneven_norms(make_model(family, tmp_path / "model", **changes))
    rotated = load_whole(cut(folder, 48, tmp_path / "rotated"), "cpu")
    torch.testing.assert_close(logits(rotated), logits(load(folder)), rtol=0, atol=1e-4)


def test_fewer_tokens_than_channels_can_be_rotated_with_a_tied_head(tmp_path):
    folder = with_uneven_norms(make_model("llama_tied", tmp_path / "model", vocab_size=40))
    slice_checkpoint(open_decoder(folder, "cpu"), TOKENS % 40, 2, 48, tmp_path / "rotated", IDENTITY)
    rotated = load_whole(tmp_path / "rotated", "cpu")
    found, expected = rotated(TOKENS % 40).logits, load(folder)(TOKENS % 40).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_a_sliced_model_is_not_saved_in_another_form(tmp_path):
    sliced = load_whole(cut(make_model("llama", tmp_path / "model"), 32, tmp_path / "sliced"), "cpu")
    with pytest.raises(UserError, match="a sliced model is not saved anew"):
        sliced.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(("family", "changes"), SLICED)
def test_a_sliced_model_is_smaller_and_loads_again(family, changes, tmp_path):
    folder = with_uneven_norms(make_model(family, tmp_path / "model", **changes))
    target = cut(folder, 32, tmp_path / "sliced")
    model, again = load_whole(target, "cpu"), load_whole(target, "cpu")
    assert torch.equal(logits(model), logits(again))
    losses = torch.stack([model(row[None], labels=row[None]).loss for row in TOKENS])
    measured = perplexity(open_decoder(target, "cpu"), TOKENS, 2)
    assert losses.mean().exp().item() == pytest.approx(measured, rel=1e-4)
    small, large = size_of(target), size_of(folder)
    assert small["parameters"] < large["parameters"] and small["bytes"] < large["bytes"]
    assert small["parameters"] == sum(tensor.numel() for tensor in model.parameters())
    assert remaining(target, folder)["overall"] > 0
    # With a cache, as when it writes.
    model.generation_config.eos_token_id = None
    assert model.generate(TOKENS[:1, :8], max_new_tokens=4, do_sample=False).shape == (1, 12)


def test_parameters_are_those_of_the_narrower_matrices(tmp_path):
    folder = make_model("llama_tied", tmp_path / "model")
    width, layers = 32, 5
    read = (48 + 24 + 24) + 2 * 72  # q, k, v of two heads of keys and values; gate and up
    written = 48 + 72
    expected = layers * (width * (read + written) + 2 * width**2) + VOCABULARY * width + width**2
    assert size_of(cut(folder, width, tmp_path / "sliced"))["parameters"] == expected


def test_directions_are_the_principal_components(tmp_path):
    walk = LayerWalk(open_decoder(make_model("llama", tmp_path / "model"), "cpu"), [TOKENS])
    states = walk.states[0].flatten(0, 1).double()
    directions = principal_directions(walk, 5)
    expected = torch.linalg.svd(states, full_matrices=False).Vh[:5].T
    torch.testing.assert_close((directions.T @ expected).abs(), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("width", "ratio", "round_to", "left"),
    [(256, "0.25", 8, 192), (256, "0.1", 8, 224), (256, "0.1", 1, 230), (36, "0", 8, 36), (4096, "0.3", 8, 2864)],
)
def test_widths_are_rounded_down(width, ratio, round_to, left):
    assert sliced_width(width, Fraction(ratio), round_to) == left


def test_a_width_of_nothing_is_refused():
    with pytest.raises(UserError, match="leaves nothing of 48 in multiples of 8"):
        sliced_width(48, Fraction("0.9"), 8)


def test_a_width_of_nothing_is_found_before_the_first_job(tmp_path):
    folder = make_model("llama", tmp_path / "model")
    check_step("structured/slicegpt-0.25", folder, 8)
    with pytest.raises(UserError, match="in multiples of 4096; slice less"):
        check_step("structured/slicegpt-0.25", folder, 4096)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "bloom", "gemma2", "mixtral"])
def test_families_that_cannot_be_rotated_are_named_with_the_reason(family, tmp_path):
    folder = make_model(family, tmp_path / "model")
    with pytest.raises(UserError) as caught:
        cut(folder, 32, tmp_path / "sliced")
    message = str(caught.value)
    assert f"{family!r}: " in message and "can rotate llama" in message and "\n" not in message
    assert not (tmp_path / "sliced").exists()
    with pytest.raises(UserError, match=f"{family!r}: "):
        check_step("structured/slicegpt-0.25", folder)


def test_post_norm_opt_cannot_be_rotated(tmp_path):
    folder = make_model("opt", tmp_path / "model", do_layer_norm_before=False)
    with pytest.raises(UserError, match="do_layer_norm_before is false"):
        check_step("structured/slicegpt-0.25", folder)


# --- ShortGPT --------------------------------------------------------------------------------------------------------


def test_layers_go_in_the_order_of_their_influence(tmp_path):
    folder = make_model("llama", tmp_path / "model")
    states = list(load(folder)(TOKENS, output_hidden_states=True).hidden_states)
    # The last of these has been through the final norm already.
    walk = LayerWalk(open_decoder(folder, "cpu"), [TOKENS])
    for _, _, replay in walk.layers(""):
        replay()
    states[-1] = walk.states[0]
    brute_force = [
        1 - sum(cosine_similarity(a.double(), b.double(), dim=0).item() for a, b in zip(x, y, strict=True)) / len(x)
        for x, y in zip(*([s.detach().flatten(0, 1) for s in part] for part in (states[:-1], states[1:])), strict=True)
    ]
    influence = block_influence(open_decoder(folder, "cpu"), TOKENS, 4)
    torch.testing.assert_close(influence, torch.tensor(brute_force, dtype=torch.float64), rtol=0, atol=1e-6)
    order = sorted(range(5), key=brute_force.__getitem__)
    for count in range(1, 5):
        removed, _ = choose_layers(open_decoder(folder, "cpu"), TOKENS, 4, count, "block_influence")
        assert removed == sorted(order[:count])


def test_taylor_importance_is_that_of_backpropagation_through_the_whole_model(tmp_path):
    folder = make_model("llama", tmp_path / "model")
    model = load(folder)
    model(TOKENS, labels=TOKENS).loss.backward()
    expected = [
        sum((parameter * parameter.grad).abs().sum().item() for parameter in layer.parameters() if parameter.dim() == 2)
        for layer in model.model.layers
    ]
    for batch_size in (2, 4, 6):
        found = taylor_importance(open_decoder(folder, "cpu"), TOKENS, batch_size)
        assert found.tolist() == pytest.approx(expected, rel=1e-4), batch_size


@pytest.mark.parametrize("removal", REMOVALS)
def test_every_way_of_choosing_removes_as_many_as_asked(removal, tmp_path):
    folder = make_model("llama", tmp_path / "model")
    removed, scores = choose_layers(open_decoder(folder, "cpu"), TOKENS, 3, 2, removal)
    assert len(set(removed)) == 2 and removed == sorted(removed)
    assert len(scores) == (4 if removal == "angular" else 5)
    if removal == "perplexity":
        decoder = open_decoder(folder, "cpu")
        assert scores == [perplexity(decoder, TOKENS, 3, without={number}) for number in range(5)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("removed", [[0], [1, 2]])
def test_a_shorter_checkpoint_is_a_model_without_these_layers(family, removed, tmp_path):
    folder = make_model(family, tmp_path / "model")
    decoder = open_decoder(folder, "cpu")
    write_without_layers(decoder, removed, tmp_path / "shorter", IDENTITY)
    model = load(tmp_path / "shorter")
    assert model.config.num_hidden_layers == 5 - len(removed)
    types = getattr(model.config, "layer_types", None)
    if types:
        original = decoder.model.config.layer_types
        assert types == [kind for number, kind in enumerate(original) if number not in removed]
    losses = torch.stack([model(row[None], labels=row[None]).loss for row in TOKENS])
    expected = perplexity(decoder, TOKENS, 2, without=removed)
    assert losses.mean().exp().item() == pytest.approx(expected, rel=1e-4)
    assert perplexity(open_decoder(tmp_path / "shorter", "cpu"), TOKENS, 2) == pytest.approx(expected, rel=1e-6)
    assert size_of(tmp_path / "shorter")["bytes"] < size_of(folder)["bytes"]
    model.generation_config.eos_token_id = None
    assert model.generate(TOKENS[:1, :8], max_new_tokens=3, do_sample=False).shape == (1, 11)


def test_layers_of_different_kinds_are_renumbered_with_their_lists_or_not_at_all(tmp_path):
    folder = make_model("qwen2_moe", tmp_path / "listed", mlp_only_layers=[1])
    write_without_layers(open_decoder(folder, "cpu"), [0], tmp_path / "shorter", IDENTITY)
    assert json.loads((tmp_path / "shorter/config.json").read_text())["mlp_only_layers"] == [0]
    folder = make_model("qwen2_moe", tmp_path / "every_second", decoder_sparse_step=2)
    with pytest.raises(UserError, match="another kind of layer under its new number"):
        write_without_layers(open_decoder(folder, "cpu"), [0], tmp_path / "wrong", IDENTITY)
    assert not (tmp_path / "wrong").exists()


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("structured/slicegpt-1.5", "found '1.5'; write a share from 0 to below 1"),
        ("structured/slicegpt-1", "found '1'"),
        ("structured/slicegpt--0.1", "found '-0.1'"),
        ("structured/slicegpt", "found 'no share'"),
        ("structured/shortgpt-0", "removes 0 layers"),
        ("structured/shortgpt-5", "has 5 layers; remove at most 4"),
        ("structured/llmpruner-1", "unknown method 'llmpruner'"),
        ("structured/slicegpt-0.25/iter0", "starts from the base model"),
        ("structured/slicegpt-0.25/", "write structured/slicegpt-0.25"),
        ("quantised/gptq2/iter0", "2 bits are not offered; write 3 or 4 or 8"),
        ("quantised/awq4/iter0", "write int or gptq with its bits"),
        ("quantised/gptq4-g0/iter0", "a group of 0 weights"),
        ("quantised/gptq4-g40/iter0", "group size 40: does not divide the 48 inputs of hidden_size"),
        ("quantised/gptq4", "of which step?"),
        ("dynamic/teal-0.5/iter0", "unknown allocation 'teal'"),
        ("dynamic/uniform-1.2/iter0", "found '1.2'"),
        ("dynamic/uniform-0.5/iterx", "of which step?"),
        ("pruned/wanda", "write structured/NAME"),
    ],
)
def test_a_wrong_name_is_one_line_that_says_what_could_stand_there(step, message, tmp_path):
    folder = make_model("llama", tmp_path / "model")
    with pytest.raises(UserError) as caught:
        check_step(step, folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_names_say_what_is_asked():
    assert parse_step("structured/slicegpt-0.25").ratio == Fraction(1, 4)
    assert parse_step("structured/shortgpt-6").layers == 6
    quantised = parse_step("quantised/gptq4-g128-asym/oneshot/wanda-2of4")
    assert (quantised.bits, quantised.group_size, quantised.symmetric) == (4, 128, False)
    assert parse_step("dynamic/greedy-0.4/iter3").share == Fraction(2, 5)


# --- sizes and broken weights ----------------------------------------------------------------------------------------


def test_sizes_count_what_is_there(tmp_path):
    folder = make_model("llama_tied", tmp_path / "model", dtype="bfloat16")
    checkpoint = Checkpoint(folder)
    assert size_of(folder)["parameters"] == sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)
    assert remaining(folder, folder)["overall"] == 0


@pytest.mark.parametrize("removal", ["block_influence", "angular", "slicing"])
def test_weights_that_are_not_finite_are_told(removal, tmp_path):
    folder = make_model("llama", tmp_path / "model")
    model = load(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="NaN"):
        if removal == "slicing":
            cut(folder, 32, tmp_path / "sliced")
        else:
            choose_layers(open_decoder(folder, "cpu"), TOKENS, 2, 1, removal)
    assert not (tmp_path / "sliced").exists()
