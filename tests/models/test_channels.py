"""Channels that change places: found in every family, nothing computed changes, and the way back is exact."""

import pytest
import torch
from families import FAMILIES, VOCABULARY, make_model, with_uneven_norms
from hypothesis import given, settings
from hypothesis import strategies as st

from stepdown.cli import log
from stepdown.errors import UserError
from stepdown.models.channels import find_channels, order_of_side, sort_in_heads
from stepdown.models.checkpoint import Checkpoint
from stepdown.models.decoder import open_decoder
from stepdown.models.layer_walk import LayerWalk
from stepdown.models.permutation import inverse, read_orders, write_orders
from stepdown.prune.channel_sorting import check_same_function, sorted_orders, write_permuted

TOKENS = torch.randint(2, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))
# Of a layer: channels of the values and heads that have their own, channels of an MLP, how many MLPs.
FOUND = {
    **dict.fromkeys(("llama", "llama_tied", "qwen2"), (24, 2, 72, 1)),
    **dict.fromkeys(("opt", "gpt_neox"), (48, 4, 72, 1)),
    **dict.fromkeys(("gpt2", "bloom"), (48, 4, 192, 1)),
    **{"qwen3": (12, 1, 72, 1), "falcon": (12, 1, 192, 1), "gemma2": (20, 2, 72, 1)},
    **{"mixtral": (24, 2, 72, 4), "qwen2_moe": (24, 2, 24, 4), "qwen3_moe": (12, 1, 24, 4)},
}
LAYERS = 5


@pytest.fixture(scope="module", params=FAMILIES)
def found(request, tmp_path_factory):
    """The name of a family, the folder of a model, and its channels."""
    folder = with_uneven_norms(make_model(request.param, tmp_path_factory.mktemp("family") / "model"))
    return request.param, folder, find_channels(open_decoder(folder, "cpu"), TOKENS)


def logits(folder):
    walk = LayerWalk(open_decoder(folder, "cpu"), [TOKENS])
    for _, _, replay in walk.layers(None):
        replay()
    return next(walk.logits())


def random_orders(channels, seed):
    generator = torch.Generator().manual_seed(seed)
    return sorted_orders(channels, [torch.rand(len(group.heads), generator=generator) for group in channels])


def test_the_residual_the_values_and_the_mlps_are_found(found):
    family, _, channels = found
    values, heads, inner, mlps = FOUND[family]
    residual, *inside = channels
    assert residual.name == "residual" and len(residual.heads) == 48
    groups = [(len(group.heads), len(group.heads.unique())) for group in inside]
    assert groups.count((values, heads)) == LAYERS and groups.count((inner, 1)) == mlps * LAYERS
    shared = LAYERS if family == "qwen2_moe" else 0
    assert len(groups) == (1 + mlps) * LAYERS + shared


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=3, deadline=None)
def test_any_order_leaves_the_logits_and_its_inverse_gives_the_bytes_back(found, tmp_path_factory, seed):
    _, folder, channels = found
    place = tmp_path_factory.mktemp("sorted")
    orders = random_orders(channels, seed)
    write_permuted(open_decoder(folder, "cpu"), orders, place / "sorted")
    torch.testing.assert_close(logits(place / "sorted"), logits(folder), rtol=0, atol=1e-4)
    before, moved = Checkpoint(folder), Checkpoint(place / "sorted")
    assert moved.content_hash() != before.content_hash()
    write_orders(orders, place / "permutation.safetensors", "before", "after")
    back = inverse(read_orders(place / "permutation.safetensors"))
    write_permuted(open_decoder(place / "sorted", "cpu"), back, place / "back")
    assert Checkpoint(place / "back").content_hash() == before.content_hash()


@given(heads=st.lists(st.integers(0, 4), min_size=1, max_size=60), data=st.data())
def test_channels_are_sorted_inside_their_heads(heads, data):
    heads = torch.tensor(heads)
    importance = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=len(heads), max_size=len(heads))))
    order = sort_in_heads(heads, importance)
    assert torch.equal(order.sort().values, torch.arange(len(heads))) and torch.equal(heads[order], heads)
    for head in heads.unique():
        placed = order[heads == head]
        expected = sorted(placed.tolist(), key=lambda channel: (-importance[channel], channel))
        assert placed.tolist() == expected


def test_what_is_at_several_places_moves_in_each_of_them():
    # Two query heads share the values 0 and 1; a third and a fourth share 2 and 3; one place holds none.
    numbers = torch.tensor([0, 1, 0, 1, -1, 2, 3, 2, 3])
    assert order_of_side(numbers, torch.tensor([1, 0, 2, 3])).tolist() == [1, 0, 3, 2, 4, 5, 6, 7, 8]


def test_what_it_cannot_be_told_of_stays(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    # As many tokens as channels: which side of the head's matrix is which cannot be seen.
    folder = make_model("llama", tmp_path / "model", vocab_size=48)
    channels = find_channels(open_decoder(folder, "cpu"), TOKENS % 48)
    assert {group.name.rpartition(".")[2] for group in channels} == {"o_proj", "down_proj"}
    assert "family 'llama': the channels of the residual stay where they are: lm_head.weight is [48, 48]" in caplog.text


def test_another_model_is_refused(tmp_path):
    one, other = (make_model("llama", tmp_path / str(seed), seed=seed) for seed in (0, 1))
    check_same_function(open_decoder(one, "cpu"), open_decoder(one, "cpu"), TOKENS)
    with pytest.raises(
        UserError, match="a model of the family 'llama' computes something else; set sort_channels: fal"
    ):
        check_same_function(open_decoder(one, "cpu"), open_decoder(other, "cpu"), TOKENS)
