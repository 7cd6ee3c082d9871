"""The three tiers and the steps between them: Dense -> 2:4 -> TopK, never back.

A tier map is uint8 [block rows, block cols] with a `Tier` per block.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from fractions import Fraction

import torch
from torch import Tensor

from .blocks import entries_per_block, expand_blocks, gather_blocks, pad_columns, pad_to_blocks, scatter_blocks_
from .masks import keep_n_of_m, keep_top_k
from .saliency import magnitude

# As many as keep the temporaries of 16 x 16 blocks at 2 MB.
BLOCKS_AT_ONCE = 2048
DEAD_NORM = 1e-30


class Tier(IntEnum):
    DENSE = 0
    TWO_FOUR = 1
    TOP_K = 2


# The schedule's and every report's name of a tier.
TIER_NAMES = {Tier.DENSE: "dense", Tier.TWO_FOUR: "mid_2_4", Tier.TOP_K: "topk"}


def exact_shares(shares: Sequence[str | float]) -> list[Fraction]:
    """Shares as they were written ("0.35" is 35/100, not the float beside it), scaled to sum to exactly 1."""
    fractions = [Fraction(str(share)) for share in shares]
    return [fraction / sum(fractions) for fraction in fractions]


def tier_counts(shares: Sequence[str | float], blocks: int) -> tuple[int, ...]:
    """Blocks per tier by largest remainder: exact, summing to `blocks`; of equal remainders the first tier wins."""
    quotas = [share * blocks for share in exact_shares(shares)]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda tier: counts[tier] - quotas[tier])
    for tier in by_remainder[: blocks - sum(counts)]:
        counts[tier] += 1
    return tuple(counts)


def count_tiers(tier_map: Tensor) -> tuple[int, int, int]:
    """Blocks of a map that are Dense, 2:4 and TopK."""
    dense, two_four, top_k = torch.bincount(tier_map.flatten().int(), minlength=len(Tier)).tolist()
    return dense, two_four, top_k


def step_down(tier_map: Tensor, scores: Tensor, tier: Tier, count: int) -> Tensor:
    """A new map in which the `count` lowest-scoring blocks of `tier` stand one tier lower; ties go by position.

    tier_map: uint8 [block rows, block cols]; scores: float32 [blocks of `tier`], in the map's order. A `count` below 1
    changes nothing.
    """
    stepped = tier_map.clone()
    if count > 0:
        lowest = keep_top_k(-scores[None], torch.tensor([count], device=scores.device))[0]
        stepped[stepped == tier] += lowest.to(torch.uint8)
    return stepped


def degrade_dense_to_two_four(
    tier_maps: Mapping[str, Tensor], scores: Mapping[str, Tensor], shares: Sequence[str | float]
) -> dict[str, Tensor]:
    """Stage 1: the lowest Dense blocks become 2:4 until the Dense share is met; returns the new maps.

    tier_maps: of the matrices that meet the shares together, one or all of a model; scores: of the Dense blocks of
    each, in its map's order. Weights are not needed: what a 2:4 block keeps follows from them and the calibration.
    Where rounding would have a share rise from one row of a schedule to the next, the maps stay: a block never goes
    up.
    """
    found = count_tiers(flatten_maps(tier_maps))
    dense, _, _ = tier_counts(shares, sum(found))
    return step_down_together(tier_maps, scores, Tier.DENSE, found[Tier.DENSE] - dense)


def degrade_two_four_to_top_k(
    tier_maps: Mapping[str, Tensor], scores: Mapping[str, Tensor], shares: Sequence[str | float]
) -> dict[str, Tensor]:
    """Stage 2: the lowest 2:4 blocks become TopK until the TopK share is met; as `degrade_dense_to_two_four`.

    scores: of the 2:4 blocks, of what is left in them.
    """
    found = count_tiers(flatten_maps(tier_maps))
    _, _, top_k = tier_counts(shares, sum(found))
    return step_down_together(tier_maps, scores, Tier.TWO_FOUR, top_k - found[Tier.TOP_K])


def step_down_together(
    tier_maps: Mapping[str, Tensor], scores: Mapping[str, Tensor], tier: Tier, count: int
) -> dict[str, Tensor]:
    """`step_down` of several maps as if they were one: `count` blocks in all, wherever they score lowest."""
    stepped = step_down(flatten_maps(tier_maps), torch.cat([scores[name] for name in tier_maps]), tier, count)
    parts = stepped.split([tiers.numel() for tiers in tier_maps.values()])
    return {name: part.view_as(tiers) for (name, tiers), part in zip(tier_maps.items(), parts, strict=True)}


def flatten_maps(tier_maps: Mapping[str, Tensor]) -> Tensor:
    """Several maps as one: uint8 [blocks]."""
    return torch.cat([tiers.flatten() for tiers in tier_maps.values()])


def prune_two_four_(
    weight: Tensor, squared_norms: Tensor, chosen: Tensor, block_size: int, selection: str = "wanda"
) -> None:
    """Keep the 2 of largest metric of each 4 consecutive inputs in the chosen blocks.

    weight: [out, in], in place; squared_norms: [in]; chosen: bool [block rows, block cols].
    """
    _prune_blocks_(weight, squared_norms, chosen, block_size, selection, lambda m, _: keep_n_of_m(m, 2, 4))


def prune_top_k_(
    weight: Tensor, squared_norms: Tensor, chosen: Tensor, block_size: int, k: int, selection: str = "wanda"
) -> None:
    """Keep the k of largest metric in each chosen block (edge blocks: in proportion to their real entries).

    weight: [out, in], in place; squared_norms: [in]; chosen: bool [block rows, block cols].
    """

    def keep(metric: Tensor, entries: Tensor) -> Tensor:
        return keep_top_k(metric.flatten(1), kept_entries(entries, block_size, k)).view_as(metric)

    _prune_blocks_(weight, squared_norms, chosen, block_size, selection, keep)


def kept_entries(entries: Tensor, block_size: int, k: int) -> Tensor:
    """What a TopK block of so many real entries keeps: ceil(k * entries / block_size**2), int64, shape of `entries`."""
    return -(-k * entries // block_size**2)


def keep_mask(weight: Tensor, tier_map: Tensor, block_size: int, first: int = 0) -> Tensor:
    """The mask of a checkpoint, bool [out, in]: Dense blocks are free, elsewhere what is not zero is kept.

    first: which row of its matrix is the first of the weight.
    """
    row, above = divmod(first, block_size)
    rows, columns = weight.shape
    dense = tier_map[row:].to(weight.device) == Tier.DENSE
    dense = expand_blocks(dense, (above + rows, columns), block_size)[above:]
    return dense | (weight != 0)


def _prune_blocks_(
    weight: Tensor,
    squared_norms: Tensor,
    chosen: Tensor,
    block_size: int,
    selection: str,
    keep: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Zero what `keep` (metric [n, b, b], real entries [n] -> bool [n, b, b]) does not keep.

    Works through the chosen blocks a few thousand at a time: the temporaries stay small enough to be reused.
    """
    padded = pad_to_blocks(weight, block_size)
    ragged = padded is not weight
    # A dead input's norm is lifted off zero: its weights rank below all others, but above what is pruned already.
    norms = pad_columns(squared_norms.sqrt().clamp(min=DEAD_NORM), block_size).view(-1, 1, block_size)
    entries = entries_per_block(tuple(weight.shape), block_size, weight.device)[chosen]
    for index, real in zip(chosen.nonzero().split(BLOCKS_AT_ONCE), entries.split(BLOCKS_AT_ONCE), strict=True):
        blocks = gather_blocks(padded, index, block_size)
        metric = magnitude(blocks)
        if selection == "wanda":
            metric *= norms[index[:, 1]]
        if ragged:
            metric = metric.where(_inside(index, tuple(weight.shape), block_size), -torch.inf)
        # A product with bytes is many times as fast as a masked fill; adding zero turns its -0.0 into 0.0.
        kept = keep(metric, real).view(torch.uint8)
        scatter_blocks_(padded, index, blocks.mul_(kept).add_(0.0))
    if ragged:
        weight.copy_(padded[: weight.shape[0], : weight.shape[1]])


def _inside(index: Tensor, shape: tuple[int, int], block_size: int) -> Tensor:
    """Which entries of the blocks at `index` lie inside a matrix of `shape`: bool [n, b, b]."""
    offsets = torch.arange(block_size, device=index.device)
    rows, columns = (index[:, axis, None] * block_size + offsets < shape[axis] for axis in (0, 1))
    return rows[:, :, None] & columns[:, None, :]


def violations(weight: Tensor, tier_map: Tensor, block_size: int, k: int) -> int:
    """Blocks of a weight [out, in] that hold more nonzero weights than their tier allows.

    2:4: two of each four consecutive inputs, ceil(r / 2) of a ragged tail of r; TopK: `kept_entries` in all.
    """
    shape = tuple(weight.shape)
    present = pad_to_blocks((weight != 0).to(torch.uint8), block_size).unflatten(0, (-1, block_size))
    groups = present.unflatten(2, (-1, 4)).sum(-1, dtype=torch.uint8)
    widths = pad_columns(present.new_ones(shape[1]), block_size).view(-1, 4).sum(-1)
    crowded = (groups > (widths + 1) // 2).any(1).unflatten(1, (-1, block_size // 4)).any(-1)
    counts = groups.sum(1).unflatten(1, (-1, block_size // 4)).sum(-1)
    overfull = counts > kept_entries(entries_per_block(shape, block_size, weight.device), block_size, k)
    broken = ((tier_map == Tier.TWO_FOUR) & crowded) | ((tier_map == Tier.TOP_K) & overfull)
    return int(broken.sum())
