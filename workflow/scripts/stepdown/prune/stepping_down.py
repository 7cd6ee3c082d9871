"""One iteration's two steps down: which blocks leave their tier, of a matrix or of the whole model.

The blocks that cost least step down. What a step costs is what the loss of the model rises by (`tensors/costs.py`) or,
as published, the mean Wanda metric of a block's weights. Stage 1 takes the cheapest Dense blocks to 2:4, stage 2 the
cheapest of all 2:4 blocks, on what is left of them, to TopK; docs/method.md tells how little finding all tiers at once
at least total cost would change.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..cli import progress
from ..models.checkpoint import Checkpoint
from ..models.tier_maps import TierMap
from ..tensors.costs import top_k_costs, two_four_costs
from ..tensors.saliency import block_scores
from ..tensors.tiers import Tier, degrade_dense_to_two_four, degrade_two_four_to_top_k, prune_top_k_, prune_two_four_
from .calibration import Calibration

COSTS = ("fisher", "wanda")
# Whose blocks meet the shares of a row together.
SHARED_OVER = ("model", "matrix")


def score_dense(weight: Tensor, name: str, calibration: Calibration, block_size: int, cost: str) -> Tensor:
    """What it costs a Dense block to become 2:4: float32 [block rows, block cols], where the weight [out, in] is."""
    norms, gradients = calibration.of(name, weight.device)
    if cost == "wanda":
        return block_scores(weight, norms, block_size)
    return two_four_costs(weight, norms, gradients, block_size)


def score_two_four(weight: Tensor, name: str, calibration: Calibration, tier_map: TierMap) -> Tensor:
    """What it costs a 2:4 block to become TopK: float32 [2:4 blocks]. weight: [out, in], pruned as the map says."""
    norms, gradients = calibration.of(name, weight.device)
    chosen = (tier_map.tiers[name] == Tier.TWO_FOUR).to(weight.device)
    if tier_map.cost == "wanda":
        return block_scores(weight, norms, tier_map.block_size)[chosen]
    return top_k_costs(weight, norms, gradients, chosen, tier_map.block_size, tier_map.k)


def first_stage(before: TierMap, scores: Mapping[str, Tensor], shares: tuple[str, str, str], shared_over: str) -> dict:
    """The maps in which the Dense share is met; scores: of all blocks, [block rows, block cols] per matrix."""
    of_dense = {name: scores[name][tiers == Tier.DENSE] for name, tiers in before.tiers.items()}
    stepped = {}
    for maps in _sharing(before.tiers, shared_over):
        stepped |= degrade_dense_to_two_four(maps, of_dense, shares)
    return stepped


def second_stage(
    checkpoint: Checkpoint,
    before: TierMap,
    stage_1: TierMap,
    calibration: Calibration,
    selection: str,
    device: torch.device,
) -> dict[str, Tensor]:
    """The maps in which the TopK share is met too; one matrix of the checkpoint, which `before` is of, in memory."""
    scores = {}
    for name in progress(stage_1.tiers, "score 2:4"):
        weight = checkpoint.matrix(name).to(device)
        prune_stepped_(weight, name, (before, stage_1, stage_1), calibration, selection)
        scores[name] = score_two_four(weight, name, calibration, stage_1).cpu()
    stepped = {}
    for maps in _sharing(stage_1.tiers, stage_1.shared_over):
        stepped |= degrade_two_four_to_top_k(maps, scores, stage_1.shares)
    return stepped


def prune_stepped_(
    weight: Tensor, name: str, maps: tuple[TierMap, TierMap, TierMap], calibration: Calibration, selection: str
) -> None:
    """Prune a matrix [out, in] in place by its maps before, after stage 1 and after stage 2."""
    before, stage_1, stage_2 = (tier_map.tiers[name].to(weight.device) for tier_map in maps)
    norms, size = calibration.of(name, weight.device)[0], maps[0].block_size
    prune_two_four_(weight, norms, stage_1 != before, size, selection)
    prune_top_k_(weight, norms, stage_2 != stage_1, size, maps[0].k, selection)


def _sharing(tier_maps: Mapping[str, Tensor], shared_over: str) -> Iterable[dict[str, Tensor]]:
    """The maps in groups, each of which meets the shares by itself."""
    return [dict(tier_maps)] if shared_over == "model" else [{name: tiers} for name, tiers in tier_maps.items()]
