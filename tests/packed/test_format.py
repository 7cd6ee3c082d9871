"""The packed format: nothing is lost whatever the tiers, as small as it should be, and what does not fit is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from three_tiers import random_three_tier, tiers_by_shares

from stepdown.errors import UserError
from stepdown.packed.format import PARTS, pack, packed_bytes, unpack
from stepdown.tensors.blocks import grid_shape
from stepdown.tensors.tiers import Tier

SHAPES = [(96, 160), (100, 130), (48, 24), (16, 16), (1, 1), (17, 3)]
TYPES = [torch.bfloat16, torch.float16, torch.float32]


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@given(st.sampled_from(SHAPES), st.sampled_from([1, 10, 16, 256]), st.integers(0, 99), st.sampled_from(TYPES))
def test_unpacking_gives_the_matrix_bit_for_bit(shape, k, seed, dtype):
    weight, tiers = random_three_tier(shape, k, seed, dtype=dtype)
    matrix = pack(weight, tiers, k)
    matrix.check(k)
    assert torch.equal(bits(unpack(matrix)), bits(weight))
    assert torch.equal(matrix.tiers, tiers)


@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_blocks_on_one_tier(shape, tier):
    tiers = torch.full(grid_shape(shape, 16), tier, dtype=torch.uint8)
    weight, _ = random_three_tier(shape, 10, tiers=tiers)
    matrix = pack(weight, tiers, 10)
    matrix.check(10)
    assert torch.equal(bits(unpack(matrix)), bits(weight))


def test_blocks_may_hold_less_than_their_tier_allows():
    """As after finetuning, when kept weights have become zero: a 2:4 group with one left, an empty TopK block."""
    weight, tiers = random_three_tier((64, 64), 10)
    weight *= torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    weight[:16, :16] = 0
    assert torch.equal(unpack(pack(weight, tiers, 10)), weight)


def test_values_are_bits_and_not_numbers():
    weight, tiers = random_three_tier((16, 16), 10, tiers=torch.tensor([[Tier.TWO_FOUR]], dtype=torch.uint8))
    weight[0, :4] = torch.tensor([0.0, torch.nan, 0.0, -torch.inf])
    weight[1, :4] = torch.tensor([-0.0, 1e-40, 0.0, 0.0])
    assert torch.equal(bits(unpack(pack(weight, tiers, 10))), bits(weight))


def test_pruned_negative_zeros_are_zeros():
    weight, tiers = random_three_tier((32, 32), 10)
    assert torch.equal(unpack(pack(torch.where(weight == 0, -0.0, weight), tiers, 10)), weight)


@pytest.mark.parametrize("tier", [Tier.TWO_FOUR, Tier.TOP_K])
def test_a_matrix_that_is_not_as_sparse_as_its_tiers_is_not_packed(tier):
    with pytest.raises(ValueError, match="more weights than its tier"):
        pack(torch.ones(16, 16), torch.tensor([[tier]], dtype=torch.uint8), 10)


def test_size_at_the_default_schedules_end():
    shape = (512, 1024)
    weight, tiers = random_three_tier(shape, 10, tiers=tiers_by_shares(shape, ("0.35", "0.45", "0.20")))
    packed = pack(weight, tiers, 10)
    assert packed.nbytes == packed_bytes(tiers, 10) <= 0.63 * weight.nbytes


def test_same_matrix_same_bytes():
    weight, tiers = random_three_tier((100, 130), 10)
    first, second = pack(weight, tiers, 10), pack(weight.clone(), tiers.clone(), 10)
    assert all(torch.equal(getattr(first, part), getattr(second, part)) for part in PARTS)


@pytest.fixture(scope="module")
def packed():
    weight, tiers = random_three_tier((96, 160), 10)
    return pack(weight, tiers, 10)


def damage(packed, part, change):
    tensor = getattr(packed, part).clone()
    return replace(packed, **{part: change(tensor)})


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_another_size_or_type_is_refused(packed, part):
    for change in (lambda tensor: tensor[:-1], lambda tensor: tensor.int(), lambda tensor: tensor[None]):
        with pytest.raises(UserError, match="tiers"):
            damage(packed, part, change).check(10)


def test_a_tier_out_of_range_is_refused(packed):
    with pytest.raises(UserError, match="0 to 2"):
        damage(packed, "tiers", lambda tiers: tiers.index_fill_(1, torch.tensor([3]), 3)).check(10)


@pytest.mark.parametrize("part", ["positions", "top_k_positions"])
@pytest.mark.parametrize("place", [0, -1])
def test_positions_out_of_order_are_refused(packed, part, place):
    def repeat(tensor):
        tensor[place] = 0
        return tensor

    with pytest.raises(UserError, match=f"{part}: .* twice or out of order"):
        damage(packed, part, repeat).check(10)


def test_another_shape_or_k_is_refused(packed):
    for changed, k in ((replace(packed, shape=(96, 176)), 10), (replace(packed, shape=(112, 160)), 10), (packed, 9)):
        with pytest.raises(UserError):
            changed.check(k)
