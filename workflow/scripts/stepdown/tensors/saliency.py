"""How much a weight matters: magnitude, Wanda, and the score of a block."""

import torch
from torch import Tensor

from .blocks import entries_per_block, pad_columns, pad_to_blocks

SELECTIONS = ("wanda", "magnitude")

# Rows are worked through in strips of about this many entries: the temporaries stay in the cache and off the peak.
STRIP_ENTRIES = 1 << 21


def magnitude(weight: Tensor) -> Tensor:
    """|W|, float32, shape of the weight."""
    return weight.float().abs()


def wanda(weight: Tensor, squared_norms: Tensor) -> Tensor:
    """|W| * sqrt(||x||^2) (Sun et al. 2023, eq. 1), float32.

    weight: [..., out, in]; squared_norms: [in], or [..., 1, in] where blocks were gathered.
    """
    return magnitude(weight).mul_(squared_norms.sqrt())


def block_scores(weight: Tensor, squared_norms: Tensor, block_size: int) -> Tensor:
    """Mean Wanda metric over the real entries of each block, float32 [block rows, block cols].

    weight: [out, in]; squared_norms: [in]. A pruned weight counts as zero.
    """
    norms = pad_columns(squared_norms.sqrt(), block_size)
    strip = block_size * max(1, STRIP_ENTRIES // (block_size * len(norms)))
    sums = []
    # One buffer for all strips: a new one each time would cost more than the arithmetic.
    buffer = weight.new_empty(min(strip, weight.shape[0]), weight.shape[1], dtype=torch.float32)
    for rows in weight.split(strip):
        absolute = torch.abs(rows.float(), out=buffer[: len(rows)])
        # The metric factors: sum_ij |w_ij| n_j = sum_j n_j sum_i |w_ij|, so the full metric is never written out.
        column_sums = pad_to_blocks(absolute, block_size).unflatten(0, (-1, block_size)).sum(1)
        sums.append((column_sums * norms).unflatten(1, (-1, block_size)).sum(-1))
    return torch.cat(sums) / entries_per_block(tuple(weight.shape), block_size, weight.device)
