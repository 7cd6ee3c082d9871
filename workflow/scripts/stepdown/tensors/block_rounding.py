"""A matrix in three tiers with its kept weights as whole numbers of 8 or 4 bits: round to nearest, or GPTQ.

A weight is code * multiple * scale. Each row has a scale; each row of each 16 x 16 block has a multiple of it, a whole
number of 8 bits with a sign:

* 8 bits: the multiple is 1, and the largest weight of the row becomes the code 127 or -127.
* 4 bits: the largest weight of the row of the block becomes about the code -8, whatever its sign. The few weights of a
  TopK block, the largest of their block, keep 8 bits; there the multiple is 8.

What is zero stays zero. Under a Hessian H of the inputs, columns are rounded from left to right and those to come make
up for it (`quantisation.gptq` has the source). With 4 bits each is then rounded again, for what all others have lost,
those to its left as well, a few times over: coordinate descent (QuantEase, arXiv 2309.01885).
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .blocks import pad_to_blocks
from .sparsegpt import DAMPINGS, Columns, Rounding, from_left_to_right, settle_columns
from .tiers import Tier

BLOCK_SIZE = 16
# The largest code of 8 bits, either sign; of 4 bits the least one.
LARGEST_8, LEAST_4 = 127, -8
# By what the step is multiplied that makes the largest weight the code -8: tried in turn, the best is taken.
STEP_FACTORS = (1.0, 0.95, 1.05, 1.1, 1.15)
# How often the columns are rounded again after that with 4 bits; a third time lowers the error by a hundredth.
SWEEPS = 2
# Of a TopK block where the others have 4 bits: both kinds then reach as far from zero.
TOP_K_MULTIPLE = 8
# Rows of a dense matrix that are rounded together: those of a head are many, and in float32 meanwhile.
ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Rounded:
    """codes: int8 [out, in]; multiples: int8 [out, block cols]; scales: float32 [out]."""

    codes: Tensor
    multiples: Tensor
    scales: Tensor

    @property
    def weight(self) -> Tensor:
        """What the codes stand for: float32 [out, in]."""
        multiples = self.multiples.repeat_interleave(BLOCK_SIZE, 1)[:, : self.codes.shape[1]]
        return self.codes * multiples.short() * self.scales[:, None]


def round_in_blocks(
    weight: Tensor, tiers: Tensor, bits: int, hessian: Tensor | None = None, name: str = "matrix"
) -> Rounded:
    """Round a weight [out, in] whose zeros are as its tiers, uint8 [block rows, block cols], say; to nearest without a
    Hessian [in, in], by GPTQ with one. Raises `UserError` as `sparsegpt.factorise` does."""
    row_tiers = tiers.to(weight.device).repeat_interleave(BLOCK_SIZE, 0)[: len(weight)]
    largest = weight.float().abs().amax(1) / (LARGEST_8 if bits == 8 else LARGEST_8 * TOP_K_MULTIPLE)
    scales = torch.where(largest == 0, 1.0, largest)
    if hessian is None:
        blocks = pad_to_blocks(weight.float(), BLOCK_SIZE)[: len(weight)].unflatten(1, (-1, BLOCK_SIZE))
        multiples = fit_multiples(blocks, row_tiers, scales, bits)
        steps = multiples * scales[:, None]
        codes = to_codes(blocks, steps[..., None], row_tiers[..., None], bits).flatten(1)[:, : weight.shape[1]]
        return Rounded(codes.contiguous(), multiples, scales)
    rounded = _gptq(weight, row_tiers, scales, bits, hessian, name)
    for _ in range(SWEEPS if bits == 4 else 0):
        rounded = _round_again(weight, rounded, row_tiers, bits, hessian)
    return rounded


def round_dense(weight: Tensor, bits: int, hessian: Tensor | None = None, name: str = "matrix") -> Rounded:
    """The same of a weight [out, in] that has no tiers, as if all its blocks were Dense, some rows at a time."""
    blocks = [-(-size // BLOCK_SIZE) for size in (min(len(weight), ROWS_AT_ONCE), weight.shape[1])]
    tiers = torch.full(blocks, Tier.DENSE, dtype=torch.uint8)
    pieces = [round_in_blocks(rows, tiers, bits, hessian, name) for rows in weight.split(ROWS_AT_ONCE)]
    return Rounded(*(torch.cat([getattr(piece, field.name) for piece in pieces]) for field in fields(Rounded)))


def _gptq(weight: Tensor, row_tiers: Tensor, scales: Tensor, bits: int, hessian: Tensor, name: str) -> Rounded:
    keep = (weight != 0).T.contiguous()
    codes = torch.empty(weight.shape[::-1], dtype=torch.int8, device=weight.device)
    multiples = torch.empty(row_tiers.shape[::-1], dtype=torch.int8, device=weight.device)

    def settle(part: slice, columns: Columns) -> None:
        block = part.start // BLOCK_SIZE
        # Those that are masked have no say in what the step is.
        weights = columns.updated(part) * keep[part].T
        multiples[block] = fit_multiples(weights[:, None], row_tiers[:, block, None], scales, bits)[:, 0]
        codes[part] = columns.settle(part, keep[part], _rounding(multiples[block], scales, row_tiers[:, block], bits))

    # An input that the text leaves at zero may not be zero in another: nothing was pruned there.
    settle_columns(weight, hessian, BLOCK_SIZE, settle, name, dead_to_zero=False)
    return Rounded(codes.T.contiguous(), multiples.T.contiguous(), scales)


def _round_again(weight: Tensor, rounded: Rounded, row_tiers: Tensor, bits: int, hessian: Tensor) -> Rounded:
    """Round each column to where tr (W - Q) H (W - Q)' is smallest with all others as they are, from left to right:

    q_j <- w_j + sum over i != j of (W - Q)_i H_ij / H_jj
    """
    diagonal = hessian.diagonal()
    diagonal = torch.where(diagonal == 0, 1.0, diagonal)
    # As in the factor by which they were rounded before.
    diagonal = diagonal + DAMPINGS[0] * diagonal.mean()
    # What those to the right have lost; those to the left are carried once they are rounded again.
    lost = rounded.weight.neg_().add_(weight)
    change = hessian.tril(-1).div_(diagonal).T @ lost.T
    del lost
    transposed = weight.T.to(hessian.dtype, memory_format=torch.contiguous_format, copy=True)
    columns = Columns(transposed, change, hessian.triu().div_(diagonal), diagonal.sqrt())
    keep, codes = (weight != 0).T.contiguous(), torch.empty_like(rounded.codes.T, memory_format=torch.contiguous_format)

    def finish(first: int, last: int) -> None:
        part, block = slice(first, last), first // BLOCK_SIZE
        rounding = _rounding(rounded.multiples[:, block], rounded.scales, row_tiers[:, block], bits)
        codes[part] = columns.settle(part, keep[part], rounding)

    from_left_to_right(0, len(transposed), BLOCK_SIZE, finish, columns.carry)
    return replace(rounded, codes=codes.T.contiguous())


def _rounding(multiples: Tensor, scales: Tensor, row_tiers: Tensor, bits: int) -> Rounding:
    """Of the columns of a block: its multiples, the scales and its tiers, [out] each."""
    return Rounding(multiples * scales, *(limit.float() for limit in _limits(row_tiers, bits)))


def fit_multiples(blocks: Tensor, row_tiers: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The multiple of each row of blocks that leaves its codes nearest to its weights, in squares: [out, blocks, 16],
    tiers [out, blocks] and scales [out] -> int8 [out, blocks]."""
    if bits == 8:
        return torch.ones_like(row_tiers, dtype=torch.int8)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1) / (LEAST_4 * scales[:, None])
    best, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for factor in STEP_FACTORS:
        multiples = (largest * factor).round().clamp(-LARGEST_8, LARGEST_8)
        # Where even the least step is too large, all codes are zero.
        multiples = torch.where(multiples == 0, 1.0, multiples)
        steps = (multiples * scales[:, None])[..., None]
        lost = (to_codes(blocks, steps, row_tiers[..., None], bits) * steps - blocks).square().sum(-1)
        best, least = torch.where(lost < least, multiples, best), torch.minimum(lost, least)
    return torch.where(row_tiers == Tier.TOP_K, float(TOP_K_MULTIPLE), best).to(torch.int8)


def to_codes(weight: Tensor, steps: Tensor, row_tiers: Tensor, bits: int) -> Tensor:
    """The nearest code of each weight, int8; steps, multiple * scale, and tiers may be one for several."""
    low, high = _limits(row_tiers, bits)
    return torch.maximum(torch.minimum((weight / steps).round(), high), low).to(torch.int8)


def _limits(row_tiers: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The least and the largest code there are, shape of the tiers."""
    wide = (row_tiers == Tier.TOP_K) | (bits == 8)
    return torch.where(wide, -LARGEST_8, LEAST_4), torch.where(wide, LARGEST_8, -LEAST_4 - 1)
