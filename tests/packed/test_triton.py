"""The GPU kernel, in Triton's interpreter: what it computes is what float64 does, up to bf16 rounding."""

import pytest
import torch
from three_tiers import random_three_tier
from torch.nn.functional import linear

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

from stepdown.packed.format import pack
from stepdown.packed.linear import ThreeTierLinear
from stepdown.tensors.blocks import grid_shape
from stepdown.tensors.tiers import Tier

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def errors(weight, tiers, k, bias, x):
    """Relative errors of the kernel and of a dense bf16 product."""
    moved = None if bias is None else bias.to(DEVICE)
    layer = ThreeTierLinear(pack(weight, tiers, k).to(device=DEVICE), moved, "triton")
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    results = layer(x.to(DEVICE)).cpu(), linear(x, weight, bias)
    return [((y.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item() for y in results]


@pytest.mark.parametrize(
    ("shape", "k", "rows"), [((96, 160), 10, 1), ((100, 130), 16, 20), ((48, 24), 1, 3), ((20, 40), 10, 70)]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_any_matrix_and_any_rows(shape, k, rows, has_bias):
    weight, tiers = random_three_tier(shape, k, seed=rows)
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(shape[0], generator=generator).bfloat16() if has_bias else None
    error, dense = errors(weight, tiers, k, bias, torch.randn(rows, shape[1], generator=generator).bfloat16())
    assert error < 1e-2 and error <= 1.05 * dense + 1e-4


@pytest.mark.parametrize("tier", Tier)
def test_all_blocks_on_one_tier(tier):
    tiers = torch.full(grid_shape((40, 70), 16), tier, dtype=torch.uint8)
    weight, _ = random_three_tier((40, 70), 10, tiers=tiers)
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    error, dense = errors(weight, tiers, 10, None, x)
    assert error < 1e-2 and error <= 1.05 * dense + 1e-4


def test_no_rows_and_the_weight():
    weight, tiers = random_three_tier((48, 24), 10)
    layer = ThreeTierLinear(pack(weight, tiers, 10).to(device=DEVICE), None, "triton")
    assert layer(torch.zeros(0, 24, device=DEVICE)).shape == (0, 48)
    assert torch.equal(layer.weight.cpu(), weight)
