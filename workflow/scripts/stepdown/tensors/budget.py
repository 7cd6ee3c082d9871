"""Which blocks stand on which tier where they spare so much together, at least total cost."""

import torch
from torch import Tensor

from .blocks import entries_per_block, grid_shape
from .tiers import kept_entries

# A step of a ragged block may spare nothing; it is then the last to be taken, or the first where it costs nothing.
SPARES_NOTHING = 1e-30


def tiers_within(costs: Tensor, spared: Tensor, wanted: float) -> Tensor:
    """The tiers of blocks that spare `wanted` or more together: uint8 [blocks].

    costs: [blocks, 2], of the step from Dense to 2:4, and of that from 2:4 to TopK; spared: the same shape. Steps are
    taken in the order of what they cost for what they spare, two at once where the second costs less so than the first:
    the Lagrangian relaxation of a knapsack (Everett 1963). No other tiers that spare as much as these cost less; what
    these spare beyond `wanted` is of their last step. Raises `ValueError` where all steps spare less than is wanted.
    """
    costs, spared = costs.double(), spared.double()
    prices = costs / spared.clamp(min=SPARES_NOTHING)
    at_once = prices[:, 1] < prices[:, 0]
    prices[at_once] = (costs.sum(1) / spared.sum(1).clamp(min=SPARES_NOTHING))[at_once, None]
    order = prices.flatten().argsort(stable=True)
    total = spared.flatten()[order].cumsum(0)
    if wanted > total[-1]:
        raise ValueError(f"all blocks as TopK spare {total[-1]:g} of {wanted:g}")
    taken = torch.zeros(costs.numel(), dtype=torch.uint8)
    if wanted > 0:
        taken[order[: int((total < wanted).sum()) + 1]] = 1
    first, second = taken.view(-1, 2).unbind(1)
    return torch.where(at_once, 2 * first, first + second)


def zeros_by_step(shape: tuple[int, int], block_size: int, k: int) -> Tensor:
    """Zeros that each block of a matrix [out, in] gains by its steps to 2:4 and on to TopK: int64 [blocks, 2]."""
    entries, columns = entries_per_block(shape, block_size), grid_shape(shape, block_size)[1]
    widths = torch.full((columns,), block_size)
    widths[-1] -= -shape[1] % block_size
    two_four = entries // widths * (widths // 4 * 2 + (widths % 4 + 1) // 2)
    top_k = kept_entries(entries, block_size, k)
    return torch.stack([entries - two_four, two_four - top_k], dim=-1).flatten(0, 1)
