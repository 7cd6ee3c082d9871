"""The GPU kernel, in Triton: a program computes 16 outputs, a strip, for up to 64 rows of x.

Blocks come from memory packed and become 16 x 16 tiles in registers, which the tensor cores multiply. With
TRITON_INTERPRET=1 in the environment it runs, slowly, without a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from .format import BLOCK_SIZE, PackedMatrix, strip_layout, unpack

# What tiles are multiplied and results stored as; the interpreter would multiply the bit patterns of bfloat16 and cut
# results off where a GPU rounds them.
COMPUTE = torch.float32 if triton.knobs.runtime.interpret else torch.bfloat16


class TritonMultiply:
    """x -> x W^T + b, bf16 [rows, in] -> [rows, out], for a checked bf16 matrix, all on one GPU."""

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None):
        self._matrix, self._bias = matrix, bias
        self._columns, self._starts = strip_layout(matrix.tiers)
        self._padding = matrix.tiers.shape[1] * BLOCK_SIZE - matrix.shape[1]

    @property
    def weight(self) -> Tensor:
        return unpack(self._matrix.to(device=torch.device("cpu"))).to(self._columns.device)

    def __call__(self, x: Tensor) -> Tensor:
        matrix = self._matrix
        x = pad(x, (0, self._padding)) if self._padding else x.contiguous()
        y = x.new_empty(len(x), matrix.shape[0], dtype=COMPUTE)
        if len(x) == 0:
            return y.to(x.dtype)
        # The tensor cores take 16 rows at least.
        rows = min(64, max(16, triton.next_power_of_2(len(x))))
        parts = (matrix.dense, matrix.two_four, matrix.positions, matrix.top_k, matrix.top_k_positions)
        bias = self._bias if self._bias is not None else matrix.dense
        _three_tier[(len(matrix.tiers), triton.cdiv(len(x), rows))](
            x, y, *parts, self._columns, self._starts, bias, len(x), matrix.shape[0], matrix.tiers.shape[1],
            k=matrix.top_k.shape[1], has_bias=self._bias is not None, ROWS=rows,
        )  # fmt: skip
        return y.to(x.dtype)


@triton.jit
def _three_tier(
    x, y, dense, two_four, positions, top_k, top_k_positions, columns, starts, bias, rows, outputs, block_columns,
    k: tl.constexpr, has_bias: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y [rows, outputs] = x [rows, 16 * block_columns] W^T + bias; the parts of W as in PackedMatrix."""
    strip = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, 16)[:, None]
    r = tl.arange(0, 16)[None, :]
    inside = row[:, None] < rows
    x_rows = x + row[:, None].to(tl.int64) * (16 * block_columns) + tl.arange(0, 16)[None, :]
    column = columns + strip * block_columns
    sums = tl.zeros((ROWS, 16), tl.float32)

    first, end = tl.load(starts + 3 * strip), tl.load(starts + 3 * strip + 3)
    for block in range(first, end):
        tile = tl.load(dense + block * 256 + c // 2 * 32 + r * 2 + c % 2)
        inputs = tl.load(x_rows + 16 * tl.load(column), mask=inside, other=0.0)
        sums = tl.dot(inputs.to(y.dtype.element_ty), tile.to(y.dtype.element_ty), sums)
        column += 1

    first, end = tl.load(starts + 3 * strip + 1), tl.load(starts + 3 * strip + 4)
    for block in range(first, end):
        pair = two_four + block * 128 + c // 4 * 32 + r * 2
        bits = tl.load(positions + block * 32 + c // 4 * 8 + r // 2).to(tl.int32) >> (r % 2 * 4)
        zero = tl.zeros((16, 16), x.dtype.element_ty)
        second = tl.where((bits >> 2 & 3) == c % 4, tl.load(pair + 1), zero)
        tile = tl.where((bits & 3) == c % 4, tl.load(pair), second)
        inputs = tl.load(x_rows + 16 * tl.load(column), mask=inside, other=0.0)
        sums = tl.dot(inputs.to(y.dtype.element_ty), tile.to(y.dtype.element_ty), sums)
        column += 1

    first, end = tl.load(starts + 3 * strip + 2), tl.load(starts + 3 * strip + 5)
    for block in range(first, end):
        tile = tl.zeros((16, 16), x.dtype.element_ty)
        for entry in range(k):
            place = tl.load(top_k_positions + block * k + entry).to(tl.int32)
            tile = tl.where(c * 16 + r == place, tl.load(top_k + block * k + entry), tile)
        inputs = tl.load(x_rows + 16 * tl.load(column), mask=inside, other=0.0)
        sums = tl.dot(inputs.to(y.dtype.element_ty), tile.to(y.dtype.element_ty), sums)
        column += 1

    output = strip * 16 + r
    if has_bias:
        sums += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)
    target = y + row[:, None].to(tl.int64) * outputs + output
    tl.store(target, sums.to(y.dtype.element_ty), mask=inside & (output < outputs))
