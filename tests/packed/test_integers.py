"""Tiers as whole numbers: what they stand for comes back bit for bit, as small as it should be; else it is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_format import SHAPES, damage
from three_tiers import random_three_tier, tiers_by_shares
from torch.nn.functional import linear

from stepdown.errors import UserError
from stepdown.packed.format import pack, unpack
from stepdown.packed.integers import PARTS, as_floats, pack_integers
from stepdown.packed.linear import ThreeTierLinear
from stepdown.tensors.block_rounding import round_in_blocks
from stepdown.tensors.blocks import grid_shape
from stepdown.tensors.tiers import Tier


def rounded_and_packed(weight, tiers, k, bits):
    rounded = round_in_blocks(weight, tiers, bits)
    return rounded, pack_integers(weight, rounded, tiers, k, bits)


@given(st.sampled_from(SHAPES), st.sampled_from([1, 10, 17, 256]), st.integers(0, 99), st.sampled_from([8, 4]))
def test_unpacking_gives_what_the_codes_stand_for(shape, k, seed, bits):
    weight, tiers = random_three_tier(shape, k, seed)
    rounded, matrix = rounded_and_packed(weight, tiers, k, bits)
    matrix.check(k)
    assert torch.equal(unpack(as_floats(matrix, torch.float32)), rounded.weight)
    assert torch.equal(unpack(as_floats(matrix)), rounded.weight.bfloat16())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_blocks_on_one_tier(shape, tier, bits):
    tiers = torch.full(grid_shape(shape, 16), tier, dtype=torch.uint8)
    weight, _ = random_three_tier(shape, 10, tiers=tiers)
    rounded, matrix = rounded_and_packed(weight, tiers, 10, bits)
    matrix.check(10)
    assert torch.equal(unpack(as_floats(matrix, torch.float32)), rounded.weight)


@pytest.mark.parametrize("bits", [8, 4])
def test_positions_are_those_of_the_weights_also_where_a_code_is_zero(bits):
    weight, tiers = random_three_tier((64, 64), 10)
    # A row of which all but one are far below a step.
    weight[3, weight[3].abs().argmax()] *= 1e6
    rounded, matrix = rounded_and_packed(weight, tiers, 10, bits)
    assert int(rounded.codes[3].count_nonzero()) < int(weight[3].count_nonzero())
    floats, exact = as_floats(matrix), pack(weight, tiers, 10)
    assert torch.equal(floats.positions, exact.positions)
    assert torch.equal(floats.top_k_positions, exact.top_k_positions)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.70), (4, 0.44)])
@pytest.mark.parametrize("shape", [(512, 1024), (256, 256)])
def test_size_at_the_default_schedules_end(bits, most, shape):
    weight, tiers = random_three_tier(shape, 10, tiers=tiers_by_shares(shape, ("0.35", "0.45", "0.20")))
    _, matrix = rounded_and_packed(weight, tiers, 10, bits)
    assert matrix.nbytes <= most * weight.numel()


@pytest.mark.parametrize("bits", [8, 4])
def test_where_the_codes_lie(bits):
    """Byte for byte as docs/packed-format.md has it, of a matrix of one block of each tier."""
    weight, tiers = random_three_tier((16, 48), 10, tiers=torch.tensor([[0, 1, 2]], dtype=torch.uint8))
    rounded, matrix = rounded_and_packed(weight, tiers, 10, bits)
    codes = rounded.codes.int()

    def stored(part, vector, r, i):
        """The code of row r, place i, in a vector of fours of the only block of a tier."""
        values = getattr(matrix, part)[0]
        if bits == 8:
            return int(values[vector, r, i])
        byte = int(values[vector // 2, r, i])
        return (byte >> 4 if vector % 2 else byte & 15) - 8

    for r in range(16):
        for g in range(4):
            assert [stored("dense", g, r, i) for i in range(4)] == codes[r, 4 * g : 4 * g + 4].tolist()
        for h in range(2):
            columns = [int(matrix.positions[0, h, r]) >> 2 * i & 3 for i in range(4)]
            found = [stored("two_four", h, r, i) for i in range(4)]
            expected = [int(codes[r, 16 + 8 * h + 4 * (i // 2) + columns[i]]) for i in range(4)]
            assert found == expected
    for value, position in zip(matrix.top_k[0].tolist(), matrix.top_k_positions[0].tolist(), strict=True):
        assert value == int(codes[position % 16, 32 + position // 16])
    if bits == 4:
        assert torch.equal(matrix.dense_multiples[0], rounded.multiples[:, 0])
        assert torch.equal(matrix.two_four_multiples[0], rounded.multiples[:, 1])


@pytest.fixture(scope="module", params=[8, 4])
def packed(request):
    weight, tiers = random_three_tier((96, 160), 10)
    return rounded_and_packed(weight, tiers, 10, request.param)[1]


@pytest.mark.parametrize("part", PARTS[4])
def test_a_part_of_another_size_or_type_is_refused(packed, part):
    if part not in packed.tensors:
        pytest.skip("of 4 bits only")
    for change in (lambda tensor: tensor[:-1], lambda tensor: tensor.double(), lambda tensor: tensor[None]):
        with pytest.raises(UserError, match="tiers"):
            damage(packed, part, change).check(10)


@pytest.mark.parametrize("part", ["positions", "top_k_positions"])
@pytest.mark.parametrize("place", [0, -1])
def test_positions_out_of_order_are_refused(packed, part, place):
    def repeat(tensor):
        tensor[place] = 0
        return tensor

    with pytest.raises(UserError, match=f"{part}: .* twice or out of order"):
        damage(packed, part, repeat).check(10)


@pytest.mark.parametrize("scale", [0.0, -1.0, torch.nan, torch.inf])
def test_a_scale_that_is_none_is_refused(packed, scale):
    with pytest.raises(UserError, match="scales: one is not a positive number"):
        damage(packed, "scales", lambda scales: scales.index_fill_(0, torch.tensor([5]), scale)).check(10)


def test_a_code_without_an_opposite_is_refused(packed):
    with pytest.raises(UserError, match="top_k: a code is -128"):
        damage(packed, "top_k", lambda codes: codes.index_fill_(0, torch.tensor([5]), -128)).check(10)


def test_another_shape_or_k_is_refused(packed):
    for changed, k in ((replace(packed, shape=(96, 176)), 10), (replace(packed, shape=(90, 160)), 10), (packed, 9)):
        with pytest.raises(UserError):
            changed.check(k)
    with pytest.raises(UserError):
        ThreeTierLinear(replace(packed, shape=(96, 176)), None, "torch")


def test_a_linear_computes_with_them(packed):
    weight = unpack(as_floats(packed))
    x = torch.randn(5, 160, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(ThreeTierLinear(packed, None, "torch")(x), linear(x, weight))
    assert torch.equal(ThreeTierLinear(packed, None, "torch").weight, weight)
