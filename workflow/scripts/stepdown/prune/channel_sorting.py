"""Sorting the channels of a model by their importance, so that weak ones share blocks; what it computes stays the same.

A channel is as important as what the matrices would lose with it: of each that reads it a column, of each that writes
it a row. With gradients that is what the loss rises by, sum of w_ij^2 s_j g_i (`tensors/costs.py`); without, the sum of
the Wanda metric |w_ij| sqrt(s_j) as a share of its matrix.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..cli import progress
from ..errors import UserError
from ..models.channels import Channels, order_of_side, sort_in_heads
from ..models.checkpoint import rewrite_checkpoint
from ..models.decoder import Decoder, in_float32
from ..models.layer_walk import LayerWalk
from ..models.permutation import Orders, permute_
from ..tensors.saliency import wanda
from .calibration import Calibration

# Models are compared on so many tokens: logits are as wide as a vocabulary.
TOKENS = 64
# How far logits may lie apart, as a share of their own size: what sums in another order come to in float32, and more.
TOLERANCE = 1e-3


def importances(decoder: Decoder, channels: Sequence[Channels], calibration: Calibration) -> list[Tensor]:
    """What each channel is worth, float64 [channels] per element of `channels`; one matrix is in memory at a time."""
    sums = [torch.zeros(len(group.heads), dtype=torch.float64) for group in channels]
    held_by = {
        side: (total, numbers)
        for total, group in zip(sums, channels, strict=True)
        for side, numbers in group.sides.items()
    }
    for name in progress(decoder.linears(), "weigh channels"):
        weight = decoder.checkpoint.matrix(name).to(decoder.device)
        for dim, losses in enumerate(_losses(weight, *calibration.of(name, decoder.device))):
            if (f"{name}.weight", dim) in held_by:
                total, numbers = held_by[f"{name}.weight", dim]
                total.index_add_(0, numbers[numbers >= 0], losses[numbers >= 0])
    return sums


def _losses(weight: Tensor, norms: Tensor, gradients: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a matrix [out, in] loses with each of its rows, and with each column: float64 [out] and [in]."""
    if gradients is None:
        metric = wanda(weight, norms)
        metric /= metric.sum().clamp(min=torch.finfo(torch.float32).tiny)
        return metric.sum(1).double().cpu(), metric.sum(0).double().cpu()
    squares = weight.float().square()
    return (squares @ norms * gradients).double().cpu(), (gradients @ squares * norms).double().cpu()


def sorted_orders(channels: Sequence[Channels], importance: Sequence[Tensor]) -> Orders:
    """The order of every side that has these channels, each sorted inside its heads by falling importance."""
    orders = {}
    for group, worth in zip(channels, importance, strict=True):
        order = sort_in_heads(group.heads, worth)
        orders |= {side: order_of_side(numbers, order) for side, numbers in group.sides.items()}
    return orders


def write_permuted(decoder: Decoder, orders: Orders, target: Path | str) -> None:
    """Write the model with its channels in another order; one layer is in memory at a time. Whose model it is, only its
    weights can tell once they are written: `checkpoint.write_base_index`."""
    identity = {"base_model": "", "iteration": "0"}
    rewrite_checkpoint(decoder.checkpoint, target, lambda tensors: permute_(tensors, orders), identity, "sort channels")


@torch.no_grad()
def check_same_function(before: Decoder, after: Decoder, tokens: Tensor) -> None:
    """Raises `UserError` unless the two compute the same logits in float32.

    tokens: int64 [sequences, tokens], of which the first few are looked at, and the logits of these alone.
    """
    tokens, found = tokens[:, :TOKENS], []
    for decoder in (before, after):
        walk = LayerWalk(in_float32(decoder), [tokens])
        for _, _, replay in walk.layers(None):
            replay()
        found.append(next(walk.logits(head_of_tokens=True))[..., tokens.unique()].cpu())
    apart = torch.linalg.vector_norm(found[1] - found[0]) / torch.linalg.vector_norm(found[0] - found[0].mean())
    if not apart <= TOLERANCE:
        raise UserError(
            f"{before.checkpoint.folder}: with its channels sorted a model of the family"
            f" {before.model.config.model_type!r} computes something else; set sort_channels: false"
        )
