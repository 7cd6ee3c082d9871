"""Swaps: a kept and a pruned weight of a block change places where the outputs lose less by it.

With H = X'X + ridge and c = W H - Y'X - ridge W_pruned, half the gradient of the error, to drop w_u and to restore w_p
at what is best for it changes the error by

    H_uu w_u^2 - 2 c_u w_u - (c_p - H_up w_u)^2 / H_pp        (H_up counts in one row alone)

which is the 1-swap of SparseSwaps (arXiv 2512.10922) with the best weight in place of the one there was before. Many
blocks swap at once and all weights are fitted anew, which the formula does not foresee: what is not better is undone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import expand_blocks, gather_blocks, pad_columns, scatter_blocks_
from .least_squares import TINY, descend_, masked_least_squares
from .tiers import BLOCKS_AT_ONCE, Tier

# At most so many swaps of a row in a 2:4 block, and of a TopK block; the last round is one that brings less than this
# share of what the first did.
ROUNDS, LEAST_GAIN = 12, 1 / 20
# Conjugate gradient steps after each round, and after the last.
STEPS, LAST_STEPS = 3, 10
# Rows at a time: each round holds eight matrices of so many.
ROWS = 256


@dataclass(frozen=True)
class Errors:
    """What all rows of a matrix have in common.

    hessian: X'X, [in, in]; ridge: []; near: H of the columns of each block, [block columns, b, b].
    """

    hessian: Tensor
    ridge: Tensor
    near: Tensor


def swapped_least_squares(
    weight: Tensor,
    keep: Tensor,
    hessian: Tensor,
    target: Tensor,
    tiers: Tensor,
    block_size: int,
    damping: float = 0.01,
) -> Tensor:
    """As `masked_least_squares`, of which this lowers the error further: each block chooses anew what it keeps.

    tiers: uint8 [block rows, block columns]; a 2:4 block keeps as many of each four, a TopK block as many in all, as
    `keep` does. Ragged blocks at the edges keep theirs, and so do all of a matrix whose inputs are no whole blocks.
    Returns float32 [out, in].
    """
    solution = masked_least_squares(weight, keep, hessian, target, damping)
    if weight.shape[1] % block_size or block_size % 4:
        return solution
    ridge = damping * hessian.diagonal().mean()
    errors = Errors(hessian, ridge, _diagonal_blocks(hessian, block_size) + ridge * torch.eye(block_size).to(hessian))
    height = max(1, ROWS // block_size)
    matrices = (matrix.split(height * block_size) for matrix in (solution, keep, target, weight))
    for rows, kept, wanted, held, grid in zip(*matrices, tiers.to(hessian.device).split(height), strict=True):
        _improve_(rows, kept.clone(), wanted.addcmul(held, ridge), grid, errors)
    return solution


def _improve_(solution: Tensor, keep: Tensor, target: Tensor, tiers: Tensor, errors: Errors) -> None:
    """Swap in rows of blocks, in place, as long as it is worth it."""
    block_size, gains = errors.near.shape[-1], []
    # Ragged blocks stay as they are.
    whole = tiers[: len(solution) // block_size]
    ways = [((whole == Tier.TWO_FOUR).nonzero(), _swap_in_fours_), ((whole == Tier.TOP_K).nonzero(), _swap_in_blocks_)]
    gradient = -descend_(solution, keep, target, errors.hessian, errors.ridge, 0)
    error = _sums(solution * (gradient - target), block_size)
    for _ in range(ROUNDS):
        moved, free = solution.clone(), keep.clone()
        for index, swap in ways:
            _swap_blocks_(moved, free, gradient, index, errors.near, swap)
        slope = -descend_(moved, free, target, errors.hessian, errors.ridge, STEPS)
        found = _sums(moved * (slope - target), block_size)
        rows = expand_blocks((found < error)[:, None], (len(solution), 1), block_size)
        for old, new in ((solution, moved), (keep, free), (gradient, slope)):
            torch.where(rows, new, old, out=old)
        gains.append((error - found).clamp(min=0).sum())
        error = torch.minimum(error, found)
        if gains[-1] <= LEAST_GAIN * gains[0]:
            break
    descend_(solution, keep, target, errors.hessian, errors.ridge, LAST_STEPS)


def _swap_blocks_(
    solution: Tensor, keep: Tensor, gradient: Tensor, index: Tensor, near: Tensor, swap: Callable[..., None]
) -> None:
    """`swap` in the blocks at `index` [n, 2], in place."""
    block_size = near.shape[-1]
    for part in index.split(BLOCKS_AT_ONCE):
        weight, kept, slope = (gather_blocks(matrix, part, block_size) for matrix in (solution, keep, gradient))
        swap(weight, kept, slope, near[part[:, 1]])
        scatter_blocks_(solution, part, weight)
        scatter_blocks_(keep, part, kept)


def _swap_in_fours_(weight: Tensor, keep: Tensor, gradient: Tensor, near: Tensor) -> None:
    """In each row of each block [n, b, b] the best of all swaps inside its groups of four, where it is worth it.

    near: H of the columns of each block, [n, b, b].
    """
    columns = torch.arange(near.shape[-1], device=near.device)
    others = [columns // 4 * 4 + (columns + step) % 4 for step in (1, 2, 3)]
    own = near.diagonal(dim1=1, dim2=2)[:, None].clamp(min=TINY)
    drop = (own * weight.square() - 2 * gradient * weight).where(keep, torch.inf)
    # Where each weight's partner would go: [n, b, 3, b].
    restored = [
        (near[:, columns, other][:, None] * weight - gradient[..., other]) / own[..., other] for other in others
    ]
    change = [
        (drop - value.square() * own[..., other]).where(~keep[..., other], torch.inf)
        for value, other in zip(restored, others, strict=True)
    ]
    least, place = torch.stack(change, -2).flatten(-2).min(-1, keepdim=True)
    value = torch.stack(restored, -2).flatten(-2).gather(-1, place)
    _exchange_(weight, keep, place % len(columns), torch.cat(others)[place], value, least < 0)


def _swap_in_blocks_(weight: Tensor, keep: Tensor, gradient: Tensor, near: Tensor) -> None:
    """In each block [n, b, b] what costs least to drop for what brings most, where it is worth it; near: as above."""
    own = near.diagonal(dim1=1, dim2=2)[:, None].clamp(min=TINY)
    cost, place = (own * weight.square() - 2 * gradient * weight).where(keep, torch.inf).flatten(1).min(1, keepdim=True)
    row, column = place[:, 0] // near.shape[-1], place[:, 0] % near.shape[-1]
    blocks = torch.arange(len(near), device=near.device)
    slope = gradient.clone()
    slope[blocks, row] -= near[blocks, column] * weight[blocks, row, column][:, None]
    restored = (-slope / own).flatten(1)
    gain, other = (slope.square() / own).where(~keep, -torch.inf).flatten(1).max(1, keepdim=True)
    _exchange_(weight.flatten(1), keep.flatten(1), place, other, restored.gather(1, other), cost < gain)


def _exchange_(weight: Tensor, keep: Tensor, place: Tensor, other: Tensor, value: Tensor, worth: Tensor) -> None:
    """Along the last axis, where it is worth it: what is at `place` is dropped, `other` gets the value."""
    weight.scatter_(-1, other, value.where(worth, weight.gather(-1, other)))
    weight.scatter_(-1, place, weight.gather(-1, place).where(~worth, 0.0))
    keep.scatter_(-1, other, keep.gather(-1, other) | worth)
    keep.scatter_(-1, place, keep.gather(-1, place) & ~worth)


def _diagonal_blocks(hessian: Tensor, block_size: int) -> Tensor:
    """Copies of the blocks on the diagonal of [in, in]: [block columns, b, b]."""
    grid = hessian.unflatten(0, (-1, block_size)).unflatten(2, (-1, block_size))
    return grid.diagonal(dim1=0, dim2=2).movedim(-1, 0).contiguous()


def _sums(values: Tensor, block_size: int) -> Tensor:
    """Of each row of blocks: [block rows]."""
    return pad_columns(values.sum(1), block_size).view(-1, block_size).sum(1)
