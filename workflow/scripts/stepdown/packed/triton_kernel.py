"""The GPU kernels, in Triton. With TRITON_INTERPRET=1 in the environment they run, slowly, without a GPU.

Up to `FEW` rows of x take little longer than W does to be read: they are multiplied straight from the packed parts,
without tensor cores. For more, W is unpacked for as long as cuBLAS takes.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear, pad

from .format import BLOCK_SIZE, PackedMatrix, strip_layout, unpack
from .lines import top_k_lines

FEW = 8
# What results are stored as; the interpreter would cut them off where a GPU rounds them.
RESULT = torch.float32 if triton.knobs.runtime.interpret else torch.bfloat16


class TritonMultiply:
    """x -> x W^T + b, bf16 [rows, in] -> [rows, out], for a checked bf16 matrix, all on one GPU."""

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None):
        self._matrix, self._bias = matrix, bias
        self._sizes = matrix.shape[0], matrix.tiers.shape[1]
        layout = strip_layout(matrix.tiers)
        lines, lines_before = top_k_lines(matrix)
        fours = _bits(matrix.dense, torch.int64), _bits(matrix.two_four, torch.int64), matrix.positions
        self._parts = (*fours, lines, *layout, lines_before)
        pairs = _bits(matrix.dense, torch.int32), _bits(matrix.two_four, torch.int32), matrix.positions
        self._unpacking = (*pairs, _bits(matrix.top_k, torch.int16), matrix.top_k_positions, *layout)
        self._padding = matrix.tiers.shape[1] * BLOCK_SIZE - matrix.shape[1]
        self._compiled: dict[int, Callable[..., None]] = {}

    @property
    def weight(self) -> Tensor:
        return unpack(self._matrix)

    def __call__(self, x: Tensor) -> Tensor:
        x = pad(x, (0, self._padding)) if self._padding else x.contiguous()
        # Triton launches on the current GPU, wherever its tensors are.
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            if len(x) > FEW:
                return linear(x, self._unpacked(), self._bias)
            return self._few_rows(x) if len(x) else x.new_empty(0, self._matrix.shape[0])

    def _few_rows(self, x: Tensor) -> Tensor:
        # Four at a time are read, and kernels are compiled for an address that is a multiple of 16 bytes.
        x = x.clone() if x.data_ptr() % 16 else x
        rows, strips = x.shape[0], self._matrix.tiers.shape[0]
        y = x.new_empty(rows, self._sizes[0], dtype=RESULT)
        warps = _warps(strips, rows)
        held = (*self._parts, y if self._bias is None else self._bias)
        numbers = (*self._sizes, self._bias is not None, rows, 16 * warps)
        if launch := self._compiled.get(rows):
            place = x.data_ptr()
            launch(place, place, place, y.data_ptr(), *(part.data_ptr() for part in held), *numbers)
        else:
            as_numbers = (x.view(dtype) for dtype in (torch.int16, torch.int32, torch.int64))
            kernel = _few_rows[(strips,)](*as_numbers, y, *held, *numbers, num_warps=warps)
            # The interpreter has none. Launched as what it is, a kernel takes the host a tenth of the time that Triton
            # takes to find out from its arguments which it is.
            if kernel is not None:
                self._compiled[rows] = kernel[(strips, 1, 1)]
        return y.to(x.dtype)

    def _unpacked(self) -> Tensor:
        """W, bf16 [out, in], `in` filled up to whole blocks."""
        matrix = self._matrix
        weight = matrix.dense.new_empty([BLOCK_SIZE * count for count in matrix.tiers.shape])
        _unpack[(len(matrix.tiers), UNPACKING)](
            weight.view(torch.int16), weight.view(torch.int32), *self._unpacking, self._sizes[1],
            k=matrix.top_k.shape[1], BLOCKS=8, PROGRAMS=UNPACKING,
        )  # fmt: skip
        return weight[: matrix.shape[0]]


def _warps(strips: int, rows: int) -> int:
    """Of the program for a strip, by what was fastest on an H200: many where few strips must keep the GPU busy, few
    where each has many sums to hold."""
    if strips > 512 or rows > 2:
        return 4
    return 16 if rows == 1 else 8


def _bits(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as whole numbers that hold one, two or four of them: the interpreter's bfloat16 are none."""
    return values.flatten().view(dtype)


@triton.jit
def _blocks_of(starts, strip, tier: tl.constexpr):
    """The first block of a tier in a strip, and how many there are."""
    first = tl.load(starts + 3 * strip + tier)
    return first, (tl.load(starts + 3 * strip + 3 + tier) - first).to(tl.int32)


# ---------------------------------------------------------------- few rows


@triton.jit
def _few_rows(
    x, x_pairs, x_groups, y, dense, two_four, positions, top_k, columns, starts, lines_before, bias,
    outputs, block_columns, has_bias: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """y [rows, outputs] = x [rows, 16 * block_columns] W^T + bias, a strip to a program.

    x: by one, by two and by four columns; dense, two_four: by four weights; top_k, lines_before: see `lines`. A
    **line** is what the 16 rows of a strip have in one place: two columns of a Dense block (8 lines), a group of a 2:4
    block (4), a weight of each row's TopK blocks. The lines of a tier stand one after the other. Each thread takes two
    rows of a line at a time, an even one and the odd one after it, and all rows of x.
    """
    strip = tl.program_id(0)
    even, odd = _add_blocks(
        x_pairs, x_groups, dense, two_four, positions, columns, starts, strip, block_columns, ROWS, LINES
    )
    even, odd = _add_top_k(x, top_k, lines_before, strip, block_columns, even, odd, ROWS, LINES)
    output = strip * 16 + tl.arange(0, 16)
    for row in tl.static_range(ROWS):
        total = tl.reshape(tl.sum(tl.join(even[row], odd[row]), axis=1), (16,))
        if has_bias:
            total += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)
        tl.store(y + row * outputs + output, total.to(y.dtype.element_ty), mask=output < outputs)


@triton.jit
def _add_blocks(
    x_pairs, x_groups, dense, two_four, positions, columns, starts, strip, block_columns,
    ROWS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """What Dense and 2:4 blocks add to the even and the odd rows, for each row of x: float32 [8, LINES]."""
    # All is loaded in this one shape, and with `&` for `%`, by which Triton would see that neighbours lie side by side
    # in x and give them to other threads: so that each thread has its inputs beside its weights.
    r = tl.broadcast_to(tl.arange(0, 8)[:, None], (8, LINES))
    n = tl.broadcast_to(tl.arange(0, LINES)[None, :], (8, LINES))
    first_dense, dense_blocks = _blocks_of(starts, strip, 0)
    first_two_four, two_four_blocks = _blocks_of(starts, strip, 1)
    dense_columns = columns + strip * block_columns
    two_four_columns = dense_columns + dense_blocks
    even, odd = _zeros(ROWS, LINES), _zeros(ROWS, LINES)
    for begin in range(0, tl.maximum(8 * dense_blocks, 4 * two_four_blocks), LINES):
        line = begin + n
        is_dense, is_two_four = line < 8 * dense_blocks, line < 4 * two_four_blocks
        full = tl.load(dense + first_dense * 64 + line * 8 + r, mask=is_dense, other=0)
        half = tl.load(two_four + first_two_four * 32 + line * 8 + r, mask=is_two_four, other=0)
        bits = tl.load(positions + first_two_four * 32 + line * 8 + r, mask=is_two_four, other=0).to(tl.int64)
        pair = 8 * tl.load(dense_columns + line // 8, mask=is_dense, other=0) + (line & 7)
        group = 4 * tl.load(two_four_columns + line // 4, mask=is_two_four, other=0) + (line & 3)
        new_even, new_odd = (), ()
        for row in tl.static_range(ROWS):
            two = tl.load(x_pairs + row * 8 * block_columns + pair, mask=is_dense, other=0)
            four = tl.load(x_groups + row * 4 * block_columns + group, mask=is_two_four, other=0)
            new_even += (even[row] + _dense_product(full.to(tl.int32), two)
                         + _two_four_product(half.to(tl.int32), four, bits),)  # fmt: skip
            new_odd += (odd[row] + _dense_product((full >> 32).to(tl.int32), two)
                        + _two_four_product((half >> 32).to(tl.int32), four, bits >> 4),)  # fmt: skip
        even, odd = new_even, new_odd
    return even, odd


@triton.jit
def _add_top_k(
    x, top_k, lines_before, strip, block_columns, even, odd, ROWS: tl.constexpr, LINES: tl.constexpr
):  # fmt: skip
    """`even` and `odd` and what TopK blocks add to them."""
    r = tl.broadcast_to(tl.arange(0, 8)[:, None], (8, LINES))
    n = tl.broadcast_to(tl.arange(0, LINES)[None, :], (8, LINES))
    end = tl.load(lines_before + strip + 1)
    for begin in range(tl.load(lines_before + strip), end, LINES):
        entries = tl.load(top_k + (begin + n) * 8 + r, mask=begin + n < end, other=0)
        upper, lower = entries.to(tl.int32), (entries >> 32).to(tl.int32)
        new_even, new_odd = (), ()
        for row in tl.static_range(ROWS):
            inputs = x + row * 16 * block_columns
            new_even += (even[row] + _high(upper) * _low(tl.load(inputs + (upper & 65535)).to(tl.int32)),)
            new_odd += (odd[row] + _high(lower) * _low(tl.load(inputs + (lower & 65535)).to(tl.int32)),)
        even, odd = new_even, new_odd
    return even, odd


@triton.jit
def _zeros(ROWS: tl.constexpr, LINES: tl.constexpr):
    """So many sums."""
    sums = (tl.zeros((8, LINES), tl.float32),)
    for _ in tl.static_range(1, ROWS):
        sums += (tl.zeros((8, LINES), tl.float32),)
    return sums


@triton.jit
def _dense_product(weights, inputs):
    return _low(weights) * _low(inputs) + _high(weights) * _high(inputs)


@triton.jit
def _two_four_product(weights, four, bits):
    """Of two weights with those of four inputs that their bits, 2 each, name."""
    first = (four >> ((bits & 3) * 16)).to(tl.int32)
    second = (four >> ((bits >> 2 & 3) * 16)).to(tl.int32)
    return _low(weights) * _low(first) + _high(weights) * _low(second)


@triton.jit
def _low(pair):
    """The first of two bfloat16 in 32 bits, as float32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(pair):
    """The second."""
    return (pair & -65536).to(tl.float32, bitcast=True)


# ---------------------------------------------------------------- more rows

# Programs that share a strip.
UNPACKING = 8


@triton.jit
def _unpack(
    weight, weight_pairs, dense, two_four, positions, top_k, top_k_positions, columns, starts, block_columns,
    k: tl.constexpr, BLOCKS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """W [16 * strips, 16 * block_columns], by one and by two columns; so many blocks of a strip at a time."""
    strip = tl.program_id(0)
    r = tl.broadcast_to(tl.arange(0, 16)[:, None], (16, 8 * BLOCKS))
    n = tl.broadcast_to(tl.arange(0, 8 * BLOCKS)[None, :], (16, 8 * BLOCKS))
    weight += strip.to(tl.int64) * (256 * block_columns)
    target = weight_pairs + (strip * 16 + r).to(tl.int64) * (8 * block_columns)
    column = columns + strip * block_columns
    own = tl.program_id(1) * BLOCKS

    first, count = _blocks_of(starts, strip, 0)
    for block in range(own, count, BLOCKS * PROGRAMS):
        place, there = _places(column, block * 8 + n, count)
        pairs = tl.load(dense + first * 128 + (block * 8 + n) * 16 + r, mask=there, other=0)
        tl.store(target + place, pairs, mask=there)
    column += count

    first, count = _blocks_of(starts, strip, 1)
    for block in range(own, count, BLOCKS * PROGRAMS):
        place, there = _places(column, block * 8 + n, count)
        line = (block * 8 + n) // 2
        kept = tl.load(two_four + first * 64 + line * 16 + r, mask=there, other=0)
        bits = tl.load(positions + first * 32 + line * 8 + r // 2, mask=there, other=0).to(tl.int32) >> (r % 2 * 4)
        pairs = _where_kept(kept, bits, n % 2 * 2) | (_where_kept(kept, bits, n % 2 * 2 + 1) << 16)
        tl.store(target + place, pairs, mask=there)
    column += count

    first, count = _blocks_of(starts, strip, 2)
    for block in range(own, count, BLOCKS * PROGRAMS):
        place, there = _places(column, block * 8 + n, count)
        tl.store(target + place, tl.zeros((16, 8 * BLOCKS), tl.int32), mask=there)
        # Zero by whichever thread, before another writes there.
        tl.debug_barrier()
        end = tl.minimum(block + BLOCKS, count) * k
        for begin in range(block * k, end, 128):
            entry = begin + tl.arange(0, 128)
            spot = tl.load(top_k_positions + first * k + entry, mask=entry < end, other=0).to(tl.int32)
            value = tl.load(top_k + first * k + entry, mask=entry < end, other=0)
            input = 16 * tl.load(column + entry // k, mask=entry < end, other=0) + spot // 16
            tl.store(weight + spot % 16 * (16 * block_columns) + input, value, mask=entry < end)


@triton.jit
def _places(column, pair, count):
    """Where in a row of W a tier's pairs of columns belong, and whether a strip has so many."""
    there = pair < 8 * count
    return 8 * tl.load(column + pair // 8, mask=there, other=0) + pair % 8, there


@triton.jit
def _where_kept(kept, bits, column):
    """What stands in a column of a 2:4 group, 16 bits: the first of the two that are kept, the second, or nothing."""
    second = tl.where((bits >> 2 & 3) == column, kept >> 16 & 65535, 0)
    return tl.where((bits & 3) == column, kept & 65535, second)
