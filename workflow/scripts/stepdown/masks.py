"""Keep masks from a metric. Ties keep the earlier position, so the same metric always gives the same mask.

An entry whose metric is -inf is not there (padding at a ragged edge): it is never kept, and its group keeps less.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def keep_n_of_m(metric: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` largest of each `m` consecutive entries of the last axis.

    metric: [..., in]; returns bool [..., in]. A group with r < m entries (the ragged tail) keeps ceil(r * n / m).
    """
    length = metric.shape[-1]
    groups = (pad(metric, (0, -length % m), value=-torch.inf) if length % m else metric).unflatten(-1, (-1, m))
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
