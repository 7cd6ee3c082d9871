"""A matrix in three tiers as docs/packed-format.md lays it out: only what the tiers keep, in the order it is computed.

16 rows of W, a row of blocks, are a strip. The blocks of a tier stand one after the other, strip by strip and, inside a
strip, column by column, so that the tier map alone says which block is where.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from ..errors import UserError
from ..tensors.blocks import gather_blocks, grid_shape, pad_to_blocks, scatter_blocks_
from ..tensors.masks import keep_top_k
from ..tensors.tiers import BLOCKS_AT_ONCE, Tier, count_tiers

BLOCK_SIZE = 16
# Which two of four columns are stored, by which of them are not zero (bit c: column c): those, and the first of the
# others where they are fewer; in order.
KEPT_PAIRS = torch.tensor([sorted(sorted(range(4), key=lambda c: not code >> c & 1)[:2]) for code in range(16)])


@dataclass(frozen=True)
class PackedMatrix:
    """The parts of a matrix whose blocks are n0 Dense, n1 2:4 and n2 TopK.

    shape: (out, in); tiers: uint8 [block rows, block cols]; dense: [n0, 8, 16, 2] (pair of columns, row, column of the
    pair); two_four: [n1, 4, 16, 2] (group of 4 columns, row, which of the two kept); positions: uint8 [n1, 4, 8], the
    kept's columns inside their group, 2 bits each; top_k: [n2, k]; top_k_positions: uint8 [n2, k], 16 * column + row.
    The values have the matrix's own type.
    """

    shape: tuple[int, int]
    tiers: Tensor
    dense: Tensor
    two_four: Tensor
    positions: Tensor
    top_k: Tensor
    top_k_positions: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the name it is stored under."""
        return {part: getattr(self, part) for part in PARTS}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> "PackedMatrix":
        """The same on another device, or with values of another type."""
        moved = {part: tensor.to(device) for part, tensor in self.tensors.items()}
        return replace(self, **moved | {part: moved[part].to(dtype or moved[part].dtype) for part in VALUES})

    def check(self, k: int) -> None:
        """Raises `UserError` unless the parts fit each other; a kernel reads where they say without looking again."""
        check_tiers(self.shape, self.tiers)
        dense, two_four, top_k = count_tiers(self.tiers)
        dtype = self.dense.dtype
        if not dtype.is_floating_point:
            raise UserError(f"dense is {dtype}, but the values of these tiers are of a floating type")
        expected = {
            "dense": (dtype, [dense, 8, 16, 2]),
            "two_four": (dtype, [two_four, 4, 16, 2]),
            "positions": (torch.uint8, [two_four, 4, 8]),
            "top_k": (dtype, [top_k, k]),
            "top_k_positions": (torch.uint8, [top_k, k]),
        }
        check_parts(self.tensors, expected)
        check_positions(columns_of(self.positions), self.top_k_positions)


VALUES = ("dense", "two_four", "top_k")
PARTS = tuple(field.name for field in fields(PackedMatrix) if field.name != "shape")


def packed_bytes(tiers: Tensor, k: int, value_bytes: int = 2) -> int:
    """What a matrix of these tiers takes packed: values, their positions, and the tier map."""
    dense, two_four, top_k = count_tiers(tiers)
    entries = BLOCK_SIZE**2
    blocks = dense * entries * value_bytes + two_four * entries // 8 * (4 * value_bytes + 1)
    return tiers.numel() + blocks + top_k * k * (value_bytes + 1)


def pack(weight: Tensor, tiers: Tensor, k: int, values: Tensor | None = None) -> PackedMatrix:
    """Pack a weight [out, in] of any floating type whose zeros are as its tiers, uint8 [block rows, block cols], say.

    values: what is stored of each weight [out, in], if not the weight itself. The parts lie on the weight's device.
    Raises `ValueError` when a block holds more weights than its tier has room for.
    """
    padded, tiers = pad_to_blocks(weight, BLOCK_SIZE), tiers.to(weight.device, copy=True)
    sources = padded, padded if values is None else pad_to_blocks(values, BLOCK_SIZE)

    def packed(tier: Tier, pack_blocks: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """`pack_blocks` over all blocks of a tier, a few at a time."""
        pieces = (tiers == tier).nonzero().split(BLOCKS_AT_ONCE)
        parts = [pack_blocks(*(gather_blocks(source, index, BLOCK_SIZE) for source in sources)) for index in pieces]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    return PackedMatrix(
        tuple(weight.shape),
        tiers,
        *packed(Tier.DENSE, _pack_dense),
        *packed(Tier.TWO_FOUR, _pack_two_four),
        *packed(Tier.TOP_K, partial(_pack_top_k, k=k)),
    )


def unpack(matrix: PackedMatrix) -> Tensor:
    """The weight [out, in] that was packed, bit for bit; only a -0.0 that was pruned comes back as 0.0."""
    padded = matrix.dense.new_zeros([BLOCK_SIZE * count for count in matrix.tiers.shape])
    for tier, blocks in (
        (Tier.DENSE, matrix.dense.transpose(1, 2)),
        (Tier.TWO_FOUR, _unpack_two_four(matrix.two_four, matrix.positions)),
        (Tier.TOP_K, _unpack_top_k(matrix.top_k, matrix.top_k_positions)),
    ):
        scatter_blocks_(padded, (matrix.tiers == tier).nonzero(), blocks.contiguous().view(-1, BLOCK_SIZE, BLOCK_SIZE))
    return padded[: matrix.shape[0], : matrix.shape[1]].contiguous()


def strip_layout(tiers: Tensor) -> tuple[Tensor, Tensor]:
    """Where the kernels find a strip's blocks, from the tier map.

    Returns int32 [block rows, block cols], the columns of each strip's blocks in the order of their tiers, and int64
    [block rows + 1, 3], how many blocks of each tier are in the strips before.
    """
    counts = torch.stack([(tiers == tier).sum(1) for tier in Tier], dim=1)
    starts = torch.cat([counts.new_zeros(1, len(Tier)), counts.cumsum(0)])
    return tiers.sort(dim=1, stable=True).indices.int(), starts


def check_tiers(shape: tuple[int, int], tiers: Tensor) -> None:
    grid = grid_shape(shape, BLOCK_SIZE)
    if tiers.dtype != torch.uint8 or tuple(tiers.shape) != grid or int(tiers.max()) > max(Tier):
        raise UserError(f"the tiers are not {list(grid)} values from 0 to {int(max(Tier))}")


def check_parts(tensors: dict[str, Tensor], expected: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    for part, (dtype, shape) in expected.items():
        tensor = tensors[part]
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            raise UserError(f"{part} is {tensor.dtype} {list(tensor.shape)}, but the tiers call for {dtype} {shape}")


def check_positions(columns: Tensor, top_k_positions: Tensor) -> None:
    """columns: uint8 [n1, 4, 16, 2], of each row of each 2:4 group."""
    first, second = columns.unbind(-1)
    if not (first < second).all():
        raise UserError("positions: a 2:4 group names a column twice or out of order")
    if not (top_k_positions[:, 1:] > top_k_positions[:, :-1]).all():
        raise UserError("top_k_positions: a TopK block names a place twice or out of order")


def _pack_dense(_: Tensor, values: Tensor) -> tuple[Tensor]:
    """[n, 16, 16] -> [n, 8, 16, 2]."""
    return (values.unflatten(2, (8, 2)).transpose(1, 2).contiguous(),)


def _pack_two_four(blocks: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 16, 16] each -> values [n, 4, 16, 2] and positions uint8 [n, 4, 8]."""
    kept, values = ((of.unflatten(2, (4, 4)).transpose(1, 2)) for of in (blocks != 0, values))
    _check_room(kept, 2)
    code = (kept * torch.tensor([1, 2, 4, 8], device=kept.device)).sum(-1)
    columns = KEPT_PAIRS.to(code.device)[code]
    return values.gather(-1, columns), positions_of(columns)


def _check_room(kept: Tensor, room: int) -> None:
    """kept: which weights are not zero, by groups or blocks in the last axis."""
    if (kept.sum(-1) > room).any():
        raise ValueError("a block holds more weights than its tier has room for")


def positions_of(columns: Tensor) -> Tensor:
    """What `columns_of` was given."""
    shifts = torch.tensor([[0, 2], [4, 6]], device=columns.device)
    return (columns.int().unflatten(2, (8, 2)) << shifts).sum((-1, -2)).to(torch.uint8)


def columns_of(positions: Tensor) -> Tensor:
    """uint8 [n, 4, 8] -> the two columns of each row inside its group, uint8 [n, 4, 16, 2]."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=positions.device)
    return (positions[..., None] >> shifts & 3).view(-1, 4, BLOCK_SIZE, 2)


def _unpack_two_four(values: Tensor, positions: Tensor) -> Tensor:
    """What `_pack_two_four` was given."""
    groups = values.new_zeros([len(values), 4, BLOCK_SIZE, 4])
    groups.scatter_(-1, columns_of(positions).long(), values)
    return groups.transpose(1, 2)


def _pack_top_k(blocks: Tensor, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[n, 16, 16] each -> values [n, k] and positions uint8 [n, k]; a block of fewer weights names its first zeros
    too."""
    kept, values = (of.transpose(1, 2).flatten(1) for of in (blocks != 0, values))
    _check_room(kept, k)
    named = keep_top_k(kept.float(), torch.full([len(kept)], k, device=kept.device))
    positions = named.nonzero()[:, 1].view(-1, k)
    return values.gather(1, positions), positions.to(torch.uint8)


def _unpack_top_k(values: Tensor, positions: Tensor) -> Tensor:
    entries = values.new_zeros([len(values), BLOCK_SIZE**2]).scatter_(1, positions.long(), values)
    return entries.view(-1, BLOCK_SIZE, BLOCK_SIZE).transpose(1, 2)
