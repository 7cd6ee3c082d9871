"""Swaps: as many are kept where there were as many, none that made it worse, and what is no whole block stays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import random_case
from three_tiers import random_three_tier

from stepdown.tensors import swaps
from stepdown.tensors.least_squares import masked_least_squares
from stepdown.tensors.swaps import swapped_least_squares
from stepdown.tensors.tiers import Tier, keep_mask

DAMPING = 0.01


def problem(rows: int, columns: int, seed: int, tiers: torch.Tensor | None = None, alike: float = 0.0):
    """A dense matrix pruned to random tiers: weight, keep, H, Y'X and tiers; alike: of inputs, to one another."""
    weight, tiers = random_three_tier((rows, columns), 10, seed, tiers, torch.float32)
    dense, hessian = random_case(rows, columns, seed)
    hessian += alike
    return weight, keep_mask(weight, tiers, 16), hessian, dense @ hessian, tiers


def errors(weight, start, hessian, target):
    """What is minimised, by row, less what does not depend on the weight."""
    ridge = DAMPING * hessian.diagonal().mean()
    return (weight * (weight @ hessian - 2 * target)).sum(1) + ridge * (weight - start).square().sum(1)


def fours(kept: torch.Tensor) -> torch.Tensor:
    return kept.unflatten(1, (-1, 4)).sum(2)


@given(
    st.sampled_from([16, 48, 72]),
    st.sampled_from([16, 64, 80]),
    st.integers(0, 10_000),
    st.sampled_from([1, 32]),
    st.sampled_from([0.0, 1.0, 10.0]),
    st.sampled_from([0, swaps.STEPS]),
)
@settings(max_examples=40)
def test_every_block_keeps_as_much_as_before_and_no_row_of_blocks_is_worse(rows, columns, seed, at_once, alike, steps):
    weight, keep, hessian, target, tiers = problem(rows, columns, seed, alike=alike)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swaps, "ROWS", at_once)
        # Where nothing is fitted anew, swaps of inputs that are alike do harm together.
        patch.setattr(swaps, "STEPS", steps)
        patch.setattr(swaps, "LAST_STEPS", steps)
        found = swapped_least_squares(weight, keep, hessian, target, tiers, 16, DAMPING)
    of_weight = tiers.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)
    free = found != 0
    assert torch.equal(free[of_weight == Tier.DENSE], keep[of_weight == Tier.DENSE])
    two_four = of_weight[:, ::4] == Tier.TWO_FOUR
    assert torch.equal(fours(free)[two_four], fours(keep)[two_four])
    whole = rows // 16 * 16
    in_blocks = [kept[:whole].unflatten(1, (-1, 16)).unflatten(0, (-1, 16)).sum((1, 3)) for kept in (free, keep)]
    assert torch.equal(*in_blocks)
    assert torch.equal(free[whole:], keep[whole:])

    fitted = masked_least_squares(weight, keep, hessian, target, DAMPING)
    before, after = (errors(matrix, weight, hessian, target) for matrix in (fitted, found))
    scale = (target * weight).abs().sum(1)
    for row in range(0, rows, 16):
        assert (after - before)[row : row + 16].sum() <= 1e-4 * scale[row : row + 16].sum()


@pytest.fixture
def one_swap(monkeypatch):
    """One round, after which nothing is fitted anew."""
    for name, value in {"ROUNDS": 1, "STEPS": 0, "LAST_STEPS": 0}.items():
        monkeypatch.setattr(swaps, name, value)


def of_one_block(tier: Tier, seed: int):
    weight, keep, hessian, target, tiers = problem(16, 16, seed, torch.tensor([[tier]], dtype=torch.uint8))
    fitted = masked_least_squares(weight, keep, hessian, target, DAMPING)
    found = swapped_least_squares(weight, keep, hessian, target, tiers, 16, DAMPING)
    return weight, keep, hessian, target, fitted, found


def swapped(row: torch.Tensor, drop: int, restore: int, start: torch.Tensor, hessian, target) -> torch.Tensor:
    """One row with `restore` at its best in the place of `drop`."""
    row, ridge = row.clone(), DAMPING * hessian.diagonal().mean()
    row[drop] = 0
    slope = hessian[restore] @ row - target[restore] - ridge * start[restore]
    row[restore] = -slope / (hessian[restore, restore] + ridge)
    return row


@pytest.mark.parametrize("seed", range(5))
def test_a_swap_in_fours_is_the_best_of_all_of_its_row(one_swap, seed):
    weight, keep, hessian, target, fitted, found = of_one_block(Tier.TWO_FOUR, seed)
    for row, kept in enumerate(keep):
        pairs = [(u, p) for u in range(16) for p in range(u // 4 * 4, u // 4 * 4 + 4) if kept[u] and not kept[p]]
        tried = [swapped(fitted[row], u, p, weight[row], hessian, target[row]) for u, p in pairs]
        every = errors(torch.stack([fitted[row], *tried]), weight[row], hessian, target[row])
        after = errors(found[row : row + 1], weight[row], hessian, target[row])
        torch.testing.assert_close(after, every.min()[None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_a_swap_in_a_block_puts_what_comes_back_at_its_best(one_swap, seed):
    weight, keep, hessian, target, fitted, found = of_one_block(Tier.TOP_K, seed)
    (restored,) = ((found != 0) & ~keep).nonzero()
    (dropped,) = ((found == 0) & keep).nonzero()
    expected, row = fitted.clone(), restored[0]
    expected[tuple(dropped)] = 0
    expected[row] = swapped(expected[row], restored[1], restored[1], weight[row], hessian, target[row])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    before, after = (errors(matrix, weight, hessian, target).sum() for matrix in (fitted, found))
    assert after < before


@pytest.mark.parametrize("tier", [Tier.TWO_FOUR, Tier.TOP_K])
def test_what_was_dropped_by_mistake_comes_back(tier):
    """Outputs that a mask of the tier explains in full, pruned by another: swaps find the better part of it."""
    tiers = torch.full((2, 4), tier, dtype=torch.uint8)
    truth, _ = random_three_tier((32, 64), 10, 0, tiers, torch.float32)
    weight, keep, hessian, _, _ = problem(32, 64, 1, tiers)
    target = truth @ hessian
    found = swapped_least_squares(weight, keep, hessian, target, tiers, 16, 1e-4)
    fitted = masked_least_squares(weight, keep, hessian, target, 1e-4)
    after, before = (((matrix - truth) @ hessian * (matrix - truth)).sum() for matrix in (found, fitted))
    assert after < 0.6 * before
    assert ((found != 0) == (truth != 0)).sum() > (keep == (truth != 0)).sum()


def test_matrices_of_no_whole_blocks_keep_their_masks():
    weight, keep, hessian, target, tiers = problem(40, 56, 0)
    found = swapped_least_squares(weight, keep, hessian, target, tiers, 16, DAMPING)
    torch.testing.assert_close(found, masked_least_squares(weight, keep, hessian, target, DAMPING))


def test_dead_inputs_are_swapped_with_nothing():
    weight, keep, hessian, target, tiers = problem(32, 64, 0, torch.tensor([[1, 1, 2, 2], [2, 1, 0, 1]]).byte())
    hessian[:, 16:48] = hessian[16:48] = target[:, 16:48] = 0
    found = swapped_least_squares(weight, keep, hessian, target, tiers, 16, DAMPING)
    assert found.isfinite().all()
    assert torch.equal(found[:, 16:48] != 0, keep[:, 16:48])
    nothing = swapped_least_squares(weight, keep, torch.zeros(64, 64), torch.zeros(32, 64), tiers, 16, DAMPING)
    assert nothing.isfinite().all()
