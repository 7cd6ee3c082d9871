"""Masks and patterns of one-shot runs: what the references compute, and what must hold of any matrix."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from stepdown.errors import UserError
from stepdown.plan.runs import parse_run
from stepdown.tensors.blocks import entries_per_block
from stepdown.tensors.masks import keep_above_rank, keep_all_but_smallest, kth_smallest
from stepdown.tensors.patterns import (
    TierOptions,
    block,
    hybrid,
    keep_tiers,
    mean_of_blocks,
    n_of_m,
    pattern_of,
    three_tier,
    tiers_by_rank,
    unstructured,
)
from stepdown.tensors.tiers import Tier, tier_counts

PATTERNS = {
    "u50": unstructured(Fraction("0.5")),
    "u60": unstructured(Fraction("0.6")),
    "2_4": n_of_m(2, 4),
    "4_8": n_of_m(4, 8),
}
SHARES = ("0.4", "0.4", "0.2")
MATRICES = ("matrix_64x64", "matrix_96x160")

shapes = st.tuples(st.integers(1, 70), st.integers(1, 70))
sparsities = st.integers(0, 99).map(lambda percent: Fraction(percent, 100))
block_sizes = st.sampled_from([8, 16, 32])


def random_metric(shape, seed, levels=None):
    """A random metric; of few levels, so that there are ties; with a dead input."""
    generator = torch.Generator().manual_seed(seed)
    metric = torch.rand(shape, generator=generator)
    if levels:
        metric = (metric * levels).floor() / levels
    metric[:, ::7] = 0
    return metric


def sorted_mask(metric, count):
    """The reference: a stable ascending sort of each row."""
    dropped = metric.sort(dim=-1, stable=True).indices[:, :count]
    return torch.ones_like(metric, dtype=torch.bool).scatter_(1, dropped, False)


@pytest.fixture(params=MATRICES)
def case(request, golden):
    return load_file(golden / f"{request.param}.safetensors")


# --- what the references compute -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", PATTERNS)
def test_wanda_and_magnitude_prune_what_the_reference_does(case, tag):
    keep = PATTERNS[tag].keep
    assert torch.equal(~keep(case["wanda_metric"]), case[f"wanda_{tag}_mask"])
    assert torch.equal(~keep(case["W"].abs(), whole=True), case[f"mag_{tag}_mask"])


@pytest.mark.parametrize("name", ["edge_ties_32x64", "edge_dead_64x160"])
@pytest.mark.parametrize("tag", ["u50", "u60"])
def test_ties_and_dead_inputs_go_as_in_the_reference(golden, name, tag):
    case = load_file(golden / f"{name}.safetensors")
    keep = PATTERNS[tag].keep
    assert torch.equal(case["W"] * keep(case["wanda_metric"]), case[f"wanda_{tag}_W"])
    assert torch.equal(case["W"] * keep(case["W"].abs(), whole=True), case[f"magnitude_{tag}_W"])


@pytest.mark.parametrize("percent", [30, 50])
def test_blocks_go_as_in_the_reference(case, percent):
    torch.testing.assert_close(mean_of_blocks(case["wanda_metric"], 16), case["block_scores_guide"], rtol=1e-6, atol=0)
    mask = ~block(16, Fraction(percent, 100)).keep(case["wanda_metric"])
    assert torch.equal(mask, case[f"block{percent}_mask_guide"])


def test_fixed_tiers_are_the_references(case):
    scores = mean_of_blocks(case["wanda_metric"], 16)
    # The reference rounds down and gives TopK the rest.
    fourty_percent = int(scores.numel() * 0.4)
    tiers = tiers_by_rank(scores, (fourty_percent, fourty_percent, scores.numel() - 2 * fourty_percent))
    assert torch.equal(tiers.long(), case["init_tier_map_40_40_20"])
    assert torch.equal(~keep_tiers(case["W"].abs(), tiers, 16, 10), case["fixed3_40_40_20_mask"])


def test_hybrid_is_the_references(case):
    pattern = hybrid(16, 10, Fraction("0.6"), 0.8, selection=case["W"].abs())
    assert torch.equal(~pattern.keep(case["wanda_metric"]), case["hybrid24_mask"])


# --- what holds of any matrix ----------------------------------------------------------------------------------------


@given(shapes, st.integers(0, 99), st.integers(0, 9), st.sampled_from([None, 3, 50]))
def test_rows_lose_what_a_stable_sort_puts_first(shape, percent, seed, levels):
    metric = random_metric(shape, seed, levels)
    count = shape[1] * percent // 100
    keep = keep_all_but_smallest(metric, count)
    assert torch.equal(keep, sorted_mask(metric, count))


def test_large_matrices_are_worked_through_in_strips():
    metric = random_metric((700, 3000), 0, levels=1000)
    assert torch.equal(keep_all_but_smallest(metric, 1500), sorted_mask(metric, 1500))


@given(shapes, st.integers(0, 9), st.sampled_from([None, 3]), st.integers(0, 98))
def test_above_a_rank(shape, seed, levels, percent):
    metric = random_metric(shape, seed, levels)
    rank = metric.numel() * percent // 100
    assert torch.equal(keep_above_rank(metric, rank), metric > metric.flatten().sort().values[rank])


@given(shapes, st.integers(0, 9), st.integers(1, 100))
def test_the_two_ways_to_select_agree(shape, seed, percent):
    """GPUs have no numpy: there torch selects."""
    metric = random_metric(shape, seed, levels=9)
    k = max(1, shape[1] * percent // 100)
    assert torch.equal(kth_smallest(metric, k), metric.kthvalue(k, dim=-1, keepdim=True).values)


@given(shapes, sparsities, st.integers(0, 9), st.booleans())
def test_unstructured_sparsity_is_exact(shape, sparsity, seed, whole):
    weight = random_metric(shape, seed) + 0.1
    pattern = unstructured(sparsity)
    pruned = weight * pattern.keep(weight + torch.rand_like(weight) * 1e-3, whole)
    zeros = shape[0] * shape[1] - int(pruned.count_nonzero())
    if whole:
        assert zeros == (int(weight.numel() * sparsity) + 1 if sparsity else 0)
    else:
        assert zeros == shape[0] * int(shape[1] * sparsity)
    assert pattern.fault(pruned) == ""


@given(shapes, st.integers(0, 9), st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (1, 3), (5, 7), (3, 300)]))
def test_groups_keep_n_of_m_and_the_ragged_tail_its_share(shape, seed, ratio):
    n, m = ratio
    metric = random_metric(shape, seed) + 0.1
    pattern = n_of_m(n, m)
    keep = pattern.keep(metric)
    for start in range(0, shape[1], m):
        inputs = min(m, shape[1] - start)
        assert (keep[:, start : start + m].sum(1) == -(-inputs * n // m)).all()
    assert pattern.fault(metric * keep) == ""
    # One weight more anywhere is one too many.
    if not keep.all():
        keep[tuple((~keep).nonzero()[-1])] = True
        assert pattern.fault(metric * keep) == f"1 groups keep more than {n} of {m}"


def test_large_groups_keep_what_a_stable_sort_does():
    metric = random_metric((3, 700), 0, levels=50)
    keep = n_of_m(100, 300).keep(metric)
    for start in range(0, 700, 300):
        group = metric[:, start : start + 300]
        first = group.sort(dim=1, descending=True, stable=True).indices[:, : -(-group.shape[1] // 3)]
        assert torch.equal(
            keep[:, start : start + 300], torch.zeros_like(group, dtype=torch.bool).scatter_(1, first, True)
        )


@given(shapes, block_sizes, sparsities, st.integers(0, 9))
def test_blocks_go_whole_and_in_number(shape, block_size, sparsity, seed):
    metric = random_metric(shape, seed) + 0.1
    pattern = block(block_size, sparsity)
    pruned = metric * pattern.keep(metric)
    entries = entries_per_block(shape, block_size)
    left = mean_of_blocks((pruned != 0).float(), block_size) * entries
    assert ((left.round() == entries) | (left == 0)).all()
    assert int((left == 0).sum()) == int(entries.numel() * sparsity)
    assert pattern.fault(pruned) == ""


def test_small_edge_blocks_do_not_go_first():
    """The mean over real entries: a sliver of large weights outlives a whole block of small ones."""
    metric = torch.ones(16, 33)
    metric[:, 32] = 2
    metric[:, 16:32] = 0.5
    keep = block(16, Fraction(1, 3)).keep(metric)
    assert keep[:, 32].all() and not keep[:, 16:32].any()


@given(shapes, block_sizes, st.integers(0, 9))
def test_tiers_have_their_counts_and_keep_what_they_may(shape, block_size, seed):
    metric = random_metric(shape, seed) + 0.1
    k = max(1, 10 * block_size**2 // 256)
    pattern = three_tier(SHARES, block_size, k)
    pruned = metric * pattern.keep(metric)
    assert pattern.fault(pruned) == ""
    scores = mean_of_blocks(metric, block_size)
    tiers = tiers_by_rank(scores, tier_counts(SHARES, scores.numel()))
    assert torch.equal(tiers.flatten().bincount(minlength=3), torch.tensor(tier_counts(SHARES, scores.numel())))
    for low, high in ((Tier.TOP_K, Tier.TWO_FOUR), (Tier.TWO_FOUR, Tier.DENSE)):
        if (tiers == low).any() and (tiers == high).any():
            assert scores[tiers == low].max() <= scores[tiers == high].min()


def test_hybrid_keeps_2_4_only_where_it_leaves_enough():
    even, uneven = torch.ones(16, 16), torch.zeros(16, 16)
    uneven[:, ::4] = 4
    keep = hybrid(16, 10, Fraction(1), 0.8).keep(torch.cat([even, uneven], dim=1))
    assert keep[:, :16].all(), "2:4 would leave half of the metric"
    assert keep[:, 16:].float().mean() == 0.5
    lowest = hybrid(16, 10, Fraction(1, 2), 0.0).keep(torch.cat([even, 2 * even], dim=1))
    assert lowest[:, :16].sum() == 10 and lowest[:, 16:].sum() == 128


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (unstructured(Fraction(1, 2)), "0 zeros where 2048 are due"),
        (n_of_m(2, 4), "1024 groups keep more than 2 of 4"),
        (block(16, Fraction(1, 2)), "0 zero blocks where 8 are due"),
        (three_tier(SHARES, 16, 10), "0 blocks on the tier TWO_FOUR where 6 are due"),
        (hybrid(16, 10, Fraction("0.6"), 0.8), "0 blocks on the tier TOP_K where 6 are due"),
    ],
)
def test_a_dense_matrix_breaks_every_pattern(pattern, words):
    assert pattern.fault(torch.ones(64, 64)) == words


def test_a_run_names_its_pattern():
    weight = torch.randn(64, 64)
    for name in ("unstructured-0.25", "1of4", "block8-0.5", "three-tier", "hybrid"):
        run = parse_run(f"wanda-{name}", ["wanda"])
        keep = pattern_of(run, run.sparsity, TierOptions(), weight).keep(weight.abs())
        assert keep.shape == (64, 64) and 0.2 < 1 - keep.float().mean() < 0.8, name


def test_selection_by_magnitude_decides_inside_blocks_only():
    run = parse_run("wanda-three-tier", ["wanda"])
    weight, metric = torch.randn(64, 64), torch.rand(64, 64)
    keep = pattern_of(run, None, TierOptions(shares=("0", "1", "0"), selection="magnitude"), weight).keep(metric)
    assert torch.equal(keep, n_of_m(2, 4).keep(weight.abs()))
    part = pattern_of(run, None, TierOptions(selection="magnitude"), torch.randn(64, 256))
    with pytest.raises(UserError, match="not by magnitude"):
        part.keep(metric)
