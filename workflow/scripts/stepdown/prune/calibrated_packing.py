"""Packing a model as whole numbers by GPTQ: the kept weights of each layer make up for their rounding, on text."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..cli import log
from ..models.checkpoint import load_tensors, save_tensors, waiting_beside
from ..models.decoder import Decoder, head_name
from ..models.layer_walk import LayerWalk
from ..models.tier_maps import TierMap, check_zeros
from ..packed.folder import HEAD_BITS, VALUES, Head, check_finite_in_bf16, check_packable, write_packed
from ..tensors.block_rounding import Rounded, round_dense, round_in_blocks
from .layerwise import change_layers
from .statistics import accumulating_hessians


def pack_calibrated(
    decoder: Decoder, tier_map: TierMap, map_path: Path, windows: Tensor, batch_size: int, values: str, target: Path
) -> float:
    """Write the packed folder `target` of a model, `values` of whole numbers, one decoder layer in memory at a time.

    windows: int64 [samples, tokens]; each layer sees what the rounded ones before it give. Returns the bytes of the
    packed matrices per weight. Raises `UserError` as `write_packed` does, and for weights that are not finite.
    """
    check_packable(decoder.checkpoint, tier_map, map_path)
    # Also by `write_packed`, but after what takes long and would name another reason.
    for names in decoder.checkpoint.shards().values():
        check_finite_in_bf16(decoder.checkpoint.folder, decoder.checkpoint.tensors(names))
    with waiting_beside(target) as waiting:
        walk = LayerWalk(decoder, windows.split(batch_size))
        file_of = _round_layers(walk, tier_map, len(windows), VALUES[values], waiting)

        def rounding(name: str, weight: Tensor, tiers: Tensor) -> Rounded:
            return Rounded(**load_tensors(file_of[name])[0])

        head = _round_head(walk, len(windows))
        return write_packed(decoder.checkpoint, tier_map, map_path, target, values, rounding, head)


@torch.no_grad()
def _round_layers(walk: LayerWalk, tier_map: TierMap, samples: int, bits: int, waiting: Path) -> dict[str, Path]:
    """Name of each matrix -> the file in `waiting` with what it was rounded to: layers are walked in the order of the
    model, and packed in the order of their names."""
    decoder, file_of = walk.decoder, dict[str, Path]()

    def make(name: str, weight: Tensor, statistics: dict[str, Tensor | None]) -> Tensor:
        check_zeros(tier_map, name, weight.cpu(), decoder.checkpoint.folder)
        if (hessian := statistics["hessian"]) is None:
            log.warning("%s saw no token of the calibration text: rounded to nearest", name)
        rounded = round_in_blocks(weight, tier_map.tiers[name], bits, hessian, name)
        file_of[name] = waiting / f"{len(file_of)}.safetensors"
        save_tensors(vars(rounded), file_of[name], {})
        return rounded.weight

    gather = {"hessian": partial(accumulating_hessians, samples=samples)}
    for _ in change_layers(walk, "round", gather, make):
        pass
    return file_of


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
