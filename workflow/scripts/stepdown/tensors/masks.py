"""Keep masks from a metric. Ties are settled by position, so the same metric always gives the same mask.

An entry whose metric is -inf is not there (padding at a ragged edge): it is never kept, and its group keeps less.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

# Rows are worked through in strips of about this many entries, which stay in the cache.
STRIP_ENTRIES = 1 << 20
# With fewer rows than that, a GPU sorts them sooner than it selects from each.
FEW_ROWS = 64
# Groups up to this size are ordered by comparing all pairs.
PAIRWISE = 16


def as_bits(keep: Tensor) -> Tensor:
    """A mask, bool or bytes [...], as one bit an entry: uint8 [entries / 8, rounded up]."""
    entries = keep.reshape(-1).to(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (pad(entries, (0, -len(entries) % 8)).view(-1, 8) << shifts).sum(-1, dtype=torch.uint8)


def from_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """The mask [...] that `as_bits` made bits of, uint8 of zeros and ones; a mask that is none of bits as it is."""
    if bits.shape == shape:
        return bits
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).view(-1)[: shape.numel()].view(shape)


def keep_n_of_m(metric: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` largest of each `m` consecutive entries of the last axis.

    metric: [..., in]; returns bool [..., in]. A group with r < m entries (the ragged tail) keeps ceil(r * n / m).
    """
    keep = torch.empty(metric.shape, dtype=torch.bool, device=metric.device)
    for rows, kept in zip(*_strips(metric, keep), strict=True):
        kept.copy_(_keep_n_of_m(rows, n, m))
    return keep


def _keep_n_of_m(metric: Tensor, n: int, m: int) -> Tensor:
    """`keep_n_of_m` of a strip, [rows, in]."""
    length = metric.shape[-1]
    groups = (pad(metric, (0, -length % m), value=-torch.inf) if length % m else metric).unflatten(-1, (-1, m))
    if m > PAIRWISE:
        rows = groups.flatten(0, -2)
        there = rows > -torch.inf
        keep = keep_top_k(rows, ((there.sum(-1) * n + m - 1) // m).clamp(min=1)) & there
        return keep.view_as(groups).flatten(-2)[..., :length]
    columns = groups.unbind(-1)
    # How many of its group an entry loses to; of two equals the earlier wins. For small m this beats any sort.
    losses = [torch.zeros_like(columns[0], dtype=torch.uint8) for _ in range(m)]
    for first in range(m):
        for second in range(first + 1, m):
            first_wins = columns[first] >= columns[second]
            losses[second] += first_wins
            losses[first] += ~first_wins
    # A tensor, not the number: two tensors of bytes are compared with vector instructions.
    allowance = torch.full_like(losses[0], n)
    if groups.numel() and groups.amin() == -torch.inf:
        there = (groups > -torch.inf).sum(-1)
        allowance = ((there * n + m - 1) // m).to(torch.uint8)
    keep = torch.stack([loss < allowance for loss in losses], dim=-1)
    return keep.flatten(-2)[..., :length]


def keep_top_k(metric: Tensor, k: Tensor) -> Tensor:
    """Keep the `k` largest entries of each row.

    metric: [rows, entries]; k: int64 [rows], from 1 to the row's entries above -inf; returns bool [rows, entries].
    """
    if metric.shape[0] == 0:
        return torch.zeros_like(metric, dtype=torch.bool)
    largest = metric.topk(int(k.max()), dim=-1).values
    threshold = largest.gather(-1, k[:, None] - 1)
    keep = metric >= threshold
    crowded = keep.sum(-1, dtype=torch.int32) > k
    if crowded.any():
        # Several entries share the threshold: the earlier ones take the room that the larger ones leave.
        above = metric[crowded] > threshold[crowded]
        equal = keep[crowded] & ~above
        room = (k[crowded] - above.sum(-1))[:, None]
        keep[crowded] = above | (equal & (equal.cumsum(-1) <= room))
    return keep


def keep_all_but_smallest(metric: Tensor, count: int) -> Tensor:
    """Drop the `count` smallest entries of each row; of equals the earlier go, as a stable ascending sort has it.

    metric: float32 [rows, in], 0 <= count <= in; returns bool [rows, in].
    """
    keep = torch.ones_like(metric, dtype=torch.bool)
    if count > 0:
        # numpy selects on one thread, where torch would on all it has.
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(_drop_smallest_, *_strips(metric, keep), repeat(count)))
    return keep


def keep_above_rank(metric: Tensor, rank: int) -> Tensor:
    """Keep what is larger than entry number `rank` of all entries in ascending order, counted from 0.

    metric: float32, any shape; returns bool of that shape: `rank` + 1 entries go, and with them what equals the last.
    """
    return metric > kth_smallest(metric.reshape(1, -1), rank + 1)


def count_zeros(weight: Tensor) -> int:
    """Entries that are zero; where many are, five times as fast as `count_nonzero` of the weight itself."""
    return int((weight == 0).count_nonzero())


def kth_smallest(metric: Tensor, k: int) -> Tensor:
    """The `k`-th smallest entry of each row, counted from 1: float32 [rows, in] -> [rows, 1]."""
    if metric.device.type != "cpu":
        # Of a few long rows torch would have a GPU's one thread block find each.
        rows_are_few = len(metric) < FEW_ROWS
        return metric.sort(-1).values[:, k - 1 : k] if rows_are_few else metric.kthvalue(k, keepdim=True).values
    # numpy selects with vector instructions: three times as fast as torch.kthvalue, ten times as fast as a sort.
    return torch.from_numpy(np.partition(metric.numpy(), k - 1, axis=-1)[:, k - 1 : k].copy())


def _drop_smallest_(metric: Tensor, keep: Tensor, count: int) -> None:
    """`keep_all_but_smallest` into `keep`, which is a part of the whole mask."""
    threshold = kth_smallest(metric, count)
    torch.gt(metric, threshold, out=keep)
    if keep.count_nonzero() == len(keep) * (keep.shape[-1] - count):
        return
    # Several entries share the threshold: the earlier ones take the places that the smaller ones leave.
    below, equal = metric < threshold, metric == threshold
    places = count - below.sum(-1, keepdim=True)
    torch.logical_not(below | (equal & (equal.cumsum(-1) <= places)), out=keep)


def _strips(metric: Tensor, keep: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A metric and its mask [..., in] cut into strips [rows, in]: what is made of one stays in a CPU's cache, where
    a GPU would only be kept waiting."""
    metric, keep = (whole.reshape(-1, whole.shape[-1]) for whole in (metric, keep))
    rows = max(1, len(metric) if metric.is_cuda else STRIP_ENTRIES // metric.shape[-1])
    return metric.split(rows), keep.split(rows)
