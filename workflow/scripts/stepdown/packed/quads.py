"""TopK blocks four at a time, as the AVX-512 kernel computes them."""

import torch
from torch import Tensor

from ..tensors.tiers import Tier
from .format import BLOCK_SIZE, strip_layout

BLOCKS = 4
# Bytes of what every quad begins with, what the next begins at a multiple of, and what may be read beyond the last.
HEAD, ALIGNED, MORE = 12, 4, 128


def top_k_quads(tiers: Tensor, top_k: Tensor, top_k_positions: Tensor) -> tuple[Tensor, Tensor]:
    """The TopK blocks of a matrix, as the parts of `format.PackedMatrix`, as quads, a stream of uint8; and int64
    [strips + 1, 2], how many of them, and of their bytes, come before each strip.

    A **quad** is up to four TopK blocks of a strip, 16 rows x 64 columns. Each row's weights stand one after the other,
    two to a **vector**, [16 rows][2]; what a row has not, as others have more, is told by a bit and not stored. In
    memory, as the kernel reads it from front to back, little-endian:

        uint16 blocks[4]        where in the strip they stand
        uint16 vectors, weights
        uint32 filled[vectors]  bit 2 row + i where there is a weight
        bf16   values[weights]  of all vectors what they have, in order
        uint8  columns[weights] 16 * which of the blocks + column

    In a strip the quads of most vectors come first: where their number seldom changes a processor foresees it.
    """
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

    # The weights of a row of a quad share a key, and so do in the end those that share a vector.
    key = (quad[:, None] * BLOCK_SIZE + rows).flatten()
    by_row = key.sort(stable=True).indices
    rank = torch.arange(len(by_row)) - _before(torch.bincount(key, minlength=count * BLOCK_SIZE))[key[by_row]]
    vector = vectors_before[key[by_row] // BLOCK_SIZE] + rank // 2
    lane = key[by_row] % BLOCK_SIZE * 2 + rank % 2
    in_order = by_row[(vector * 2 * BLOCK_SIZE + lane).argsort()]
    filled = torch.zeros(int(vectors_before[-1]), dtype=torch.int64).index_add_(0, vector, 1 << lane)

    blocks = torch.zeros(count, BLOCKS, dtype=torch.int64)
    blocks[quad, place] = block_columns
    columns = (place[:, None] * BLOCK_SIZE + positions // BLOCK_SIZE).flatten()[in_order]
    counts = torch.stack([vectors[order], torch.bincount(quad, minlength=count) * top_k.shape[1]], 1)
    quads, bytes_before = _stream(blocks, counts, filled, top_k.flatten()[in_order], columns)
    return quads, torch.stack([quads_before, bytes_before[quads_before]], 1)


def _stream(blocks: Tensor, counts: Tensor, filled: Tensor, values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The quads one after the other, and how many bytes come before each, [quads + 1].

    blocks: [quads, 4]; counts: [quads, 2], vectors and weights; filled: [all vectors]; values, columns: [all weights].
    """
    vectors, weights = counts.unbind(1)
    before = _before(-(-(HEAD + 4 * vectors + 3 * weights) // ALIGNED) * ALIGNED)
    stream = torch.zeros(int(before[-1]) + MORE, dtype=torch.uint8)
    head = torch.cat([blocks, counts], 1).to(torch.uint16)
    start = before[:-1]
    _write(stream, start, torch.full_like(vectors, head.shape[1]), head.flatten())
    _write(stream, start + HEAD, vectors, filled.to(torch.uint32))
    _write(stream, start + HEAD + 4 * vectors, weights, values)
    _write(stream, start + HEAD + 4 * vectors + 2 * weights, weights, columns.to(torch.uint8))
    return stream, before


def _write(stream: Tensor, starts: Tensor, counts: Tensor, values: Tensor) -> None:
    """Of values as many as `counts` says from each of `starts` on, which are bytes of the stream."""
    size = values.element_size()
    run = torch.repeat_interleave(counts)
    first = starts[run] + size * (torch.arange(len(run)) - _before(counts)[run])
    stream[first[:, None] + torch.arange(size)] = values.view(torch.uint8).view(-1, size)


def _sorted_by(size: Tensor, group: Tensor) -> Tensor:
    """The order in which groups stay where they are and inside each the largest come first."""
    by_size = size.argsort(descending=True, stable=True)
    return by_size[group[by_size].argsort(stable=True)]


def _before(counts: Tensor) -> Tensor:
    """How many there are before each, and all of them."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
