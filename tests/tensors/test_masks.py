"""Keep masks: how many, which, and the same ones every time."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from stepdown.tensors.masks import as_bits, from_bits, keep_n_of_m, keep_top_k


def metrics(rows: int, columns: int, seed: int, levels: int) -> torch.Tensor:
    """Random metrics with many ties where `levels` is small."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, (rows, columns), generator=generator).float()


@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 99), st.sampled_from([2, 4, 1000]))
def test_two_of_four_is_what_a_stable_sort_of_each_group_keeps(rows, columns, seed, levels):
    metric = metrics(rows, columns, seed, levels)
    expected = torch.zeros_like(metric, dtype=torch.bool)
    for start in range(0, columns, 4):
        group = metric[:, start : start + 4]
        order = group.argsort(dim=1, descending=True, stable=True)[:, : -(-group.shape[1] // 2)]
        expected[:, start : start + 4].scatter_(1, order, True)
    assert torch.equal(keep_n_of_m(metric, 2, 4), expected)


@given(st.sampled_from([(1, 4), (2, 4), (4, 8), (3, 8), (1, 2)]), st.integers(1, 40), st.integers(0, 99))
def test_groups_keep_their_share_rounded_up(pattern, columns, seed):
    n, m = pattern
    keep = keep_n_of_m(metrics(3, columns, seed, 5), n, m)
    for start in range(0, columns, m):
        group = keep[:, start : start + m]
        assert (group.sum(1) == -(-group.shape[1] * n // m)).all()


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 99), st.sampled_from([2, 5, 1000]))
def test_top_k_is_what_a_stable_sort_keeps(rows, columns, seed, levels):
    metric = metrics(rows, columns, seed, levels)
    k = torch.randint(1, columns + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    rank = metric.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    assert torch.equal(keep_top_k(metric, k), rank < k[:, None])


def test_what_is_not_there_is_never_kept():
    metric = torch.tensor([[1.0, -torch.inf, -torch.inf, -torch.inf], [1.0, 2.0, -torch.inf, -torch.inf]])
    assert keep_n_of_m(metric, 2, 4).tolist() == [[True, False, False, False], [False, True, False, False]]


def test_nothing_in_nothing_out():
    assert keep_top_k(torch.empty(0, 16), torch.empty(0, dtype=torch.int64)).shape == (0, 16)
    assert keep_n_of_m(torch.empty(0, 16), 2, 4).shape == (0, 16)


@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 99))
def test_bits_hold_a_mask(rows, columns, seed):
    keep = metrics(rows, columns, seed, 2).bool()
    bits = as_bits(keep)
    assert bits.nbytes == -(-keep.numel() // 8)
    assert torch.equal(from_bits(bits, keep.shape), keep.to(torch.uint8))
