"""Looking ahead: what the next iteration will drop fades while this one trains, so that its step down is no shock."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..models.checkpoint import Checkpoint
from ..models.tier_maps import TierMap
from ..prune.calibration import Calibration
from ..prune.stepping_down import first_stage, prune_stepped_, score_dense, second_stage


def weights_to_go(
    checkpoint: Checkpoint,
    tier_map: TierMap,
    shares: tuple[str, str, str],
    calibration: Calibration,
    selection: str,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """What a step down to `shares` would take of a checkpoint, were it taken now: each matrix's name, bool [out, in].

    tier_map, calibration: of the checkpoint, or of the model it was pruned from; one matrix is in memory at a time.
    """
    scores = {}
    for name in tier_map.tiers:
        weight = checkpoint.matrix(name).to(device)
        scores[name] = score_dense(weight, name, calibration, tier_map.block_size, tier_map.cost).cpu()
    ahead = replace(tier_map, shares=shares)
    stage_1 = ahead.with_tiers(first_stage(tier_map, scores, shares, tier_map.shared_over))
    stage_2 = ahead.with_tiers(second_stage(checkpoint, tier_map, stage_1, calibration, selection, device))
    for name in tier_map.tiers:
        weight = checkpoint.matrix(name).to(device)
        there = weight != 0
        prune_stepped_(weight, name, (tier_map, stage_1, stage_2), calibration, selection)
        yield name, (there & (weight == 0)).cpu()


def left_after(step: int, steps: int, decay: float) -> float:
    """What step number `step` of `steps` leaves of what fades: its rate rises linearly, and in the end exp(-decay) is
    left in all."""
    return math.exp(-2 * decay * step / (steps * (steps + 1)))
