"""TopK blocks four at a time, as the AVX-512 kernel computes them."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..tensors.tiers import Tier
from .format import BLOCK_SIZE, strip_layout

BLOCKS, MORE = 4, 2 * BLOCK_SIZE - 1


class Quads(NamedTuple):
    """A **quad** is up to four TopK blocks of a strip, 16 rows x 64 columns. Each row's weights stand one after the
    other, two to a **vector**, [16 rows][2]; what a row has not, as others have more, is told by a bit and not stored.

    values: [n + 31], of all vectors what they have in its order, and then zeros, so that a vector can be read from
    anywhere; columns: uint8 [n + 31], 16 * which block + column; filled: int32 [vectors], bit 2 row + i where there is
    a weight; blocks: uint16 [quads, 4], where in the strip they stand; starts: int32 [quads + 1, 2], weights and
    vectors before; quads_before: int64 [strips + 1]. In a strip the quads of most vectors come first: where their
    number seldom changes a processor foresees it.
    """

    values: Tensor
    columns: Tensor
    filled: Tensor
    blocks: Tensor
    starts: Tensor
    quads_before: Tensor


def top_k_quads(tiers: Tensor, top_k: Tensor, top_k_positions: Tensor) -> Quads:
    """The TopK blocks of a matrix, as the parts of `format.PackedMatrix`, as quads."""
    strips, block_columns = (tiers == Tier.TOP_K).nonzero().unbind(1)
    _, starts = strip_layout(tiers)
    blocks_before = starts[:, Tier.TOP_K]
    quads_before = _before(-(-blocks_before.diff() // BLOCKS))
    count = int(quads_before[-1])
    inside_strip = torch.arange(len(strips)) - blocks_before[strips]
    quad, place = quads_before[strips] + inside_strip // BLOCKS, inside_strip % BLOCKS

    # Position 16 * column + row of each weight.
    positions = top_k_positions.long()
    rows = positions % BLOCK_SIZE
    counts = torch.bincount((quad[:, None] * BLOCK_SIZE + rows).flatten(), minlength=count * BLOCK_SIZE)
    vectors = (counts.view(-1, BLOCK_SIZE).amax(1) + 1) // 2
    order = _sorted_by(vectors, torch.repeat_interleave(quads_before.diff()))
    quad = order.argsort()[quad]
    vectors_before = _before(vectors[order])
    weights_before = _before(torch.bincount(quad, minlength=count) * top_k.shape[1])

    # The weights of a row of a quad share a key, and so do in the end those that share a vector.
    key = (quad[:, None] * BLOCK_SIZE + rows).flatten()
    by_row = key.sort(stable=True).indices
    rank = torch.arange(len(by_row)) - _before(torch.bincount(key, minlength=count * BLOCK_SIZE))[key[by_row]]
    vector = vectors_before[key[by_row] // BLOCK_SIZE] + rank // 2
    lane = key[by_row] % BLOCK_SIZE * 2 + rank % 2
    in_order = by_row[(vector * 2 * BLOCK_SIZE + lane).argsort()]
    filled = torch.zeros(int(vectors_before[-1]), dtype=torch.int64).index_add_(0, vector, 1 << lane)

    columns = (place[:, None] * BLOCK_SIZE + positions // BLOCK_SIZE).flatten().to(torch.uint8)
    blocks = torch.zeros(count, BLOCKS, dtype=torch.int32)
    blocks[quad, place] = block_columns.int()
    return Quads(
        pad(top_k.flatten()[in_order], (0, MORE)),
        pad(columns[in_order], (0, MORE)),
        filled.int(),
        blocks.to(torch.uint16),
        torch.stack([weights_before, vectors_before], 1).int(),
        quads_before,
    )


def _sorted_by(size: Tensor, group: Tensor) -> Tensor:
    """The order in which groups stay where they are and inside each the largest come first."""
    by_size = size.argsort(descending=True, stable=True)
    return by_size[group[by_size].argsort(stable=True)]


def _before(counts: Tensor) -> Tensor:
    """How many there are before each, and all of them."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
