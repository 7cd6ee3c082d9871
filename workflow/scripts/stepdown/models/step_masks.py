"""What must stay zero in a step's checkpoint: by its tier map, or by the report of a one-shot run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..tensors.tiers import keep_mask
from . import pruning_reports, tier_maps
from .checkpoint import Checkpoint


@dataclass(frozen=True)
class StepMasks:
    """matrices: the pruned ones, by name in the checkpoint; iteration: of the step, 1 for a one-shot run;
    keep: (name, weight [out, in]) -> which of its weights are free, bool [out, in].
    """

    matrices: tuple[str, ...]
    iteration: int
    base_model: str
    keep: Callable[[str, Tensor], Tensor]

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint with these masks says of itself."""
        return {"base_model": self.base_model, "iteration": str(self.iteration)}


def read_step_masks(path: Path, checkpoint: Checkpoint) -> StepMasks:
    """Read a tier map or a report (.json); raises `UserError` unless it belongs to the checkpoint."""
    if path.suffix == ".json":
        report = pruning_reports.read_report(path)
        pruning_reports.check_same_model(report, path, checkpoint)
        return StepMasks(
            tuple(report["matrices"]), report["iteration"], report["base_model"], lambda name, weight: weight != 0
        )
    tier_map = tier_maps.read_tier_map(path)
    tier_maps.check_same_model(tier_map, path, checkpoint)

    def keep(name: str, weight: Tensor) -> Tensor:
        return keep_mask(weight, tier_map.tiers[name], tier_map.block_size)

    return StepMasks(tuple(tier_map.tiers), tier_map.iteration, tier_map.base_model, keep)
