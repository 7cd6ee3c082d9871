"""Kept weights as whole numbers: each near what it was, zeros exact, and with a Hessian made up for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from three_tiers import random_three_tier

from stepdown.tensors import block_rounding
from stepdown.tensors.block_rounding import round_in_blocks
from stepdown.tensors.tiers import Tier

SHAPES = [(96, 160), (100, 130), (48, 24), (16, 16), (1, 1), (17, 3)]
CASES = st.sampled_from(SHAPES), st.sampled_from([1, 10, 256]), st.integers(0, 99), st.sampled_from([8, 4])


def inputs(shape, seed=0):
    """A Hessian of inputs of which some are alike, so that one can make up for another."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * shape[1], shape[1], generator=generator) @ torch.randn(shape[1], shape[1], generator=generator)
    return 2 * x.T @ x / len(x)


def lost(weight, rounded, hessian):
    difference = rounded.weight - weight.float()
    return (difference @ hessian * difference).sum().item()


def row_tiers(tiers, shape):
    return tiers.repeat_interleave(16, 0).repeat_interleave(16, 1)[: shape[0], : shape[1]]


@given(*CASES, st.booleans())
def test_codes_are_in_range_and_zeros_stay(shape, k, seed, bits, calibrated):
    weight, tiers = random_three_tier(shape, k, seed)
    rounded = round_in_blocks(weight, tiers, bits, inputs(shape) if calibrated else None)
    assert not rounded.codes[weight == 0].any()
    wide = (row_tiers(tiers, shape) == Tier.TOP_K) | (bits == 8)
    codes = rounded.codes.int()
    assert (codes.abs() <= 127)[wide].all() and ((codes >= -8) & (codes <= 7))[~wide].all()
    assert rounded.codes.shape == weight.shape and rounded.multiples.shape == (shape[0], tiers.shape[1])
    assert rounded.weight.isfinite().all() and (rounded.scales > 0).all()


@given(*CASES)
def test_nearest_is_at_most_a_step_away(shape, k, seed, bits):
    weight, tiers = random_three_tier(shape, k, seed)
    rounded = round_in_blocks(weight, tiers, bits)
    steps = rounded.multiples.repeat_interleave(16, 1)[:, : shape[1]] * rounded.scales[:, None]
    # Of 4 bits the codes go from -8 to 7, and what is nearly as large as the largest may lie beyond them.
    assert ((rounded.weight - weight.float()).abs() <= steps.abs() * (0.5001 if bits == 8 else 1.6)).all()


def test_no_other_multiple_that_reaches_as_far_is_nearer():
    """Of 4 bits; the multiple is a whole number, and a few are tried."""
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    tiers = torch.zeros(1, 2, dtype=torch.uint8)
    rounded = round_in_blocks(weight, tiers, 4)
    blocks, found = (of.view(16, 2, 16) for of in (weight, rounded.weight))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    steps = (largest / (-8 * rounded.scales[:, None, None])).round() * rounded.scales[:, None, None]
    plain = (blocks / steps).round().clamp(-8, 7) * steps
    lost, lost_plainly = ((of - blocks).square().sum(-1) for of in (found, plain))
    assert (lost <= lost_plainly * 1.0001).all() and lost.sum() < 0.95 * lost_plainly.sum()


def test_weights_of_top_k_blocks_keep_8_bits():
    weight, tiers = random_three_tier((64, 64), 10, tiers=torch.full((4, 4), Tier.TOP_K, dtype=torch.uint8))
    error = (round_in_blocks(weight, tiers, 4).weight - weight.float()).norm() / weight.float().norm()
    assert error < 0.01


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("tier", "share"), [(Tier.DENSE, 0.6), (Tier.TWO_FOUR, 0.9)])
def test_gptq_loses_less_of_the_outputs(tier, share, bits):
    weight, tiers = random_three_tier((96, 160), 10, tiers=torch.full((6, 10), tier, dtype=torch.uint8))
    hessian = inputs(weight.shape)

    nearest, found = (round_in_blocks(weight, tiers, bits, how) for how in (None, hessian))
    assert lost(weight, found, hessian) < share * lost(weight, nearest, hessian)


@given(*CASES[:3], st.integers(0, 3))
def test_rounding_again_never_loses_more(shape, k, seed, sweeps):
    weight, tiers = random_three_tier(shape, k, seed)
    hessian = inputs(shape)
    hessian[0] = hessian[:, 0] = 0.0
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for times in (sweeps, sweeps + 1):
            patch.setattr(block_rounding, "SWEEPS", times)
            found.append(lost(weight, round_in_blocks(weight, tiers, 4, hessian), hessian))
    assert found[1] <= found[0] * 1.0001 + 1e-6 * (weight.float() @ hessian * weight.float()).sum()


def test_rounded_again_no_code_alone_does_better_elsewhere(monkeypatch):
    """After as many sweeps as change something: no neighbour of any code that has one loses less."""
    monkeypatch.setattr(block_rounding, "SWEEPS", 50)
    weight, tiers = random_three_tier(
        (16, 32), 10, tiers=torch.tensor([[Tier.DENSE, Tier.TWO_FOUR]], dtype=torch.uint8)
    )
    hessian = inputs(weight.shape)
    rounded = round_in_blocks(weight, tiers, 4, hessian)
    steps = rounded.multiples.repeat_interleave(16, 1) * rounded.scales[:, None]
    gradient = (weight.float() - rounded.weight) @ hessian
    for change in (1, -1):
        moved = change * steps
        # Of (e - d) H (e - d)' - e H e' for a code alone.
        gain = moved.square() * hessian.diagonal() - 2 * moved * gradient
        possible = (weight != 0) & (rounded.codes + change >= -8) & (rounded.codes + change <= 7)
        assert (gain[possible] >= -1e-4 * moved.square().amax() * hessian.diagonal().amax()).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_inputs_that_the_text_leaves_at_zero_keep_their_weights(bits):
    weight, tiers = random_three_tier((48, 64), 10, 3)
    hessian = inputs(weight.shape)
    dead = [5, 40]
    hessian[dead], hessian[:, dead] = 0, 0
    rounded = round_in_blocks(weight, tiers, bits, hessian)
    steps = (rounded.multiples.repeat_interleave(16, 1) * rounded.scales[:, None]).abs()
    off = (rounded.weight - weight.float()).abs()[:, dead]
    # The code -8 has no like on the other side.
    assert (off <= 1.0001 * steps[:, dead]).all()


def test_rows_and_blocks_of_zeros():
    weight, tiers = torch.zeros(32, 32), torch.tensor([[0, 1], [2, 0]], dtype=torch.uint8)
    for bits in (8, 4):
        for hessian in (None, inputs(weight.shape)):
            assert not round_in_blocks(weight, tiers, bits, hessian).weight.any()
