"""The tier map file: on which tier each block of each linear stands, of which model, iteration and block size.

A safetensors file with one uint8 tensor [block rows, block cols] per linear and everything else in its metadata.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..tensors.blocks import grid_shape
from ..tensors.tiers import TIER_NAMES, Tier, count_tiers, violations
from .checkpoint import Checkpoint, load_tensors, save_tensors

FORMAT = "stepdown tier map 1"


@dataclass(frozen=True)
class TierMap:
    """Tiers of every prunable linear of a model.

    tiers: name of a linear -> uint8 [block rows, block cols]; shapes: the same names -> (out, in);
    base_model: sha256 of the base model's tensors; shares: Dense, 2:4 and TopK asked for, as the schedule has them;
    cost: what blocks were chosen by, and shared_over: where the shares are met, both as the configuration has them.
    """

    tiers: dict[str, Tensor]
    shapes: dict[str, tuple[int, int]]
    block_size: int
    k: int
    base_model: str
    iteration: int
    shares: tuple[str, str, str]
    cost: str = "wanda"
    shared_over: str = "matrix"

    def with_tiers(self, tiers: dict[str, Tensor]) -> "TierMap":
        return replace(self, tiers=tiers)

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint with this map says of itself."""
        return {"base_model": self.base_model, "iteration": str(self.iteration)}


def dense_tier_map(shapes: dict[str, tuple[int, int]], block_size: int, k: int, base_model: str) -> TierMap:
    """The map of an unpruned model: iteration 0, every block Dense."""
    tiers = {
        name: torch.full(grid_shape(shape, block_size), Tier.DENSE, dtype=torch.uint8) for name, shape in shapes.items()
    }
    return TierMap(tiers, shapes, block_size, k, base_model, iteration=0, shares=("1", "0", "0"))


def write_tier_map(tier_map: TierMap, path: Path | str) -> None:
    """Write the file atomically."""
    metadata = {
        "format": FORMAT,
        "base_model": tier_map.base_model,
        "iteration": str(tier_map.iteration),
        "block_size": str(tier_map.block_size),
        "k": str(tier_map.k),
        "cost": tier_map.cost,
        "shared_over": tier_map.shared_over,
        **dict(zip(TIER_NAMES.values(), tier_map.shares, strict=True)),
        "shapes": json.dumps(tier_map.shapes, sort_keys=True),
    }
    save_tensors(tier_map.tiers, path, metadata)


def read_tier_map(path: Path | str) -> TierMap:
    """Read a file; raises `UserError` when it is no tier map or contradicts itself."""
    tiers, metadata = load_tensors(path)
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "none")
        raise UserError(f"{path}: not a tier map of this version (format {found!r}, expected {FORMAT!r})")
    tier_map = TierMap(
        tiers=tiers,
        shapes={name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()},
        block_size=int(metadata["block_size"]),
        k=int(metadata["k"]),
        base_model=metadata["base_model"],
        cost=metadata.get("cost", "wanda"),
        shared_over=metadata.get("shared_over", "matrix"),
        iteration=int(metadata["iteration"]),
        shares=tuple(metadata[name] for name in TIER_NAMES.values()),
    )
    _check_grids(tier_map, path)
    return tier_map


def check_same_model(
    tier_map: TierMap, map_path: Path | str, checkpoint: Checkpoint, iterations_ahead: int = 0
) -> None:
    """Raise `UserError` unless the map belongs to the checkpoint: same base model, same iteration, same matrices.

    The map of stage 1 is one iteration ahead of the checkpoint it is for.
    """
    identity = checkpoint.identity()
    if tier_map.base_model != identity["base_model"]:
        raise UserError(
            f"{map_path}: tier map of another model ({tier_map.base_model[:12]}) than {checkpoint.folder}"
            f" ({identity['base_model'][:12]}); give the map that was made with this checkpoint"
        )
    if tier_map.iteration != int(identity["iteration"]) + iterations_ahead:
        raise UserError(
            f"{map_path}: tier map of iteration {tier_map.iteration}, but {checkpoint.folder} is of iteration"
            f" {identity['iteration']}; give the map that was made with this checkpoint"
        )
    for name, shape in tier_map.shapes.items():
        weight = f"{name}.weight"
        found = checkpoint.shape(weight) if weight in checkpoint else None
        if found != shape:
            raise UserError(f"{map_path}: {name} is {list(shape)} in the tier map, {found} in {checkpoint.folder}")


def check_zeros(tier_map: TierMap, name: str, weight: Tensor, folder: Path | str) -> None:
    """Raise `UserError` unless the weight [out, in] is as sparse as its tiers say.

    Every group of a 2:4 block may hold 2 weights at most, a TopK block no more than its share of k.
    """
    broken = violations(weight, tier_map.tiers[name], tier_map.block_size, tier_map.k)
    if broken:
        raise UserError(
            f"{folder}: {name}: {broken} blocks hold more weights than their tier allows; the tier map is not of this"
            " checkpoint, or pruned weights were revived"
        )


def block_counts(tier_map: TierMap) -> dict[str, dict[str, int]]:
    """Blocks per tier of every linear, by the tiers' names in the schedule."""
    return {
        name: dict(zip(TIER_NAMES.values(), count_tiers(tiers), strict=True)) for name, tiers in tier_map.tiers.items()
    }


def tier_shares(counts: Iterable[dict[str, int]]) -> dict[str, float]:
    """Shares of the blocks of all linears together."""
    totals = dict.fromkeys(TIER_NAMES.values(), 0)
    for linear in counts:
        for tier, blocks in linear.items():
            totals[tier] += blocks
    blocks = sum(totals.values())
    return {tier: total / blocks for tier, total in totals.items()}


def _check_grids(tier_map: TierMap, path: Path | str) -> None:
    for name, tiers in tier_map.tiers.items():
        grid = grid_shape(tier_map.shapes[name], tier_map.block_size)
        if tuple(tiers.shape) != grid or tiers.dtype != torch.uint8 or int(tiers.max()) > max(Tier):
            raise UserError(
                f"{path}: {name}: {list(tiers.shape)} blocks up to tier {int(tiers.max())}, expected {list(grid)}"
                f" blocks of size {tier_map.block_size} up to tier {int(max(Tier))}; delete it and run again"
            )
