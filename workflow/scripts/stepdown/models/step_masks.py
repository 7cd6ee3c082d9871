"""What must stay zero in a step's checkpoint: by its tier map, or by the report of a one-shot run."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..tensors.tiers import keep_mask
from . import pruning_reports, tier_maps
from .checkpoint import Checkpoint


@dataclass(frozen=True)
class StepMasks:
    """matrices: the pruned ones, by name in the checkpoint; iteration: of the step, 1 for a one-shot run;
    keep: (name, weight [rows, in], first=0) -> which of its weights are free, bool [rows, in]; first: of its rows in
    the matrix; tier_map: where it is what says so.
    """

    matrices: tuple[str, ...]
    iteration: int
    base_model: str
    keep: Callable[..., Tensor]
    tier_map: tier_maps.TierMap | None = None

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
            tuple(report["matrices"]),
            report["iteration"],
            report["base_model"],
            lambda name, weight, first=0: weight != 0,
        )
    tier_map = tier_maps.read_tier_map(path)
    tier_maps.check_same_model(tier_map, path, checkpoint)

    def keep(name: str, weight: Tensor, first: int = 0) -> Tensor:
        return keep_mask(weight, tier_map.tiers[name], tier_map.block_size, first)

    return StepMasks(tuple(tier_map.tiers), tier_map.iteration, tier_map.base_model, keep, tier_map)


class StoredMasks(Mapping[str, Tensor]):
    """The masks of a step, bool [out, in] by the model's own names of its linears: each is computed when it is asked
    for, from the weights of the checkpoint, so that one at a time is in memory."""

    def __init__(self, step: StepMasks, checkpoint: Checkpoint, own: Mapping[str, str], rows: Callable[[int], slice]):
        """own: name of a matrix in the checkpoint -> the model's own; rows: of so many, which are asked for."""
        self._step, self._checkpoint, self._rows = step, checkpoint, rows
        self._stored = {own[name]: name for name in step.matrices}

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        rows = self._rows(self._checkpoint.shape(f"{stored}.weight")[0])
        return self._step.keep(stored, self._checkpoint.rows(f"{stored}.weight", rows), rows.start)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
