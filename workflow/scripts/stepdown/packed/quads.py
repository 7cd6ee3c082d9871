"""TopK blocks four at a time, as the AVX-512 kernel computes them."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..tensors.tiers import Tier
from .format import BLOCK_SIZE, strip_layout

BLOCKS = 4


class Quads(NamedTuple):
    """A **quad** is up to four TopK blocks of a strip, 16 rows x 64 columns. Each row's weights stand one after the
    other, two to a **vector**; a row that has fewer than the longest is filled up with zeros.

    values: [vectors, 16, 2]; columns: uint8 [vectors, 16, 2], 16 * which block + column; blocks: int32 [quads, 4],
    where in the strip they stand; vectors_before: int64 [quads + 1]; quads_before: int64 [strips + 1].
    """

    values: Tensor
    columns: Tensor
    blocks: Tensor
    vectors_before: Tensor
    quads_before: Tensor


def top_k_quads(tiers: Tensor, top_k: Tensor, top_k_positions: Tensor) -> Quads:
    """The TopK blocks of a matrix, as the parts of `format.PackedMatrix`, as quads."""
    strips, block_columns = (tiers == Tier.TOP_K).nonzero().unbind(1)
    _, starts = strip_layout(tiers)
    blocks_before = starts[:, Tier.TOP_K]
    quads_before = _before(-(-blocks_before.diff() // BLOCKS))
    inside_strip = torch.arange(len(strips)) - blocks_before[strips]
    quad, place = quads_before[strips] + inside_strip // BLOCKS, inside_strip % BLOCKS

    # Position 16 * column + row of each weight; the weights of a row of a quad share a key.
    positions = top_k_positions.long()
    key = (quad[:, None] * BLOCK_SIZE + positions % BLOCK_SIZE).flatten()
    order = key.sort(stable=True).indices
    counts = torch.bincount(key, minlength=int(quads_before[-1]) * BLOCK_SIZE)
    vectors_before = _before((counts.view(-1, BLOCK_SIZE).amax(1) + 1) // 2)
    rank = torch.arange(len(order)) - _before(counts)[key[order]]
    vector = vectors_before[key[order] // BLOCK_SIZE] + rank // 2
    target = (vector * BLOCK_SIZE + key[order] % BLOCK_SIZE) * 2 + rank % 2

    shape = [int(vectors_before[-1]), BLOCK_SIZE, 2]
    values, columns = top_k.new_zeros(shape), torch.zeros(shape, dtype=torch.uint8)
    values.view(-1)[target] = top_k.flatten()[order]
    columns.view(-1)[target] = (place[:, None] * BLOCK_SIZE + positions // BLOCK_SIZE).flatten()[order].to(torch.uint8)
    blocks = torch.zeros(int(quads_before[-1]), BLOCKS, dtype=torch.int32)
    blocks[quad, place] = block_columns.int()
    return Quads(values, columns, blocks, vectors_before, quads_before)


def _before(counts: Tensor) -> Tensor:
    """How many there are before each, and all of them."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
