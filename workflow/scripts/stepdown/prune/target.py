"""The shares of the tiers that follow from a budget and from what it costs the blocks of a model to step down."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from ..errors import UserError
from ..models.checkpoint import Checkpoint
from ..models.tier_maps import TierMap
from ..packed.format import packed_bytes
from ..tensors.budget import tiers_within, zeros_by_step
from ..tensors.costs import top_k_costs, two_four_costs
from ..tensors.tiers import TIER_NAMES, Tier, count_tiers, prune_two_four_
from .calibration import Calibration


def shares_for(
    target: Mapping[str, str | float],
    checkpoint: Checkpoint,
    tier_map: TierMap,
    calibration: Calibration,
    selection: str,
    device: torch.device,
) -> dict[str, str]:
    """Shares of the blocks on each tier, exact fractions such as "7/20", that meet a target at least total cost.

    target: {"bytes": share}, packed in bfloat16 against dense bfloat16, or {"sparsity": share of zeros}; tier_map: of
    the base model. One matrix is in memory at a time. Raises `UserError` for what even TopK everywhere does not meet.
    """
    costs = [_step_costs(name, checkpoint, tier_map, calibration, selection, device) for name in tier_map.tiers]
    ((key, share),) = target.items()
    weights = sum(rows * columns for rows, columns in tier_map.shapes.values())
    if key == "bytes":
        dense, two_four, top_k = (packed_bytes(torch.tensor([tier]), tier_map.k) for tier in Tier)
        spared = [torch.tensor([dense - two_four, two_four - top_k]).expand_as(cost) for cost in costs]
        wanted = dense * sum(map(len, costs)) - math.floor(Fraction(str(share)) * 2 * weights)
    else:
        spared = [zeros_by_step(shape, tier_map.block_size, tier_map.k) for shape in tier_map.shapes.values()]
        wanted = math.ceil(Fraction(str(share)) * weights)
    try:
        counts = count_tiers(tiers_within(torch.cat(costs), torch.cat(spared), wanted))
    except ValueError as error:
        raise UserError(f"target {key} {float(share):g} cannot be met: {error}; ask for less") from None
    return {name: str(Fraction(count, sum(counts))) for name, count in zip(TIER_NAMES.values(), counts, strict=True)}


def in_proportion(shares: Sequence[str], last: Sequence[str], target: Sequence[str]) -> tuple[str, str, str]:
    """The shares (dense, mid_2_4, topk) of a row where those of the last row become `target`: as much of both ways,
    away from Dense and on to TopK, as the schedule has gone by then. Exact fractions as text."""
    parts = []
    for gone, whole in zip(_ways(shares), _ways(last), strict=True):
        # A schedule that never goes one of the ways does not say when: it is gone in the last row.
        parts.append(gone / whole if whole else Fraction(shares == last))
    away, on = (part * whole for part, whole in zip(parts, _ways(target), strict=True))
    # A target may want more on TopK, early in the schedule, than has left Dense by then.
    on = min(on, away)
    return str(1 - away), str(away - on), str(on)


def _ways(shares: Sequence[str]) -> tuple[Fraction, Fraction]:
    """How much has left Dense, and how much has come to TopK."""
    dense, _, top_k = map(Fraction, shares)
    return 1 - dense, top_k


def _step_costs(
    name: str, checkpoint: Checkpoint, tier_map: TierMap, calibration: Calibration, selection: str, device: torch.device
) -> Tensor:
    """What a matrix's Dense blocks lose as 2:4, and of what is left as TopK: float32 [blocks, 2]."""
    weight, every = checkpoint.matrix(name).to(device), torch.ones_like(tier_map.tiers[name], dtype=torch.bool)
    norms, gradients = calibration.of(name, device)
    to_two_four = two_four_costs(weight, norms, gradients, tier_map.block_size).flatten()
    prune_two_four_(weight, norms, every.to(device), tier_map.block_size, selection)
    to_top_k = top_k_costs(weight, norms, gradients, every.to(device), tier_map.block_size, tier_map.k)
    return torch.stack([to_two_four, to_top_k], dim=1).cpu()
