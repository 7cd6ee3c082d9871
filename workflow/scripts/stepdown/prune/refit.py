"""Refitting without training: the weights a mask keeps are moved so that each linear does again what it did before.

Layer by layer, and within a layer in the order its linears are called: each is fitted to its outputs in the model
before pruning, from the inputs it is given now that all before it are pruned and refitted.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from ..cli import log
from ..errors import UserError
from ..models.decoder import Decoder, LayerWalk
from ..models.linears import watching_inputs

# Conjugate gradient steps: the least that leave the perplexity where twice as many do.
STEPS = 20
TINY = torch.finfo(torch.float32).tiny


def refit(
    weight: Tensor, keep: Tensor, hessian: Tensor, target: Tensor, damping: float = 0.01, steps: int = STEPS
) -> Tensor:
    """Masked least squares: the W, zero outside `keep`, of smallest ||X W' - Y||^2 + ridge ||W - weight||^2.

    weight: [out, in], where to start and what the ridge holds to; keep: bool [out, in]; hessian: H = X'X, [in, in];
    target: Y'X, [out, in], which is `dense_weight @ H` where Y = X dense_weight'; ridge: `damping` of the mean of H's
    diagonal. Returns float32 [out, in].

    Conjugate gradients, preconditioned by H's diagonal (Hestenes & Stiefel 1952): each row is a problem of its own, and
    a step is one product with H for all of them, whatever the mask, where the exact solution factors a matrix per row.
    The error of a row never rises.
    """
    ridge = damping * hessian.diagonal().mean()
    diagonal = (hessian.diagonal() + ridge).clamp(min=TINY)
    solution = weight.float() * keep
    residual = (target - solution @ hessian) * keep
    direction = residual / diagonal
    square = _dot(residual, direction)
    for _ in range(steps):
        image = (direction @ hessian).add_(ridge * direction).mul_(keep)
        length = square / _dot(direction, image).clamp(min=TINY)
        solution += length * direction
        residual -= length * image
        conditioned = residual / diagonal
        before, square = square, _dot(residual, conditioned)
        direction = conditioned.add_(direction.mul_(square / before.clamp(min=TINY)))
    return solution


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Of each row with its counterpart: [out, 1]."""
    return torch.linalg.vecdot(left, right)[:, None]


@torch.no_grad()
def refit_layers(
    dense: Decoder,
    pruned: Decoder,
    keep: Callable[[str, Tensor], Tensor],
    windows: Tensor,
    batch_size: int,
    damping: float,
    take: Callable[[dict[str, Tensor]], None],
) -> None:
    """Refit the layers of `pruned` in order to what `dense`, the model it was pruned from, makes of the same text.

    keep: (name, weight [out, in]) -> which weights are free, bool; windows: int64 [samples, tokens], `batch_size` of
    them through a layer at a time; `take` gets the weights of each layer's linears, by stored name, on the CPU.
    In memory: a layer of each model, the hidden states of both, H and X'Y of one input. Raises `UserError` naming the
    linear whose inputs are not finite.
    """
    batches = list(windows.split(batch_size))
    walk, dense_walk = LayerWalk(pruned, batches), LayerWalk(dense, batches)
    name_of = {module: name for name, module in pruned.linears().items()}
    dense_of = dense.linears()
    pairs = zip(walk.layers("refit"), dense_walk.layers(None), strict=True)
    for (_, layer, replay), (_, _, dense_replay) in pairs:
        linears = {name_of[module]: module for module in layer.modules() if module in name_of}
        for names in _called_together(linears, replay):
            now = partial(_inputs, linears[names[0]], replay)
            then = partial(_inputs, dense_of[names[0]], dense_replay)
            hessian, cross = _moments((now(batch), then(batch)) for batch in range(len(batches)))
            if not (hessian.diagonal().isfinite().all() and cross.isfinite().all()):
                raise UserError(f"{pruned.checkpoint.folder}: the inputs of {names[0]} are not finite")
            for name in names:
                weight = linears[name].weight
                free = keep(name, weight.cpu()).to(weight.device)
                weight.copy_(refit(weight, free, hessian, dense_of[name].weight.float() @ cross, damping))
        replay()
        dense_replay()
        take({name: linear.weight.detach().cpu() for name, linear in linears.items()})


def _called_together(linears: dict[str, nn.Linear], replay: Callable[..., None]) -> list[list[str]]:
    """The linears in the order they are called, those that are given the same tensor (q, k and v) together.

    Experts are left out and stay as they are: the dense model routes other tokens to them.
    """
    groups: list[tuple[Tensor, list[str]]] = []

    def record(name: str, inputs: Tensor) -> None:
        if not groups or inputs is not groups[-1][0]:
            groups.append((inputs, []))
        groups[-1][1].append(name)

    with watching_inputs(linears, record):
        replay(advance=False, batch=0)
    tokens = max((inputs.shape[:-1].numel() for inputs, _ in groups), default=0)
    together = [names for inputs, names in groups if inputs.shape[:-1].numel() == tokens]
    if left_out := linears.keys() - set(chain(*together)):
        log.warning("%s and %d others are not given every token: not refitted", min(left_out), len(left_out) - 1)
    return together


def _moments(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of inputs x now and z in the dense model, [tokens, in], sums over the batches of x'x and z'x, [in, in] each."""
    hessian = cross = 0.0
    for x, z in pairs:
        hessian, cross = hessian + x.T @ x, cross + z.T @ x
    return hessian, cross


class _Reached(Exception):
    """Carries a linear's inputs out of its layer: what comes after it need not be computed."""


def _inputs(linear: nn.Linear, replay: Callable[..., None], batch: int) -> Tensor:
    """What a linear is given of a batch, float32 [tokens, in]."""

    def leave(_: nn.Module, inputs: tuple[Tensor]) -> None:
        raise _Reached(inputs[0])

    handle = linear.register_forward_pre_hook(leave)
    try:
        replay(advance=False, batch=batch)
    except _Reached as reached:
        return reached.args[0].flatten(0, -2).float()
    finally:
        handle.remove()
    raise RuntimeError("a linear that is called with the first batch is not called with another")
