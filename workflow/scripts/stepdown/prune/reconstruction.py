"""Reconstruction: each decoder layer is trained under its masks to make of a text again what it made before pruning.

Layer by layer, with no loss of the language model: what a layer makes of what it is given now that all before it are
pruned and reconstructed, against what the model before pruning has after it. A window that holds a nonlinearity mends
far more than single matrices do (arXiv 2510.14444).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..cli import log
from ..errors import UserError
from ..models.decoder import Decoder
from ..models.layer_walk import LayerWalk, carrying_back
from .layerwise import LoadedLayer, visit

WINDOWS_PER_STEP = 8


@dataclass(frozen=True)
class Settings:
    """steps: of AdamW in each layer, with `WINDOWS_PER_STEP` windows. learning_rate: at first, then by a cosine down to
    0, as a share of the root mean square of what a tensor holds beside zeros. seed: of the order of the windows."""

    steps: int
    learning_rate: float
    seed: int = 0


def reconstruct_layers(
    dense: Decoder,
    pruned: Decoder,
    keep: Callable[[str, Tensor], Tensor],
    windows: Tensor,
    batch_size: int,
    settings: Settings,
) -> Iterator[dict[str, Tensor]]:
    """Reconstruct the layers of `pruned` in order to what `dense`, the model it was pruned from, makes of the text.

    Yields what was trained of each by stored name, on the CPU: its prunable matrices and its vectors, which are norms
    and biases. What several layers use, and a tensor of zeros, stay as they are.

    keep: (name, weight [out, in]) -> which weights are free, bool; windows: int64 [samples, tokens], at most
    `batch_size` of them through a layer at a time. In memory: a layer of each model, the hidden states of both, and of
    the one that is trained float32 weights, gradients and moments.
    Raises `UserError` naming the layer whose outputs are not finite.
    """
    batches = windows.split(math.gcd(batch_size, WINDOWS_PER_STEP))
    walk, dense_walk = (LayerWalk(decoder, batches) for decoder in (pruned, dense))
    uses = Counter(name for path, name in pruned.stored.items() if path.startswith(f"{pruned.layers_name}."))
    for layer, dense_layer in zip(visit(walk, "reconstruct"), visit(dense_walk, None), strict=True):
        with torch.no_grad():
            dense_layer.replay()
        trained = {name: parameter for name, parameter in _parameters(layer).items() if uses[name] == 1}
        free = {
            name: keep(name.removesuffix(".weight"), matrix.detach())
            for name, matrix in trained.items()
            if matrix.dim() == 2
        }
        reconstruct_(layer, dense_walk.states, trained, free, settings)
        layer.replay()
        free.clear()
        yield {name: trained.pop(name).detach().cpu() for name in list(trained)}


def reconstruct_(
    layer: LoadedLayer,
    wanted: list[Tensor],
    trained: dict[str, nn.Parameter],
    free: dict[str, Tensor],
    settings: Settings,
) -> None:
    """Train parameters of a layer in place; they stay as they were where that does not lower the error on the text.

    wanted: what the layer should return, per batch; free: of the matrices among the parameters, what may change.
    """
    layer.module.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    first = _error(layer, wanted)
    if not math.isfinite(first):
        folder = layer.walk.decoder.checkpoint.folder
        raise UserError(f"{folder}: what {layer.name} makes of the calibration text is not finite")
    _train_(layer, wanted, trained, free, settings)
    last = _error(layer, wanted)
    if last < first:
        log.info("%s: error %.4g of its states, %.4g before", layer.name, last, first)
    else:
        log.info("%s: error %.4g of its states, which training did not lower: it stays as it was", layer.name, first)
        for name, parameter in trained.items():
            parameter.data.copy_(before[name])


def _train_(layer: LoadedLayer, wanted: list[Tensor], trained: dict, free: dict, settings: Settings) -> None:
    """Weights are updated in float32 and compute in the model's own type."""
    parameters = list(trained.values())
    masters = [parameter.detach().to(torch.float32, copy=True) for parameter in parameters]
    # A share of their size: what is a step for one model's weights is none, or too long a one, for another's.
    rates = [settings.learning_rate * _root_mean_square(master) for master in masters]
    groups = [{"params": [master], "lr": rate} for master, rate in zip(masters, rates, strict=True)]
    # Fused, it needs no tensors as large as the largest matrix beside the moments.
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for parameter in parameters:
        parameter.requires_grad_(True)
    for batches in _batches_of_steps(layer, settings):
        with carrying_back(layer.walk.decoder):
            for batch in batches:
                _distance(layer, batch, wanted[batch]).backward()
        for (name, parameter), master in zip(trained.items(), masters, strict=True):
            if parameter.grad is not None:
                master.grad = parameter.grad.float()
                parameter.grad = None
                if name in free:
                    master.grad *= free[name]
        optimizer.step()
        schedule.step()
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.data.copy_(master)
    layer.module.requires_grad_(False)


def _batches_of_steps(layer: LoadedLayer, settings: Settings) -> list[list[int]]:
    """Which batches go into each step: neighbours, all of them in a random order, then all again in another; the same
    windows however many are in a batch."""
    count, in_batch = len(layer.walk.states), len(layer.walk.states[0])
    steps = torch.arange(count).split(max(1, WINDOWS_PER_STEP // in_batch))
    generator = torch.Generator().manual_seed(settings.seed)
    rounds = -(-settings.steps // len(steps))
    order = torch.cat([torch.randperm(len(steps), generator=generator) for _ in range(rounds)])
    return [steps[number].tolist() for number in order[: settings.steps]]


def _distance(layer: LoadedLayer, batch: int, wanted: Tensor) -> Tensor:
    """Squared errors of what the layer returns, of each token relative to what it should be, summed over tokens: the
    first token's enormous states would rule the sum otherwise."""
    wanted = wanted.to(layer.walk.decoder.device).float()
    errors = (layer.output(batch).float() - wanted).square().sum(-1)
    return (errors / wanted.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)).sum()


@torch.no_grad()
def _error(layer: LoadedLayer, wanted: list[Tensor]) -> float:
    """The mean distance of a token, over all batches."""
    total = sum(_distance(layer, batch, states).double() for batch, states in enumerate(wanted))
    return total.item() / sum(states.shape[:-1].numel() for states in wanted)


def _root_mean_square(tensor: Tensor) -> float:
    """Of what is not zero."""
    return (tensor.square().sum() / tensor.count_nonzero().clamp(min=1)).sqrt().item()


def _parameters(layer: LoadedLayer) -> dict[str, nn.Parameter]:
    """The layer's matrices that are pruned and its vectors, by stored name."""
    stored, matrices = layer.walk.decoder.stored, {f"{name}.weight" for name in layer.linears}
    named = {stored.get(f"{layer.name}.{path}"): parameter for path, parameter in layer.module.named_parameters()}
    return {name: parameter for name, parameter in named.items() if name in matrices or (name and parameter.dim() == 1)}
