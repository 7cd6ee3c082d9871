"""Costs of stepping down: against the masks that are really kept, whatever the shape."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from stepdown.tensors.blocks import grid_shape, pad_to_blocks
from stepdown.tensors.costs import top_k_costs, two_four_costs
from stepdown.tensors.tiers import prune_top_k_, prune_two_four_

SIDES = st.integers(1, 50)


def case(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, torch.rand(columns, generator=generator) + 0.1, torch.rand(rows, generator=generator) + 0.1


def lost_by_block(before, after, squared_norms, squared_gradients):
    """Sum over the weights of a block that are no longer there of w^2 s g, entry by entry."""
    cost = before.square() * squared_norms * squared_gradients[:, None] * ((before != 0) & (after == 0))
    return pad_to_blocks(cost, 16).unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).sum((1, 3))


@given(rows=SIDES, columns=SIDES, seed=st.integers(0, 1000))
def test_the_cost_of_two_four_is_that_of_what_pruning_drops(rows, columns, seed):
    weight, norms, gradients = case(rows, columns, seed)
    pruned = weight.clone()
    prune_two_four_(pruned, norms, torch.ones(grid_shape((rows, columns), 16), dtype=torch.bool), 16)
    torch.testing.assert_close(
        two_four_costs(weight, norms, gradients, 16), lost_by_block(weight, pruned, norms, gradients)
    )


@given(rows=SIDES, columns=SIDES, seed=st.integers(0, 1000), k=st.integers(1, 40))
def test_the_cost_of_top_k_is_that_of_what_pruning_drops(rows, columns, seed, k):
    weight, norms, _ = case(rows, columns, seed)
    # Gradients alike, so that Wanda, which chooses inside a block, orders its weights as their costs do.
    gradients = torch.full((rows,), 0.5)
    every = torch.ones(grid_shape((rows, columns), 16), dtype=torch.bool)
    chosen = torch.rand(every.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    prune_two_four_(weight, norms, every, 16)
    pruned = weight.clone()
    prune_top_k_(pruned, norms, chosen, 16, k)
    expected = lost_by_block(weight, pruned, norms, gradients)[chosen]
    torch.testing.assert_close(top_k_costs(weight, norms, gradients, chosen, 16, k), expected, atol=1e-5, rtol=1e-4)


@given(rows=SIDES, columns=SIDES, seed=st.integers(0, 1000))
def test_costs_are_the_same_whatever_the_weights_are_held_in(rows, columns, seed):
    weight, norms, gradients = case(rows, columns, seed)
    weight = weight.bfloat16()
    costs = two_four_costs(weight, norms, gradients, 16)
    assert torch.equal(costs, two_four_costs(weight.float(), norms, gradients, 16))
    assert torch.equal(costs, two_four_costs(weight.t().contiguous().t(), norms, gradients, 16))
