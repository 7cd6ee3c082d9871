"""TopK blocks of a strip as lines, one weight of each row in a line, as the GPU kernel adds them up."""

import torch
from torch import Tensor

from ..errors import UserError
from ..tensors.tiers import Tier
from .format import BLOCK_SIZE, PackedMatrix

# A column takes 16 bits.
MOST_COLUMNS = 1 << 16


def top_k_lines(matrix: PackedMatrix) -> tuple[Tensor, Tensor]:
    """The weights of TopK blocks, row by row: int64 [lines, 8] and int64 [block rows + 1].

    The first holds 32 bits of each of a strip's 16 rows, two rows in a number: below, the column; above, the bits of
    the bf16 weight. A row that has fewer weights than the longest is filled up with zeros. The second says how many
    lines are in the strips before. Raises `UserError` for more columns than 16 bits can name.
    """
    strips, block_columns = (matrix.tiers == Tier.TOP_K).nonzero().unbind(1)
    if matrix.tiers.shape[1] * BLOCK_SIZE > MOST_COLUMNS:
        raise UserError(f"a matrix of {matrix.shape[1]} inputs: the kernel 'triton' takes {MOST_COLUMNS} at most")
    positions = matrix.top_k_positions.long()
    # The weights of a row share a key.
    key = (strips[:, None] * BLOCK_SIZE + positions % BLOCK_SIZE).flatten()
    order = key.sort(stable=True).indices
    key = key[order]
    counts = torch.bincount(key, minlength=len(matrix.tiers) * BLOCK_SIZE)
    lines_before = _before(counts.view(-1, BLOCK_SIZE).amax(1))
    rank = torch.arange(len(key), device=key.device) - _before(counts)[key]
    columns = (block_columns[:, None] * BLOCK_SIZE + positions // BLOCK_SIZE).flatten()[order]
    values = matrix.top_k.flatten()[order]
    lines = torch.zeros(int(lines_before[-1]), BLOCK_SIZE, 2, dtype=torch.int16, device=key.device)
    entries = torch.stack([columns.to(torch.int16), values.view(torch.int16)], dim=1)
    lines[lines_before[key // BLOCK_SIZE] + rank, key % BLOCK_SIZE] = entries
    return lines.flatten(1).view(torch.int64), lines_before


def _before(counts: Tensor) -> Tensor:
    """How many there are before each, and all of them."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
