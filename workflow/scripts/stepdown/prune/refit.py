"""Refitting without training: the weights a mask keeps are moved so that each linear does again what it did before.

Layer by layer, and within a layer in the order its linears are called: each is fitted to its outputs in the model
before pruning, from the inputs it is given now that all before it are pruned and refitted.
"""

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor

from ..cli import log
from ..errors import UserError
from ..models.decoder import Decoder, LayerWalk
from ..tensors.least_squares import masked_least_squares
from .layerwise import LoadedLayer, visit


@torch.no_grad()
def refit_layers(
    dense: Decoder,
    pruned: Decoder,
    keep: Callable[[str, Tensor], Tensor],
    windows: Tensor,
    batch_size: int,
    damping: float,
) -> Iterator[LoadedLayer]:
    """Refit the layers of `pruned` in order to what `dense`, the model it was pruned from, makes of the same text.

    Yields each layer once it is refitted.

    keep: (name, weight [out, in]) -> which weights are free, bool; windows: int64 [samples, tokens], `batch_size` of
    them through a layer at a time. In memory: a layer of each model, the hidden states of both, H and X'Y of one input.
    Raises `UserError` naming the linear whose inputs are not finite.
    """
    walk, dense_walk = (LayerWalk(decoder, windows.split(batch_size)) for decoder in (pruned, dense))
    for layer, dense_layer in zip(visit(walk, "refit"), visit(dense_walk, None), strict=True):
        together = layer.called_together()
        if left_out := layer.linears.keys() - set(chain(*together)):
            # The dense model routes other tokens to its experts.
            log.warning("%s and %d others are not given every token: not refitted", min(left_out), len(left_out) - 1)
        for names in together:
            hessian, cross = _moments(layer, dense_layer, names[0])
            if not (hessian.diagonal().isfinite().all() and cross.isfinite().all()):
                raise UserError(f"{pruned.checkpoint.folder}: the inputs of {names[0]} are not finite")
            for name in names:
                weight, dense_weight = layer.linears[name].weight, dense_layer.linears[name].weight
                free = keep(name, weight.cpu()).to(weight.device)
                weight.copy_(masked_least_squares(weight, free, hessian, dense_weight.float() @ cross, damping))
        layer.replay()
        dense_layer.replay()
        yield layer


def _moments(layer: LoadedLayer, dense_layer: LoadedLayer, name: str) -> tuple[Tensor, Tensor]:
    """Of inputs x of a linear and z of it in the dense model, sums over all tokens of x'x and z'x, [in, in] each."""
    hessian = cross = 0.0
    for batch in range(len(layer.walk.batches)):
        x, z = layer.inputs(name, batch), dense_layer.inputs(name, batch)
        hessian, cross = hessian + x.T @ x, cross + z.T @ x
    return hessian, cross
