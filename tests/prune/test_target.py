"""The shares that a target asks for, on a model: met by what is packed, or by the zeros there are."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from families import make_model
from hypothesis import given
from hypothesis import strategies as st

from stepdown.errors import UserError
from stepdown.models.decoder import open_decoder
from stepdown.models.tier_maps import dense_tier_map
from stepdown.packed.format import packed_bytes
from stepdown.prune.calibration import Calibration
from stepdown.prune.target import in_proportion, shares_for
from stepdown.tensors.tiers import tier_counts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of matrices in whole blocks, its map and a calibration."""
    folder = make_model("llama", tmp_path_factory.mktemp("budget") / "m", hidden_size=64, intermediate_size=96)
    decoder, generator = open_decoder(folder, "cpu"), torch.Generator().manual_seed(0)
    linears = decoder.linears()
    norms = {name: torch.rand(linear.in_features, generator=generator) for name, linear in linears.items()}
    gradients = {name: torch.rand(linear.out_features, generator=generator) for name, linear in linears.items()}
    shapes = {name: tuple(linear.weight.shape) for name, linear in linears.items()}
    return decoder.checkpoint, dense_tier_map(shapes, 16, 10, "0"), Calibration(norms, gradients)


def counts_for(model, target):
    checkpoint, tier_map, calibration = model
    shares = shares_for(target, checkpoint, tier_map, calibration, "wanda", torch.device("cpu"))
    assert list(shares) == ["dense", "mid_2_4", "topk"] and sum(map(Fraction, shares.values())) == 1
    blocks = sum(tiers.numel() for tiers in tier_map.tiers.values())
    counts = [Fraction(share) * blocks for share in shares.values()]
    assert tier_counts(list(shares.values()), blocks) == tuple(counts)
    return list(map(int, counts)), blocks


def packed_share(counts):
    tiers = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    return Fraction(packed_bytes(tiers, 10), 512 * sum(counts))


@pytest.mark.parametrize("share", ["0.9", "0.5", "0.07"])
def test_bytes_are_those_of_the_packed_format_and_never_more(model, share):
    counts, blocks = counts_for(model, {"bytes": float(share)})
    # One block's two steps short of what would be too much at most.
    assert Fraction(share) - Fraction(482, 512 * blocks) < packed_share(counts) <= Fraction(share)


@pytest.mark.parametrize("share", ["0.1", "0.6", "0.96"])
def test_sparsity_is_that_of_the_zeros(model, share):
    (_, two_four, top_k), blocks = counts_for(model, {"sparsity": float(share)})
    zeros = Fraction(128 * two_four + 246 * top_k, 256 * blocks)
    assert Fraction(share) <= zeros < Fraction(share) + Fraction(246, 256 * blocks)


@pytest.mark.parametrize("target", [{"bytes": 0.05}, {"sparsity": 0.97}])
def test_what_cannot_be_met_is_told(model, target):
    with pytest.raises(UserError, match=r"cannot be met: all blocks as TopK spare .* of .*; ask for less"):
        counts_for(model, target)


SHARES = st.tuples(st.integers(0, 100), st.integers(0, 100)).map(sorted)


@given(st.lists(SHARES, min_size=1, max_size=8), SHARES)
def test_shares_in_proportion_end_at_the_target_and_only_step_down(draws, target):
    def shares(pair):
        return tuple(str(Fraction(share, 100)) for share in (100 - pair[1], pair[1] - pair[0], pair[0]))

    # Both ways that are gone, to TopK and away from Dense, only grow.
    rows = [shares(pair) for pair in zip(*map(sorted, zip(*draws, strict=True)), strict=True)]
    found = [tuple(map(Fraction, in_proportion(row, rows[-1], shares(target)))) for row in rows]
    assert found[-1] == tuple(map(Fraction, shares(target)))
    for before, after in pairwise([(1, 0, 0), *found]):
        assert sum(after) == 1 and min(after) >= 0
        assert after[0] <= before[0] and after[2] >= before[2]
    assert [in_proportion(row, rows[-1], rows[-1]) for row in rows] == rows
