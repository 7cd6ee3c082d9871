"""Tiers by a budget: it is met, with no step too many, and no other tiers that spare as much cost less."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepdown.tensors.budget import tiers_within, zeros_by_step
from stepdown.tensors.tiers import prune_top_k_, prune_two_four_

# Of each block, what its two steps cost and what they spare: whole numbers, so that sums compare exactly.
BLOCKS = st.lists(st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(1, 9)] * 2), min_size=1, max_size=6)


def totals(blocks, tiers):
    """What tiers cost and what they spare."""
    taken = list(zip(blocks, tiers, strict=True))
    return sum(sum(block[:tier]) for block, tier in taken), sum(sum(block[2 : 2 + tier]) for block, tier in taken)


@given(blocks=BLOCKS, data=st.data())
def test_a_budget_is_met_and_no_tiers_that_spare_as_much_cost_less(blocks, data):
    steps = torch.tensor(blocks).view(-1, 2, 2)
    wanted = data.draw(st.integers(0, int(steps[:, 1].sum())))
    tiers = tiers_within(steps[:, 0], steps[:, 1], wanted).tolist()
    cost, spared = totals(blocks, tiers)
    assert spared >= wanted
    others = [totals(blocks, others) for others in product(range(3), repeat=len(blocks))]
    assert min(other for other, as_much in others if as_much >= spared) == cost
    # With one block higher, by one step or by both where they are taken at once, too little is spared.
    higher = ([*tiers[:place], above, *tiers[place + 1 :]] for place, tier in enumerate(tiers) for above in range(tier))
    assert wanted <= 0 or any(totals(blocks, less)[1] < wanted for less in higher)


def test_nothing_wanted_is_nothing_done_and_too_much_is_refused():
    costs, spared = torch.ones(3, 2), torch.tensor([[224, 258]] * 3)
    assert not tiers_within(costs, spared, 0).any() and not tiers_within(costs, spared, -5).any()
    assert tiers_within(costs, spared, 1446).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="all blocks as TopK spare 1446 of 1447"):
        tiers_within(costs, spared, 1447)


def test_equal_prices_go_by_position():
    assert tiers_within(torch.ones(4, 2), torch.ones(4, 2), 3).tolist() == [2, 1, 0, 0]


def test_a_step_that_spares_nothing_is_taken_with_the_next_or_not_at_all():
    costs, spared = torch.tensor([[5.0, 1.0], [1.0, 9.0], [0.0, 99.0]]), torch.tensor([[0, 4], [2, 2], [0, 9]])
    assert tiers_within(costs, spared, 6).tolist() == [2, 1, 1]


@pytest.mark.parametrize("shape", [(32, 48), (20, 37), (17, 18), (5, 3)])
def test_zeros_are_those_of_pruned_blocks(shape):
    weight, norms = torch.rand(shape) + 1, torch.ones(shape[1])
    every = torch.ones(-(-shape[0] // 16), -(-shape[1] // 16), dtype=torch.bool)
    found = zeros_by_step(shape, 16, 10)
    assert found.shape == (every.numel(), 2)
    prune_two_four_(weight, norms, every, 16)
    first = int((weight == 0).sum())
    prune_top_k_(weight, norms, every, 16, 10)
    assert found.sum(0).tolist() == [first, int((weight == 0).sum()) - first]
