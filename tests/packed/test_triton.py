"""The GPU kernels, in Triton's interpreter: what they compute is what float64 does, up to bf16 rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from three_tiers import random_three_tier
from torch.nn.functional import linear

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

from stepdown.errors import UserError
from stepdown.packed.format import pack
from stepdown.packed.linear import ThreeTierLinear
from stepdown.packed.lines import top_k_lines
from stepdown.tensors.blocks import grid_shape
from stepdown.tensors.tiers import Tier

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TESTS = Path(__file__).parents[1]


def errors(weight, tiers, k, bias, x):
    """Relative errors of the kernel and of a dense bf16 product."""
    moved = None if bias is None else bias.to(DEVICE)
    layer = ThreeTierLinear(pack(weight, tiers, k).to(device=DEVICE), moved, "triton")
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    results = layer(x.to(DEVICE)).cpu(), linear(x, weight, bias)
    return [((y.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item() for y in results]


@pytest.mark.parametrize(
    ("shape", "k", "rows"),
    [
        ((96, 160), 10, 1),
        ((100, 130), 16, 2),
        ((48, 24), 1, 3),
        ((33, 50), 40, 5),
        ((16, 16), 256, 8),
        ((20, 40), 10, 70),
    ],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_any_matrix_and_any_rows(shape, k, rows, has_bias):
    weight, tiers = random_three_tier(shape, k, seed=rows)
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(shape[0], generator=generator).bfloat16() if has_bias else None
    error, dense = errors(weight, tiers, k, bias, torch.randn(rows, shape[1], generator=generator).bfloat16())
    assert error < 1e-2 and error <= 1.05 * dense + 1e-4


@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize("rows", [2, 9])
def test_all_blocks_on_one_tier(tier, rows):
    tiers = torch.full(grid_shape((40, 70), 16), tier, dtype=torch.uint8)
    weight, _ = random_three_tier((40, 70), 10, tiers=tiers)
    x = torch.randn(rows, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    error, dense = errors(weight, tiers, 10, None, x)
    assert error < 1e-2 and error <= 1.05 * dense + 1e-4


def test_more_lines_than_a_step_takes():
    weight, tiers = random_three_tier((32, 3200), 10)
    error, dense = errors(weight, tiers, 10, None, torch.randn(1, 3200).bfloat16())
    assert error < 1e-2 and error <= 1.05 * dense + 1e-4


def test_no_rows_and_the_weight():
    weight, tiers = random_three_tier((48, 24), 10)
    layer = ThreeTierLinear(pack(weight, tiers, 10).to(device=DEVICE), None, "triton")
    assert layer(torch.zeros(0, 24, device=DEVICE)).shape == (0, 48)
    assert torch.equal(layer.weight.cpu(), weight)


def test_inputs_that_lie_anywhere():
    """At an address that is no multiple of four values, or in every other column."""
    weight, tiers = random_three_tier((48, 64), 10)
    layer = ThreeTierLinear(pack(weight, tiers, 10).to(device=DEVICE), None, "triton")
    x = torch.randn(3, 130, device=DEVICE).bfloat16()
    for part in (x.flatten()[1:65].view(1, 64), x[:, 1:129:2]):
        assert torch.equal(layer(part), layer(part.clone(memory_format=torch.contiguous_format)))


def test_lines_hold_the_weights_of_top_k_blocks():
    weight, tiers = random_three_tier((40, 96), 10)
    matrix = pack(weight, tiers, 10)
    lines, before = top_k_lines(matrix)
    strips = torch.repeat_interleave(torch.arange(len(tiers)), before.diff())
    halves = lines.view(torch.int16).view(-1, 16, 2)
    columns, values = halves[..., 0].long() & 0xFFFF, halves[..., 1].contiguous().view(torch.bfloat16)
    rows = strips[:, None] * 16 + torch.arange(16)
    found = torch.zeros(48, 96, dtype=torch.bfloat16).index_put_((rows, columns), values, accumulate=True)
    top_k = (tiers == Tier.TOP_K).repeat_interleave(16, 0).repeat_interleave(16, 1)[:40, :96]
    assert torch.equal(found[:40], weight * top_k)
    # No line but holds a weight.
    assert (values != 0).any(1).all()


def test_more_columns_than_a_line_can_name_are_refused():
    weight = torch.zeros(16, 65537, dtype=torch.bfloat16)
    tiers = torch.zeros(grid_shape((16, 65537), 16), dtype=torch.uint8)
    with pytest.raises(UserError, match=r"65537 inputs.*65536 at most"):
        ThreeTierLinear(pack(weight, tiers, 10), None, "triton")


def test_a_compiler_for_gpus_takes_the_kernels(tmp_path):
    """What the interpreter lets pass, types and shapes above all, Triton's compiler may refuse; it needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{TESTS}:{TESTS.parent / 'workflow/scripts'}"}
    command = [sys.executable, TESTS / "compile_kernels.py"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
