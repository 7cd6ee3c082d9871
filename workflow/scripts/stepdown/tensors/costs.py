"""What it costs a block to step down: by how much the loss of the model rises without what the block loses.

To second order, and with the Fisher information in place of the Hessian, dropping the weights w of a linear raises the
loss by 1/2 w' F w. Of F only the diagonal of its Kronecker factors is kept (Martens & Grosse 2015),

    cost = sum over the dropped weights of w_ij^2 s_j g_i,

s_j: the squared inputs, g_i: the squared gradients of the outputs, summed over the tokens of the calibration text. With
g the costs of all matrices are in one unit, and their blocks compare; without it they compare inside a matrix only.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .blocks import entries_per_block, gather_blocks, pad_columns, pad_to_blocks
from .saliency import STRIP_ENTRIES
from .tiers import BLOCKS_AT_ONCE, kept_entries


def two_four_costs(weight: Tensor, squared_norms: Tensor, squared_gradients: Tensor, block_size: int) -> Tensor:
    """What each block loses as 2:4, the two least of each 4 consecutive inputs of a row: float32 [block rows, cols].

    weight: [out, in]; squared_norms: s [in]; squared_gradients: g [out]. Of a ragged tail of r inputs ceil(r / 2) stay.
    """
    strip = block_size * max(1, STRIP_ENTRIES // (block_size * weight.shape[1]))
    roots, groups = squared_norms.sqrt(), block_size // 4
    costs = []
    for rows, gradients in zip(weight.split(strip), squared_gradients.split(strip), strict=True):
        lost = _two_least_of_four((rows.float() * roots).square_()) * gradients[:, None]
        lost = pad(lost, (0, -lost.shape[1] % groups, 0, -len(lost) % block_size))
        costs.append(lost.unflatten(0, (-1, block_size)).unflatten(2, (-1, groups)).sum((1, 3)))
    return torch.cat(costs)


def top_k_costs(
    weight: Tensor, squared_norms: Tensor, squared_gradients: Tensor, chosen: Tensor, block_size: int, k: int
) -> Tensor:
    """What the chosen blocks still lose as TopK, all but the k that cost most: float32 [chosen], in the map's order.

    weight: [out, in], its 2:4 blocks pruned; squared_norms: s [in]; squared_gradients: g [out]; chosen: bool
    [block rows, block cols].
    """
    if not chosen.any():
        return torch.empty(0, device=weight.device)
    padded = pad_to_blocks(weight, block_size)
    inputs = pad_columns(squared_norms, block_size).view(-1, 1, block_size)
    outputs = pad_columns(squared_gradients, block_size).view(-1, block_size, 1)
    kept = kept_entries(entries_per_block(tuple(weight.shape), block_size, weight.device)[chosen], block_size, k)
    costs = []
    for index, stay in zip(chosen.nonzero().split(BLOCKS_AT_ONCE), kept.split(BLOCKS_AT_ONCE), strict=True):
        cost = gather_blocks(padded, index, block_size).float().square_() * inputs[index[:, 1]] * outputs[index[:, 0]]
        largest = cost.flatten(1).topk(int(stay.max())).values.cumsum(1)
        costs.append(cost.sum((1, 2)) - largest.gather(1, stay[:, None] - 1)[:, 0])
    return torch.cat(costs)


def _two_least_of_four(values: Tensor) -> Tensor:
    """Per 4 consecutive inputs of a row, the sum of the two least: [out, in] -> [out, groups]; values: 0 or more."""
    tail = values.shape[1] % 4
    if tail:
        # Zeros are among the least, so that 3 inputs lose one and 1 loses none; 2 lose one, beside one without end.
        values = pad(values, (0, 4 - tail))
        if tail == 2:
            values[:, -1] = torch.inf
    a, b, c, d = values.unflatten(1, (-1, 4)).unbind(-1)
    low, high, other_low, other_high = (
        torch.minimum(a, b),
        torch.maximum(a, b),
        torch.minimum(c, d),
        torch.maximum(c, d),
    )
    second = torch.minimum(torch.maximum(low, other_low), torch.minimum(high, other_high))
    return torch.minimum(low, other_low).add_(second)
