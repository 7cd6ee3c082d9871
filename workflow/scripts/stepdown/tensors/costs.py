"""What it costs a block to step down: by how much the loss of the model rises without what the block loses.

To second order, and with the Fisher information in place of the Hessian, dropping the weights w of a linear raises the
loss by 1/2 w' F w. Of F only the diagonal of its Kronecker factors is kept (Martens & Grosse 2015),

    cost = sum over the dropped weights of w_ij^2 s_j g_i,

s_j: the squared inputs, g_i: the squared gradients of the outputs, summed over the tokens of the calibration text. With
g the costs of all matrices are in one unit, and their blocks compare; without it they compare inside a matrix only.
"""

import numpy as np
import torch
from torch import Tensor

from .blocks import entries_per_block, gather_blocks, pad_columns, pad_to_blocks
from .tiers import BLOCKS_AT_ONCE, kept_entries

# Rows are worked through in strips of about this many entries, the temporaries of which stay in the cache.
STRIP_ENTRIES = 1 << 20


def two_four_costs(weight: Tensor, squared_norms: Tensor, squared_gradients: Tensor, block_size: int) -> Tensor:
    """What each block loses as 2:4, the two least of each 4 consecutive inputs of a row: float32 [block rows, cols].

    weight: [out, in]; squared_norms: s [in]; squared_gradients: g [out]. Of a ragged tail of r inputs ceil(r / 2) stay.
    """
    roots = pad_columns(squared_norms.sqrt(), block_size).view(-1, 2).t().contiguous()
    gradients = pad_columns(squared_gradients, block_size).view(-1, 1, block_size)
    strip = max(1, STRIP_ENTRIES // (2 * block_size * roots.shape[1]))
    buffers = roots.new_empty(4, strip * block_size, roots.shape[1])
    costs = []
    for rows, outputs in zip(weight.split(strip * block_size), gradients.split(strip), strict=True):
        padded = pad_to_blocks(rows, block_size)
        lost = _two_least_of_four(padded, roots, weight.shape[1], buffers[:, : len(padded)])
        # Rows first, in one product with g. What stands between the fours is dropped after it.
        of_block_rows = torch.bmm(outputs, lost.unflatten(0, (-1, block_size)))[:, 0]
        costs.append(of_block_rows.unflatten(1, (-1, block_size // 4, 2))[..., 0].sum(-1))
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
    least_kept = block_size**2 - int(kept.max())
    places = torch.arange(least_kept, block_size**2, device=weight.device)
    costs = []
    for index, stay in zip(chosen.nonzero().split(BLOCKS_AT_ONCE), kept.split(BLOCKS_AT_ONCE), strict=True):
        cost = gather_blocks(padded, index, block_size).float().square_()
        cost = _ascending(cost.mul_(inputs[index[:, 1]]).mul_(outputs[index[:, 0]]).flatten(1))
        of_small_blocks = cost[:, least_kept:] * (places < block_size**2 - stay[:, None])
        costs.append(cost[:, :least_kept].sum(1) + of_small_blocks.sum(1))
    return torch.cat(costs)


def _two_least_of_four(rows: Tensor, roots: Tensor, inputs: int, buffers: Tensor) -> Tensor:
    """Per 4 consecutive inputs of a row, the sum of the two least w^2 s: [rows, in / 2], at every second place of which
    stands such a sum, and between them what means nothing.

    rows: [rows, in], `inputs` of its columns real; roots: of s, [2, in / 2], those of even inputs and of odd ones;
    buffers: float32 [4, rows, in / 2], overwritten. With the four as two pairs a, b and c, d it is

        min(a + b, c + d, min(a, b) + min(c, d)),

    of neighbours in memory, as only those are computed with vector instructions.
    """
    a, b, both, least = buffers
    _take_apart(rows, a, b)
    a.mul_(roots[0]).square_()
    b.mul_(roots[1]).square_()
    if inputs % 4 == 2:
        # Padding is zero and among the least, so that 3 inputs lose one and 1 loses none; but 2 must lose one.
        b[:, inputs // 2] = torch.inf
    torch.add(a, b, out=both)
    torch.minimum(a, b, out=least)
    # Rows in one: the last of each, beside the first of the next, is one of those that mean nothing.
    lost, across, both, least = (buffer.view(-1) for buffer in buffers.unbind())
    torch.minimum(both[:-1], both[1:], out=lost[:-1])
    torch.add(least[:-1], least[1:], out=across[:-1])
    torch.minimum(lost[:-1], across[:-1], out=lost[:-1])
    return a


def _take_apart(rows: Tensor, even: Tensor, odd: Tensor) -> None:
    """Write the even and the odd columns of rows [rows, in] to float32 [rows, in / 2]."""
    if rows.dtype == torch.bfloat16 and rows.is_contiguous():
        # Two bfloat16 are the halves of 32 bits, and each is the upper half of a float32.
        pairs = rows.view(torch.int32)
        torch.bitwise_left_shift(pairs, 16, out=even.view(torch.int32))
        torch.bitwise_and(pairs, ~0xFFFF, out=odd.view(torch.int32))
    else:
        even.copy_(rows[:, ::2])
        odd.copy_(rows[:, 1::2])


def _ascending(values: Tensor) -> Tensor:
    """Each row sorted; values: float32 [rows, entries]."""
    if values.device.type != "cpu":
        return values.sort(1).values
    # numpy sorts with vector instructions: eight times as fast as torch finds the largest ten.
    return torch.from_numpy(np.sort(values.numpy(), axis=1))
