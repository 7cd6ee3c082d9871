"""Weights as whole numbers: round to nearest, and GPTQ, which makes up for the rounding (Frantar et al. 2022).

A group of weights of one row shares a scale s and a zero point z; a code q stands for s * (q - z). Zero is always one
of the values, so that what a mask pruned stays exactly zero. GPTQ is the optimal brain surgeon of `sparsegpt.py` with
another way for a column to settle: it is rounded, and not pruned.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan.compressions import Quantisation
from .sparsegpt import Columns, Rounding, settle_columns

# Columns GPTQ settles between two large products where no group asks for fewer.
COLUMNS = 128


@dataclass(frozen=True)
class Quantised:
    """codes q: int8 [out, in]; scales s: [out, groups], in the type of the model; zeros z: int8 [out, groups]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, s * (q - z): [out, in] in the type of the scales."""
        groups = self.scales.shape[1]
        levels = (self.codes.short().unflatten(1, (groups, -1)) - self.zeros[..., None]).to(self.scales.dtype)
        return (levels * self.scales[..., None]).flatten(1)


def round_to_nearest(weight: Tensor, asked: Quantisation, dtype: torch.dtype) -> Quantised:
    """Each weight [out, in] by itself; dtype: of the scales."""
    groups = weight.float().unflatten(1, (-1, asked.group_size or weight.shape[1]))
    scales, zeros = fit_grid(groups, asked, dtype)
    codes = to_codes(groups, scales[..., None], zeros[..., None], asked.bits)
    return Quantised(codes.flatten(1), scales, zeros)


def gptq(weight: Tensor, hessian: Tensor, asked: Quantisation, dtype: torch.dtype, name: str = "matrix") -> Quantised:
    """Rounded column by column, those to come making up for it; what is zero in `weight` [out, in] stays zero.

    hessian: [in, in], as `statistics.accumulating_hessians` has it; computed in its type. The grid of a group fits what
    its weights have been updated to when its turn comes. Raises `UserError` as `sparsegpt.factorise` does.
    """
    rows, inputs = weight.shape
    size = asked.group_size or inputs
    keep = (weight != 0).T.contiguous()
    codes = torch.empty(inputs, rows, dtype=torch.int8, device=weight.device)
    scales = torch.empty(inputs // size, rows, dtype=dtype, device=weight.device)
    zeros = torch.empty_like(scales, dtype=torch.int8)

    def settle(part: slice, columns: Columns) -> None:
        group = part.start // size
        if part.start % size == 0:
            # A group's columns, or all of them; masked ones are no part of it.
            all_of_it = slice(part.start, part.start + size)
            updated = columns.updated(all_of_it) if size < inputs else columns.weight.T
            weights = updated * keep[all_of_it].T
            scales[group], zeros[group] = fit_grid(weights, asked, dtype)
        low, high = (limit - zeros[group].float() for limit in _limits(asked.bits))
        rounding = Rounding(scales[group].to(columns.weight.dtype), low, high)
        codes[part] = columns.settle(part, keep[part], rounding) + zeros[group]

    settle_columns(weight, hessian, asked.group_size or COLUMNS, settle, name)
    return Quantised(codes.T.contiguous(), scales.T.contiguous(), zeros.T.contiguous())


def fit_grid(weight: Tensor, asked: Quantisation, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point over the last axis: the range from the least weight to the largest in 2^bits steps; with
    `symmetric`, from minus the largest magnitude to plus that, and the zero point 0. A group of zeros gets the scale 1.
    """
    steps = 2**asked.bits - 1
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    if asked.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scales = ((high - low) / steps).to(dtype)
    scales.masked_fill_(scales == 0, 1)
    if asked.symmetric:
        return scales, torch.zeros_like(scales, dtype=torch.int8)
    return scales, (torch.round(-low / scales.float()) - 2 ** (asked.bits - 1)).clamp_(*_limits(asked.bits)).to(
        torch.int8
    )


def to_codes(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The nearest code of each weight: int8."""
    return (torch.round(weight / scales.float()) + zeros).clamp_(*_limits(bits)).to(torch.int8)


def _limits(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
