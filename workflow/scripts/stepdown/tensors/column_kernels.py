"""Columns of a weight settled on a GPU, many in one launch, in Triton: what `sparsegpt.Columns` does one by one.

Rows of a weight do not see each other: a program takes a few of them from the first column of a panel to the last, and
holds what the columns to come have been moved by. With TRITON_INTERPRET=1 in the environment it runs without a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a panel at most, and rows of a program.
PANEL, ROWS = 128, 16
# Columns of which n are chosen together at most: m^2 steps are compiled, which takes half a minute of 8, and minutes of
# 16.
GROUP = 8
# Added and taken away again, it leaves a float32 of less than 2^22 rounded to a whole number, halves to the even one.
ROUNDER = tl.constexpr(1.5 * 2**23)


def settle(
    part: slice, weight: Tensor, change: Tensor, factor: Tensor, keep: Tensor, rounding: tuple[Tensor, ...] = ()
) -> Tensor | None:
    """Settle a panel: the columns of a part keep what `keep` [columns, out] says, or whole numbers from low to high
    times step of it, rounding being (step, low, high), float32 [out]; returns the numbers then, int16 [columns, out].
    """
    codes = torch.empty(keep.shape, dtype=torch.int16, device=keep.device) if rounding else None
    kept = keep.to(torch.int8, memory_format=torch.contiguous_format)
    _launch(part, weight, change, factor, change, kept, rounding, codes, n=0, m=1)
    return codes


def settle_n_of_m(part: slice, weight: Tensor, change: Tensor, factor: Tensor, scale: Tensor, n: int, m: int) -> None:
    """Settle a panel of whole groups of m columns, of each of which the n stay whose w^2 D is largest when their turn
    comes."""
    _launch(part, weight, change, factor, scale, change, (), None, n, m)


def _launch(
    part: slice,
    weight: Tensor,
    change: Tensor,
    factor: Tensor,
    scale: Tensor,
    keep: Tensor,
    rounding: tuple[Tensor, ...],
    codes: Tensor | None,
    n: int,
    m: int,
) -> None:
    outputs = weight.shape[1]
    # What a kernel does not look at is any pointer.
    given = (*(rounding or (change, change, change)), change if codes is None else codes)
    _settle[(triton.cdiv(outputs, ROWS),)](
        weight, change, factor, scale, keep, *given, part.start, part.stop, *factor.stride(), outputs,
        N=n, M=m, ROUND=bool(rounding), COLUMNS=triton.next_power_of_2(part.stop - part.start), LINES=ROWS,
    )  # fmt: skip


@triton.jit
def _settle(
    weight, change, factor, scale, keep, step, low, high, codes, first, last, below, beside, outputs,
    N: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Columns first:last of weight and change, [inputs, outputs], M at a time; keep, codes: [last - first, outputs].

    A_ij is at i * below + j * beside.
    """
    row = tl.program_id(0) * LINES + tl.arange(0, LINES)
    there = row < outputs
    number = tl.arange(0, COLUMNS)
    place = (first + number).to(tl.int64)[:, None] * outputs + row[None, :]
    inside = (first + number < last)[:, None] & there[None, :]
    moved = tl.load(change + place, mask=inside, other=0.0)
    if ROUND:
        steps = tl.load(step + row, mask=there, other=1.0)
        lowest, highest = tl.load(low + row, mask=there, other=0.0), tl.load(high + row, mask=there, other=0.0)
    for begin in range(0, last - first, M):
        column = (first + begin).to(tl.int64)
        corner = factor + column * (below + beside)
        before, seen, keeps = (), (), ()
        for k in tl.static_range(M):
            mask = there & (column + k < last)
            before += (tl.load(weight + (column + k) * outputs + row, mask=mask, other=0.0),)
            seen += (tl.sum(tl.where(number[:, None] == begin + k, moved, 0.0), axis=0),)
            if N == 0:
                keeps += (tl.load(keep + (begin + k) * outputs + row, mask=mask, other=0) != 0,)
        if N > 0:
            keeps = _chosen(before, seen, corner, scale, column, last, below, beside, N, M)
        lost = ()
        for k in tl.static_range(M):
            value = before[k] + seen[k]
            for j in tl.static_range(k):
                value += lost[j] * tl.load(corner + j * below + k * beside, mask=column + k < last, other=0.0)
            if ROUND:
                whole = tl.minimum(tl.maximum(tl.div_rn(value, steps), lowest), highest)
                whole = tl.where(keeps[k], (whole + ROUNDER) - ROUNDER, 0.0)
                tl.store(codes + (begin + k) * outputs + row, whole.to(tl.int16), mask=there & (column + k < last))
                value = whole * steps
            lost += (before[k] - tl.where(keeps[k], value, 0.0),)
        for k in tl.static_range(M):
            to_come = (number > begin + k) & (first + number < last) & (column + k < last)
            above = factor + (column + k) * below + (first + number).to(tl.int64) * beside
            moved += tl.load(above, mask=to_come, other=0.0)[:, None] * lost[k][None, :]
            moved = tl.where(number[:, None] == begin + k, lost[k][None, :], moved)
    tl.store(change + place, moved, mask=inside)


@triton.jit
def _chosen(before, seen, corner, scale, column, last, below, beside, N: tl.constexpr, M: tl.constexpr):
    """Which of M columns each row keeps: those that matter most where each makes up for what the others lose."""
    free, saliency, keeps = (), (), ()
    for k in tl.static_range(M):
        exists = column + k < last
        own = seen[k]
        for j in tl.static_range(k):
            own -= free[j] * tl.load(corner + j * below + k * beside, mask=exists, other=0.0)
        free += (own,)
        root = (before[k] + own) * tl.load(scale + column + k, mask=exists, other=0.0)
        saliency += (tl.where(exists, root * root, float("-inf")),)
    room = (tl.minimum(last - column, M) * N + M - 1) // M
    for k in tl.static_range(M):
        beaten_by = tl.zeros_like(free[0]).to(tl.int32)
        for j in tl.static_range(M):
            # Of two equals the earlier wins.
            if j < k:
                beaten_by += (saliency[j] >= saliency[k]).to(tl.int32)
            if j > k:
                beaten_by += (saliency[j] > saliency[k]).to(tl.int32)
        keeps += (beaten_by < room,)
    return keeps
