"""Packing a model as whole numbers: the kept weights of each layer make up for their rounding, on text.

Each linear is first refitted, as after pruning, to what it did in the model as it came, from the inputs it is given by
what is rounded before it, and then rounded by GPTQ: together the numbers whose outputs are nearest to those of the
model (GPTAQ, arXiv 2504.02692, which does both in one pass).
"""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from ..cli import log
from ..models.checkpoint import load_tensors, save_tensors, waiting_beside
from ..models.decoder import Decoder, head_name
from ..models.layer_walk import LayerWalk
from ..models.tier_maps import TierMap, check_zeros
from ..packed.folder import HEAD_BITS, VALUES, Head, check_finite_in_bf16, check_packable, write_packed
from ..tensors.block_rounding import Rounded, round_dense, round_in_blocks
from ..tensors.least_squares import masked_least_squares
from .refit import refit_layers
from .statistics import accumulating_hessians


def pack_calibrated(
    exact: Decoder,
    rounded: Decoder,
    tier_map: TierMap,
    map_path: Path,
    windows: Tensor,
    batch_size: int,
    values: str,
    target: Path,
) -> float:
    """Write the packed folder `target` of a model, `values` of whole numbers, one decoder layer in memory at a time.

    exact, rounded: the model, opened twice: one stays as it is. windows: int64 [samples, tokens]. Returns the bytes of
    the packed matrices per weight. Raises `UserError` as `write_packed` does, and for weights that are not finite.
    """
    checkpoint = rounded.checkpoint
    check_packable(checkpoint, tier_map, map_path)
    # Also by `write_packed`, but after what takes long and would name another reason.
    for names in checkpoint.shards().values():
        check_finite_in_bf16(checkpoint.folder, checkpoint.tensors(names))
    with waiting_beside(target) as waiting:
        rounding = _Rounding(tier_map, VALUES[values], checkpoint.folder, waiting)
        for layer in refit_layers(exact, rounded, rounding.fit, windows, batch_size, rounding.fit_alone, "round"):
            walk = layer.walk
        head = _round_head(walk, len(windows))
        return write_packed(checkpoint, tier_map, map_path, target, values, rounding.read, head)


@dataclass
class _Rounding:
    """Rounds matrices, and keeps what they were rounded to in files of the folder `waiting`: layers are walked in the
    order of the model, and packed in the order of their names."""

    tier_map: TierMap
    bits: int
    folder: Path
    waiting: Path
    file_of: dict[str, Path] = field(default_factory=dict)

    def fit(self, name: str, weight: Tensor, hessian: Tensor, target: Tensor) -> Tensor:
        # In place of the target, for which there is no other use.
        wanted = target.copy_(masked_least_squares(weight, weight != 0, hessian, target))
        return self._round(name, weight, wanted, hessian)

    def fit_alone(self, name: str, weight: Tensor, hessian: Tensor | None) -> Tensor:
        if hessian is None:
            log.warning("%s saw no token of the calibration text: rounded to nearest", name)
        return self._round(name, weight, weight, hessian)

    def _round(self, name: str, weight: Tensor, wanted: Tensor, hessian: Tensor | None) -> Tensor:
        check_zeros(self.tier_map, name, weight.cpu(), self.folder)
        rounded = round_in_blocks(wanted, self.tier_map.tiers[name], self.bits, hessian, name)
        self.file_of[name] = self.waiting / f"{len(self.file_of)}.safetensors"
        save_tensors(vars(rounded), self.file_of[name], {})
        return rounded.weight

    def read(self, name: str, weight: Tensor, tiers: Tensor) -> Rounded:
        return Rounded(**load_tensors(self.file_of[name])[0])


def _round_head(walk: LayerWalk, samples: int) -> Head | None:
    """The head, rounded for what it is given after the last layer; None where it is no linear."""
    decoder = walk.decoder
    head, name = decoder.model.get_output_embeddings(), head_name(decoder.model)
    if not isinstance(head, nn.Linear):
        return None
    with accumulating_hessians({name: head}, samples) as hessians:
        for _ in walk.logits(head_of_tokens=True):
            pass
    stored = decoder.stored[f"{name}.weight"]
    weight = decoder.checkpoint.tensors([stored])[stored].to(decoder.device)
    others = [other for other, source in decoder.stored.items() if source == stored and other != f"{name}.weight"]
    rounded = round_dense(weight, HEAD_BITS, hessians.get(name), name)
    return Head(name if others else stored.removesuffix(".weight"), rounded, next(iter(others), None))
