"""Tiers: exact counts, never up, never more weights than a tier allows, and the reference's own maps and weights."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from stepdown.tensors.blocks import entries_per_block, expand_blocks, grid_shape
from stepdown.tensors.saliency import block_scores, wanda
from stepdown.tensors.tiers import (
    Tier,
    count_tiers,
    degrade_dense_to_two_four,
    degrade_two_four_to_top_k,
    keep_mask,
    kept_entries,
    prune_top_k_,
    prune_two_four_,
    step_down,
    tier_counts,
    violations,
)

SCHEDULE = [
    ("0.90", "0.10", "0.00"),
    ("0.80", "0.10", "0.10"),
    ("0.65", "0.20", "0.15"),
    ("0.50", "0.30", "0.20"),
    ("0.35", "0.45", "0.20"),
]

shapes = st.tuples(st.integers(1, 70), st.integers(1, 70))
block_sizes = st.sampled_from([8, 16, 32])


@st.composite
def shares(draw):
    cuts = sorted((draw(st.integers(0, 1000)), draw(st.integers(0, 1000))))
    return tuple(f"{part / 1000:.3f}" for part in (cuts[0], cuts[1] - cuts[0], 1000 - cuts[1]))


def random_matrix(shape, seed, zeros=0.0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight * (torch.rand(shape, generator=generator) >= zeros), torch.rand(shape[1], generator=generator)


@given(shares(), st.integers(1, 5000))
def test_counts_are_exact(parts, blocks):
    counts = tier_counts(parts, blocks)
    assert sum(counts) == blocks
    for share, count in zip(parts, counts, strict=True):
        assert abs(Fraction(share) * blocks - count) < 1


@given(st.integers(1, 300), st.integers(1, 300))
def test_shares_of_the_default_schedule_are_exact_in_matrices_of_twenty_blocks(rows, columns):
    blocks = 20 * rows * columns
    for row in SCHEDULE:
        assert tier_counts(row, blocks) == tuple(Fraction(share) * blocks for share in row)


def test_counts_do_not_drift():
    # 0.9 - 0.8 is 0.0999... in floats, which loses the original a block.
    assert tier_counts(("0.8", "0.1", "0.1"), 1000) == (800, 100, 100)
    assert tier_counts((0.35, 0.45, 0.2), 176_128) == (61645, 79258, 35225)
    assert tier_counts(("0.3333333", "0.3333333", "0.3333334"), 9) == (3, 3, 3)


@given(shapes, block_sizes, st.integers(0, 9), st.sampled_from(["wanda", "magnitude"]))
def test_schedule_keeps_every_invariant(shape, block_size, seed, selection):
    """The whole schedule on any matrix: shares met, blocks only go down, tiers hold, zeros stay."""
    weight, norms = random_matrix(shape, seed, zeros=0.05)
    norms[::5] = 0
    tiers = torch.zeros(grid_shape(shape, block_size), dtype=torch.uint8)
    k = max(1, 10 * block_size**2 // 256)
    for row in SCHEDULE:
        before = weight.clone()
        dense = block_scores(weight, norms, block_size)[tiers == Tier.DENSE]
        stage_1 = degrade_dense_to_two_four({"": tiers}, {"": dense}, row)[""]
        prune_two_four_(weight, norms, stage_1 != tiers, block_size, selection)
        left = block_scores(weight, norms, block_size)[stage_1 == Tier.TWO_FOUR]
        stage_2 = degrade_two_four_to_top_k({"": stage_1}, {"": left}, row)[""]
        prune_top_k_(weight, norms, stage_2 != stage_1, block_size, k, selection)
        # Largest remainders of two rows may round against each other; a block never goes up all the same.
        dense, _, top_k = tier_counts(row, tiers.numel())
        dense_before, _, top_k_before = count_tiers(tiers)
        dense, top_k = min(dense, dense_before), max(top_k, top_k_before)
        assert count_tiers(stage_2) == (dense, tiers.numel() - dense - top_k, top_k)
        assert (stage_1 >= tiers).all() and (stage_2 >= stage_1).all()
        assert violations(weight, stage_2, block_size, k) == 0
        changed = weight != before
        assert (weight[changed] == 0).all(), "pruning may only zero weights"
        assert not changed[expand_blocks(stage_2 == Tier.DENSE, shape, block_size)].any()
        assert not (weight.signbit() & (weight == 0) & (before != 0)).any(), "no negative zeros"
        tiers = stage_2
        weight += torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * keep_mask(
            weight, tiers, block_size
        )


@given(shapes, block_sizes, st.integers(0, 9))
def test_pruning_keeps_as_much_as_the_tier_allows(shape, block_size, seed):
    weight, norms = random_matrix(shape, seed)
    everything = torch.ones(grid_shape(shape, block_size), dtype=torch.bool)
    k = block_size + 2
    two_four, top_k = weight.clone(), weight.clone()
    prune_two_four_(two_four, norms, everything, block_size)
    prune_top_k_(top_k, norms, everything, block_size, k)
    full, tail = divmod(shape[1], 4)
    assert ((two_four != 0).sum(1) == 2 * full + (tail + 1) // 2).all()
    entries = entries_per_block(shape, block_size)
    assert (top_k != 0).sum() == kept_entries(entries, block_size, k).sum()
    assert (kept_entries(entries, block_size, k) <= entries.clamp(max=k)).all()


@given(shapes, block_sizes, st.integers(0, 9))
def test_scores_are_the_mean_metric_over_real_entries(shape, block_size, seed):
    weight, norms = random_matrix(shape, seed)
    metric = wanda(weight, norms)
    scores = block_scores(weight, norms, block_size)
    rows, columns = grid_shape(shape, block_size)
    for row in range(rows):
        for column in range(columns):
            block = metric[row * block_size :, column * block_size :][:block_size, :block_size]
            assert scores[row, column] == pytest.approx(block.mean().item(), rel=1e-5)


def test_step_down_takes_the_lowest_and_ties_by_position():
    tiers = torch.tensor([[0, 1, 0], [0, 0, 2]], dtype=torch.uint8)
    scores = torch.tensor([3.0, 1.0, 1.0, 1.0])  # of the four Dense blocks
    assert step_down(tiers, scores, Tier.DENSE, 2).tolist() == [[0, 1, 1], [1, 0, 2]]
    assert torch.equal(step_down(tiers, scores, Tier.DENSE, -1), tiers)


def test_shares_that_round_up_do_not_lift_a_block():
    # Ten blocks: 0.24 rounds to 3 Dense blocks where the row before left 2.
    tiers = torch.tensor([[0, 0] + [1] * 8], dtype=torch.uint8)
    stepped = degrade_dense_to_two_four({"": tiers}, {"": torch.rand(2)}, ("0.26", "0.74", "0"))
    assert torch.equal(stepped[""], tiers)


@given(st.lists(shapes, min_size=2, max_size=4), st.integers(0, 9))
def test_shares_are_exact_over_all_matrices_together(sizes, seed):
    """Whatever the row, counts are those of all blocks together, and each block is cheaper than all that stayed."""
    generator = torch.Generator().manual_seed(seed)
    maps = {str(n): torch.zeros(grid_shape(shape, 8), dtype=torch.uint8) for n, shape in enumerate(sizes)}
    blocks = sum(tiers.numel() for tiers in maps.values())
    for row in SCHEDULE:
        before = maps
        # Few values, so that many are equal.
        scores = {name: torch.randint(5, tiers.shape, generator=generator).float() for name, tiers in maps.items()}
        maps = degrade_dense_to_two_four(maps, {n: scores[n][t == Tier.DENSE] for n, t in maps.items()}, row)
        for name, tiers in maps.items():
            assert (tiers >= before[name]).all()
        gone = [scores[n][(before[n] == 0) & (maps[n] == 1)] for n in maps]
        stayed = torch.cat([scores[n][maps[n] == 0] for n in maps])
        assert not len(torch.cat(gone)) or not len(stayed) or torch.cat(gone).max() <= stayed.min()
        maps = degrade_two_four_to_top_k(maps, {n: scores[n][t == Tier.TWO_FOUR] for n, t in maps.items()}, row)
        dense, _, top_k = tier_counts(row, blocks)
        found = count_tiers(torch.cat([tiers.flatten() for tiers in maps.values()]))
        assert abs(found[Tier.DENSE] - dense) <= 1 and abs(found[Tier.TOP_K] - top_k) <= 1


def test_a_dead_input_goes_first_but_after_what_is_pruned_already():
    weight = torch.tensor([[0.0, 5.0, 1.0, 9.0]])
    norms = torch.tensor([1.0, 0.0, 0.0, 1.0])
    prune_two_four_(weight, norms, torch.ones(1, 1, dtype=torch.bool), 16)
    assert weight.tolist() == [[0.0, 5.0, 0.0, 9.0]]


def test_violations_are_counted_per_block():
    weight, tiers = torch.ones(32, 32), torch.tensor([[0, 1], [2, 0]], dtype=torch.uint8)
    assert violations(weight, tiers, 16, 10) == 2
    weight[:16, 16:] = 0
    assert violations(weight, tiers, 16, 10) == 1


@pytest.mark.parametrize("tag", ["96x64", "256x256"])
@pytest.mark.parametrize("iteration", range(1, 6))
def test_steps_equal_the_reference(golden, tag, iteration):
    """Given the reference's block counts and its selection by magnitude: its very maps and weights."""
    case = load_file(golden / f"threetier_{tag}.safetensors")
    weight, norms, tiers, expected_tiers, expected_weight, stats = (
        case[f"it{iteration}_{key}"] for key in ("W_in", "scaler_row", "tier_in", "tier_out", "W_out", "stats")
    )
    tiers, block_size, k = tiers.to(torch.uint8), 16, 10
    dense_degraded, mid_degraded = stats[:2].tolist()
    scores = block_scores(weight, norms, block_size)
    stage_1 = step_down(tiers, scores[tiers == Tier.DENSE], Tier.DENSE, dense_degraded)
    prune_two_four_(weight, norms, stage_1 != tiers, block_size, "magnitude")
    if f"it{iteration}_W_after_stage1" in case:
        assert torch.equal(weight, case[f"it{iteration}_W_after_stage1"])
    left = block_scores(weight, norms, block_size)
    stage_2 = step_down(stage_1, left[stage_1 == Tier.TWO_FOUR], Tier.TWO_FOUR, mid_degraded)
    prune_top_k_(weight, norms, stage_2 != stage_1, block_size, k, "magnitude")
    assert torch.equal(stage_2.long(), expected_tiers)
    assert torch.equal(weight, expected_weight)
