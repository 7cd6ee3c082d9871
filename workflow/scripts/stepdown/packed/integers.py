"""A matrix in three tiers as whole numbers of 8 or 4 bits, as docs/packed-format.md lays it out.

Blocks stand in the order of `format`. Inside a block four values of a row stand side by side, a **four**, as the
processor's `vpdpbusd` multiplies them; 16 rows of them, 64 bytes, are a vector of it.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..errors import UserError
from ..tensors.block_rounding import TOP_K_MULTIPLE, Rounded
from ..tensors.blocks import gather_blocks, pad_to_blocks
from ..tensors.tiers import Tier, count_tiers
from .format import BLOCK_SIZE, PackedMatrix, check_parts, check_positions, check_tiers, columns_of, pack, positions_of

# What a code of 4 bits is stored with, so that it is not negative.
OFFSET = 8


@dataclass(frozen=True)
class IntegerMatrix:
    """The parts of a matrix whose blocks are n0 Dense, n1 2:4 and n2 TopK.

    shape: (out, in); tiers: uint8 [block rows, block cols]; dense: [n0, 4, 16, 4] (four columns, row, which of them);
    two_four: [n1, 2, 16, 4] (two groups of 4 columns, row, two kept of either); positions: uint8 [n1, 2, 16], the
    columns of those four inside their groups, 2 bits each; top_k: int8 [n2, k]; top_k_positions: uint8 [n2, k],
    16 * column + row; scales: float32 [out]. With 8 bits `dense` and `two_four` are int8. With 4 they are uint8
    [n0, 2, 16, 4] and [n1, 1, 16, 4], two codes in a byte, and dense_multiples and two_four_multiples, int8 [n0, 16]
    and [n1, 16], say by what each row of a block is multiplied.
    """

    shape: tuple[int, int]
    tiers: Tensor
    dense: Tensor
    two_four: Tensor
    positions: Tensor
    top_k: Tensor
    top_k_positions: Tensor
    scales: Tensor
    dense_multiples: Tensor | None = None
    two_four_multiples: Tensor | None = None

    @property
    def bits(self) -> int:
        return 8 if self.dense_multiples is None else 4

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the name it is stored under."""
        return {part: getattr(self, part) for part in PARTS[self.bits]}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device | None = None) -> "IntegerMatrix":
        return replace(self, **{part: tensor.to(device) for part, tensor in self.tensors.items()})

    def check(self, k: int) -> None:
        """Raises `UserError` unless the parts fit each other; a kernel reads where they say without looking again."""
        check_tiers(self.shape, self.tiers)
        check_parts(self.tensors, self._expected_parts(k))
        check_positions(_pairs(_columns_of_bits(self.positions)), self.top_k_positions)
        if not (self.scales.isfinite() & (self.scales > 0)).all():
            raise UserError("scales: one is not a positive number")
        for part in ("dense", "two_four", "top_k"):
            # Kernels change the sign of a code, and 128 has no room in 8 bits.
            if getattr(self, part).dtype == torch.int8 and (getattr(self, part) == -128).any():
                raise UserError(f"{part}: a code is -128, but they go from -127 to 127")

    def _expected_parts(self, k: int) -> dict[str, tuple[torch.dtype, list[int]]]:
        dense, two_four, top_k = count_tiers(self.tiers)
        codes, in_a_byte = (torch.int8, 1) if self.bits == 8 else (torch.uint8, 2)
        expected = {
            "dense": (codes, [dense, 4 // in_a_byte, BLOCK_SIZE, 4]),
            "two_four": (codes, [two_four, 2 // in_a_byte, BLOCK_SIZE, 4]),
            "positions": (torch.uint8, [two_four, 2, BLOCK_SIZE]),
            "top_k": (torch.int8, [top_k, k]),
            "top_k_positions": (torch.uint8, [top_k, k]),
            "scales": (torch.float32, [self.shape[0]]),
            "dense_multiples": (torch.int8, [dense, BLOCK_SIZE]),
            "two_four_multiples": (torch.int8, [two_four, BLOCK_SIZE]),
        }
        return {part: expected[part] for part in self.tensors if part != "tiers"}


_PARTS = tuple(field.name for field in fields(IntegerMatrix) if field.name != "shape")
PARTS = {8: _PARTS[:-2], 4: _PARTS}


def pack_integers(weight: Tensor, rounded: Rounded, tiers: Tensor, k: int, bits: int) -> IntegerMatrix:
    """Pack what a weight [out, in] was rounded to. Where something is kept `weight` says, also where its code is 0.

    Raises `ValueError` as `format.pack` does.
    """
    matrix = pack(weight, tiers, k, rounded.codes)
    dense, two_four = _fours(matrix.dense), _fours(matrix.two_four)
    multiples: tuple[Tensor, ...] = ()
    if bits == 4:
        dense, two_four = _two_in_a_byte(dense), _two_in_a_byte(two_four)
        # As a matrix whose blocks have the same number in a whole row.
        expanded = pad_to_blocks(rounded.multiples.repeat_interleave(BLOCK_SIZE, 1), BLOCK_SIZE)
        multiples = tuple(
            gather_blocks(expanded, (matrix.tiers == tier).nonzero(), BLOCK_SIZE)[..., 0].contiguous()
            for tier in (Tier.DENSE, Tier.TWO_FOUR)
        )
    return IntegerMatrix(
        matrix.shape,
        matrix.tiers,
        dense,
        two_four,
        _bits_of(_fours(columns_of(matrix.positions))),
        matrix.top_k,
        matrix.top_k_positions,
        rounded.scales,
        *multiples,
    )


def as_floats(matrix: IntegerMatrix, dtype: torch.dtype = torch.bfloat16) -> PackedMatrix:
    """The values that the codes stand for, code * multiple * scale, computed in float32 and rounded to a type."""
    dense, two_four, top_k = matrix.dense, matrix.two_four, matrix.top_k.short()
    if matrix.bits == 4:
        dense = _codes_of(dense) * matrix.dense_multiples[:, None, :, None]
        two_four = _codes_of(two_four) * matrix.two_four_multiples[:, None, :, None]
        top_k = top_k * TOP_K_MULTIPLE
    dense_scales, two_four_scales, top_k_scales = _scales_of_blocks(matrix)
    rows_of_top_k = matrix.top_k_positions.long() % BLOCK_SIZE
    return PackedMatrix(
        matrix.shape,
        matrix.tiers,
        _pairs(dense * dense_scales[:, None, :, None]).to(dtype),
        _pairs(two_four * two_four_scales[:, None, :, None]).to(dtype),
        positions_of(_pairs(_columns_of_bits(matrix.positions))),
        (top_k * top_k_scales.gather(1, rows_of_top_k)).to(dtype),
        matrix.top_k_positions,
    )


def top_k_before_scales(matrix: IntegerMatrix) -> Tensor:
    """Code * multiple of the weights of TopK blocks: bf16 [n2, k], exactly."""
    return matrix.top_k.bfloat16() * (TOP_K_MULTIPLE if matrix.bits == 4 else 1)


def _scales_of_blocks(matrix: IntegerMatrix) -> list[Tensor]:
    """Of each tier, the scales of the rows of its blocks: float32 [blocks, 16]."""
    scales = matrix.scales.new_zeros(len(matrix.tiers) * BLOCK_SIZE)
    scales[: len(matrix.scales)] = matrix.scales
    return [scales.view(-1, BLOCK_SIZE)[(matrix.tiers == tier).nonzero()[:, 0]] for tier in Tier]


def _fours(pairs: Tensor) -> Tensor:
    """[n, 2 m, 16, 2] -> [n, m, 16, 4]: of two pairs of a row, one four."""
    return pairs.unflatten(1, (-1, 2)).transpose(2, 3).flatten(3).contiguous()


def _pairs(fours: Tensor) -> Tensor:
    """What `_fours` was given."""
    return fours.unflatten(3, (2, 2)).transpose(2, 3).flatten(1, 2).contiguous()


def _two_in_a_byte(codes: Tensor) -> Tensor:
    """int8 [n, 2 m, 16, 4] -> uint8 [n, m, 16, 4]: the first of two vectors in the lower bits."""
    lower, upper = (codes + OFFSET).to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return lower | upper << 4


def _codes_of(nibbles: Tensor) -> Tensor:
    """What `_two_in_a_byte` was given, int16."""
    return torch.stack([nibbles & 15, nibbles >> 4], dim=2).flatten(1, 2).short() - OFFSET


def _bits_of(columns: Tensor) -> Tensor:
    """uint8 [n, 2, 16, 4] -> [n, 2, 16]: the first of four in the lowest bits."""
    shifts = torch.tensor([0, 2, 4, 6], device=columns.device)
    return (columns.int() << shifts).sum(-1).to(torch.uint8)


def _columns_of_bits(positions: Tensor) -> Tensor:
    """What `_bits_of` was given."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=positions.device)
    return positions[..., None] >> shifts & 3
