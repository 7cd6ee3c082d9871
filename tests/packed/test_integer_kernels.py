"""Kernels for whole numbers: what they compute is what float64 does with the same weights, up to 8 bits of x."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_integers import rounded_and_packed
from test_kernels import SHAPES, available, relative_error
from three_tiers import random_three_tier
from torch.nn.functional import linear

from stepdown.packed.linear import INTEGER_KERNELS, ThreeTierLinear
from stepdown.tensors.tiers import Tier


@pytest.fixture(scope="module", params=INTEGER_KERNELS)
def kernel(request):
    return available(request.param)


def in_8_bits(x):
    """x as the kernels round it: each 16 of a row have a step, of which the largest is 127."""
    columns = x.shape[1]
    blocks = torch.nn.functional.pad(x.float(), (0, -columns % 16)).unflatten(1, (-1, 16))
    steps = blocks.abs().amax(-1, keepdim=True) / 127
    return (torch.where(steps > 0, blocks / steps, 0.0).round() * steps).flatten(1)[:, :columns]


def exact(rounded, tiers, x, bias=None):
    """float64: what of TopK blocks is computed in bf16, and the rest with x in 8 bits."""
    weight = rounded.weight.double()
    top_k = (tiers == Tier.TOP_K).repeat_interleave(16, 0).repeat_interleave(16, 1)[: len(weight), : weight.shape[1]]
    y = linear(in_8_bits(x).double(), weight * ~top_k) + linear(x.double(), weight * top_k)
    return y if bias is None else y + bias.double()


@settings(max_examples=80)
@given(st.data())
def test_any_matrix_and_any_rows(kernel, data):
    shape, k = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from([1, 10, 16, 40]))
    rows, seed = data.draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 17, 40])), data.draw(st.integers(0, 99))
    weight, tiers = random_three_tier(shape, k, seed)
    rounded, matrix = rounded_and_packed(weight, tiers, k, data.draw(st.sampled_from([8, 4])))
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(shape[0], generator=generator).bfloat16() if data.draw(st.booleans()) else None
    x = torch.randn(rows, shape[1], generator=generator).bfloat16()
    y = ThreeTierLinear(matrix, bias, kernel)(x)
    # Rounded to bf16 once; a code of x that is half of one may round the other way.
    assert relative_error(y, exact(rounded, tiers, x, bias)) < 5e-3
    assert (
        relative_error(y, linear(x.double(), rounded.weight.double(), None if bias is None else bias.double())) < 2e-2
    )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize("rows", [1, 6, 300])
def test_all_blocks_on_one_tier(kernel, tier, rows, bits):
    tiers = torch.full((7, 9), tier, dtype=torch.uint8)
    weight, _ = random_three_tier((100, 130), 10, tiers=tiers)
    rounded, matrix = rounded_and_packed(weight, tiers, 10, bits)
    x = torch.randn(rows, 130, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert relative_error(ThreeTierLinear(matrix, None, kernel)(x), exact(rounded, tiers, x)) < 5e-3


@pytest.mark.parametrize("bits", [8, 4])
def test_x_that_is_zero_tiny_or_no_number(kernel, bits):
    weight, tiers = random_three_tier((16, 48), 10, tiers=torch.tensor([[0, 1, 0]], dtype=torch.uint8))
    _, matrix = rounded_and_packed(weight, tiers, 10, bits)
    layer = ThreeTierLinear(matrix, None, kernel)
    assert not layer(torch.zeros(3, 48)).any() and layer(torch.full((3, 48), 1e-38)).abs().max() < 1e-36
    for value in (torch.nan, torch.inf):
        x = torch.ones(1, 48)
        x[0, 20] = value
        assert not layer(x).isfinite().any()


@pytest.mark.parametrize("bits", [8, 4])
def test_each_row_of_x_is_on_its_own(kernel, bits):
    weight, tiers = random_three_tier((96, 160), 10)
    layer, x = ThreeTierLinear(rounded_and_packed(weight, tiers, 10, bits)[1], None, kernel), torch.randn(21, 160)
    one_by_one = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(layer(x), one_by_one, rtol=2**-7, atol=2**-12)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_weight_and_many_threads(kernel, bits):
    weight, tiers = random_three_tier((400, 320), 10)
    rounded, matrix = rounded_and_packed(weight, tiers, 10, bits)
    layer, x = ThreeTierLinear(matrix, None, kernel), torch.randn(9, 320)
    assert torch.equal(layer.weight, rounded.weight.bfloat16())
    before, threads = layer(x), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert all(torch.equal(layer(x), before) for _ in range(20))
    finally:
        torch.set_num_threads(threads)
