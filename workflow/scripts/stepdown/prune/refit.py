"""Refitting without training: the weights a mask keeps are moved so that each linear does again what it did before.

Layer by layer, and within a layer in the order its linears are called: each is fitted to its outputs in the model
before pruning, from the inputs it is given now that all before it are pruned and refitted; for how far these have
drifted it makes up the less, the less text there is. With swaps a block may choose anew which of its weights it keeps.
"""

from collections.abc import Callable, Iterator
from fractions import Fraction

import torch
from torch import Tensor

from ..cli import log
from ..errors import UserError
from ..models.checkpoint import is_finite
from ..models.decoder import Decoder
from ..models.layer_walk import LayerWalk
from ..models.step_masks import StepMasks
from ..tensors.least_squares import masked_least_squares
from ..tensors.swaps import swapped_least_squares
from .layerwise import LoadedLayer, added, visit
from .statistics import accumulating_hessians

# (name of a linear, its weight [out, in], H = X'X [in, in], Y'X [out, in]) -> its new weight [out, in].
Fit = Callable[[str, Tensor, Tensor, Tensor], Tensor]
# The same of a linear that is not given every token, by those it is given: without Y'X, and without H where by none.
FitAlone = Callable[[str, Tensor, Tensor | None], Tensor]
# Tokens per input of a linear with which a fit makes up for half of what its inputs have drifted by.
TOKENS_PER_INPUT = 16


def fit_within(masks: StepMasks, damping: float, swap: bool = False) -> Fit:
    """A fit that keeps what the masks keep or, with `swap`, lets the blocks of a tier map choose anew what that is."""

    def fit(name: str, weight: Tensor, hessian: Tensor, target: Tensor) -> Tensor:
        problem = weight, masks.keep(name, weight), hessian, target
        if not swap or masks.tier_map is None:
            return masked_least_squares(*problem, damping)
        return swapped_least_squares(*problem, masks.tier_map.tiers[name], masks.tier_map.block_size, damping)

    return fit


@torch.no_grad()
def refit_layers(
    dense: Decoder,
    pruned: Decoder,
    fit: Fit,
    windows: Tensor,
    batch_size: int,
    fit_alone: FitAlone | None = None,
    description: str = "refit",
) -> Iterator[LoadedLayer]:
    """Refit the layers of `pruned` in order to what `dense`, the model it was pruned from, makes of the same text.

    Yields each layer once it is refitted.

    windows: int64 [samples, tokens], `batch_size` of them through a layer at a time. fit_alone: what becomes of linears
    that are not given every token, such as experts, to which the dense model may route others; without it they stay as
    they are. In memory: a layer of each model, the hidden states of both, H and Y'X of one input; a linear that several
    layers use is fitted in the last of them, to the inputs of all.
    Raises `UserError` naming the linear whose inputs are not finite.
    """
    earlier: dict[str, tuple[Tensor, Tensor]] = {}
    earlier_alone: dict[str, Tensor | None] = {}
    walk, dense_walk = (LayerWalk(decoder, windows.split(batch_size)) for decoder in (pruned, dense))
    for layer, dense_layer in zip(visit(walk, description), visit(dense_walk, None), strict=True):
        alone = list(layer.linears)
        for names in layer.called_together():
            if _refit_(layer, dense_layer, names, fit, earlier):
                alone = [name for name in alone if name not in names]
        if fit_alone:
            _refit_alone_(layer, alone, fit_alone, len(windows), earlier_alone)
        elif alone:
            log.warning("%s and %d others are not given every token: not refitted", min(alone), len(alone) - 1)
        layer.replay()
        dense_layer.replay()
        yield layer


def _refit_(
    layer: LoadedLayer,
    dense_layer: LoadedLayer,
    names: list[str],
    fit: Fit,
    earlier: dict[str, tuple[Tensor, Tensor]],
) -> bool:
    """Refit linears that are given the same inputs, in place; False where these are not all tokens.

    Of those that later layers use, the moments are kept in `earlier`. A function of its own, so that nothing of theirs
    is held while the next ones are summed up.
    """
    moments = _moments(layer, dense_layer, names[0])
    if moments is None:
        return False
    for name in names:
        hessian, cross = (added(*pair) for pair in zip(earlier.pop(name, (None, None)), moments, strict=True))
        if not (is_finite(hessian.diagonal()) and is_finite(cross)):
            raise UserError(f"{layer.walk.decoder.checkpoint.folder}: the inputs of {name} are not finite")
        if name in layer.used_later:
            earlier[name] = hessian, cross
            continue
        weight = layer.linears[name].weight
        target = dense_layer.linears[name].weight.float() @ cross
        if name == names[-1]:
            del moments, cross
        weight.copy_(fit(name, weight, hessian, target))
    return True


def _refit_alone_(
    layer: LoadedLayer, names: list[str], fit_alone: FitAlone, samples: int, earlier: dict[str, Tensor | None]
) -> None:
    """Refit linears in place by the tokens they are given; of those that later layers use, H is kept in `earlier`."""
    linears = {name: layer.linears[name] for name in names}
    with accumulating_hessians(linears, samples) as hessians:
        if linears:
            layer.replay(advance=False)
    for name, linear in linears.items():
        hessian = added(earlier.pop(name, None), hessians.pop(name, None))
        if name in layer.used_later:
            earlier[name] = hessian
        else:
            linear.weight.copy_(fit_alone(name, linear.weight, hessian))


def _moments(layer: LoadedLayer, dense_layer: LoadedLayer, name: str) -> tuple[Tensor, Tensor] | None:
    """Of inputs x of a linear and of y, what it is to be fitted to, sums over all tokens of x'x and y'x, [in, in] each;
    None for an expert that is given all tokens of the first batch, but not of all.

    y is between x and the inputs z in the dense model: x says little of z - x, and a fit to all of it would learn these
    tokens by heart. (GPTAQ, arXiv 2504.02692, takes a quarter in its implementation.)
    """
    hessian = cross = per_token = None
    for batch, tokens in enumerate(layer.walk.batches):
        x, z = layer.inputs(name, batch), dense_layer.inputs(name, batch)
        per_token = per_token or Fraction(len(x), tokens.numel())
        if not len(x) == len(z) == per_token * tokens.numel():
            return None
        if hessian is None:
            hessian, cross = (x.new_zeros(x.shape[1], x.shape[1]) for _ in range(2))
        hessian.addmm_(x.T, x)
        cross.addmm_(z.T, x)
    tokens = float(per_token * sum(batch.numel() for batch in layer.walk.batches))
    return hessian, cross.lerp_(hessian, 1 - drift_share(tokens, len(hessian)))


def drift_share(tokens: float, inputs: int) -> float:
    """What a fit to so many tokens makes up for of the drift z - x of so many inputs: with endless text, all of it."""
    return tokens / (tokens + TOKENS_PER_INPUT * inputs)
