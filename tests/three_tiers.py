"""Matrices and models in three tiers, by magnitude and at random."""

from pathlib import Path

import torch
from torch import Tensor

from stepdown.models.checkpoint import Checkpoint, rewrite_checkpoint
from stepdown.models.decoder import open_decoder
from stepdown.models.tier_maps import TierMap, dense_tier_map, write_tier_map
from stepdown.packed.folder import write_packed
from stepdown.tensors.blocks import grid_shape
from stepdown.tensors.tiers import Tier, prune_top_k_, prune_two_four_, tier_counts

SHARES = ("0.35", "0.45", "0.20")


def tiers_by_shares(shape: tuple[int, int], shares: tuple[str, str, str], seed: int = 0) -> Tensor:
    """A tier map with so much of each tier, in random places."""
    rows, columns = grid_shape(shape, 16)
    counts = torch.tensor(tier_counts(shares, rows * columns))
    tiers = torch.repeat_interleave(torch.tensor(list(Tier), dtype=torch.uint8), counts)
    return tiers[torch.randperm(len(tiers), generator=torch.Generator().manual_seed(seed))].view(rows, columns)


def random_three_tier(
    shape: tuple[int, int],
    k: int,
    seed: int = 0,
    tiers: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """A random weight [out, in] pruned as its tiers say, and the tiers; without tiers any, strips of one among them."""
    generator = torch.Generator().manual_seed(seed)
    if tiers is None:
        rows, columns = grid_shape(shape, 16)
        tiers = torch.randint(0, 3, (rows, columns), generator=generator, dtype=torch.uint8)
        one_tier = torch.rand(rows, generator=generator) < 0.3
        tiers[one_tier] = tiers[one_tier][:, :1]
    weight = (torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(dtype)
    prune_blocks_(weight, tiers, k)
    return weight, tiers


def prune_blocks_(weight: Tensor, tiers: Tensor, k: int) -> None:
    """Prune a weight [out, in] by magnitude as its tiers say, in place."""
    norms = torch.ones(weight.shape[1], device=weight.device)
    prune_two_four_(weight, norms, tiers == Tier.TWO_FOUR, 16)
    prune_top_k_(weight, norms, tiers == Tier.TOP_K, 16, k)


def prune_by_magnitude(model: Path, folder: Path) -> tuple[Checkpoint, TierMap]:
    """A checkpoint of a model with random tiers at the default schedule's last shares, and its map."""
    decoder = open_decoder(model, "cpu")
    checkpoint = decoder.checkpoint
    shapes = {name: checkpoint.shape(f"{name}.weight") for name in decoder.linears()}
    identity = checkpoint.identity()
    tier_map = dense_tier_map(shapes, 16, 10, identity["base_model"])
    tier_map = tier_map.with_tiers({name: tiers_by_shares(shape, SHARES) for name, shape in shapes.items()})

    def prune(shard):
        for name in (key.removesuffix(".weight") for key in shard):
            if name in shapes:
                prune_blocks_(shard[f"{name}.weight"], tier_map.tiers[name], 10)

    rewrite_checkpoint(checkpoint, folder / "model", prune, identity)
    write_tier_map(tier_map, folder / "tier_map.safetensors")
    return Checkpoint(folder / "model"), tier_map


def pack_model(model: Path, folder: Path, values: str = "bf16") -> tuple[Checkpoint, TierMap, float]:
    """The same and, in `folder`/packed, the packed model; last, the bytes of its matrices per weight."""
    checkpoint, tier_map = prune_by_magnitude(model, folder)
    size = write_packed(checkpoint, tier_map, folder / "tier_map.safetensors", folder / "packed", values)
    return checkpoint, tier_map, size
