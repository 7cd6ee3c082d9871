"""A matrix as a grid of square blocks; blocks at the right and lower edge may be ragged."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def grid_shape(shape: tuple[int, int], block_size: int) -> tuple[int, int]:
    """Block rows and block columns that cover a matrix of `shape` [out, in]."""
    rows, columns = shape
    return -(-rows // block_size), -(-columns // block_size)


def entries_per_block(shape: tuple[int, int], block_size: int, device: torch.device | None = None) -> Tensor:
    """Real entries of each block, int64 [block rows, block cols]: block_size**2 but at ragged edges."""
    heights, widths = (
        (length - block_size * torch.arange(count, device=device)).clamp(max=block_size)
        for length, count in zip(shape, grid_shape(shape, block_size), strict=True)
    )
    return heights[:, None] * widths[None, :]


def pad_to_blocks(matrix: Tensor, block_size: int, value: float = 0.0) -> Tensor:
    """The matrix filled up to whole blocks; the same tensor, not a copy, where nothing is missing."""
    rows, columns = matrix.shape
    missing_rows, missing_columns = -rows % block_size, -columns % block_size
    if not (missing_rows or missing_columns):
        return matrix
    return pad(matrix, (0, missing_columns, 0, missing_rows), value=value)


def pad_columns(values: Tensor, block_size: int) -> Tensor:
    """One value per column [in], filled up with zeros to whole blocks."""
    return pad(values, (0, -values.shape[0] % block_size))


def gather_blocks(matrix: Tensor, index: Tensor, block_size: int) -> Tensor:
    """Copies of the blocks at `index` (int64 [n, 2]: block row, column) of a matrix of whole blocks: [n, b, b]."""
    return (
        _block_rows(matrix, block_size).index_select(0, _rows_of(index, matrix, block_size)).view(-1, *[block_size] * 2)
    )


def scatter_blocks_(matrix: Tensor, index: Tensor, blocks: Tensor) -> None:
    """Write blocks [n, b, b] back to where `gather_blocks` took them from, in place."""
    block_size = blocks.shape[-1]
    _block_rows(matrix, block_size).index_copy_(0, _rows_of(index, matrix, block_size), blocks.view(-1, block_size))


def _block_rows(matrix: Tensor, block_size: int) -> Tensor:
    """The matrix as [out * block cols, block_size], a row of a block per row, so that whole rows are moved at once."""
    return matrix.view(-1, block_size)


def _rows_of(index: Tensor, matrix: Tensor, block_size: int) -> Tensor:
    """Where the rows of the blocks at `index` stand in `_block_rows`, int64 [n * b]."""
    rows = index[:, :1] * block_size + torch.arange(block_size, device=index.device)
    return (rows * (matrix.shape[1] // block_size) + index[:, 1:]).view(-1)


def expand_blocks(values: Tensor, shape: tuple[int, int], block_size: int) -> Tensor:
    """One value per block [block rows, block cols] -> one per entry [out, in]."""
    rows, columns = shape
    return values.repeat_interleave(block_size, 0)[:rows].repeat_interleave(block_size, 1)[:, :columns]
