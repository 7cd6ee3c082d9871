"""Least squares of a matrix under a mask."""

import torch
from torch import Tensor

# Conjugate gradient steps: the least that leave the perplexity of a refitted model where twice as many do.
STEPS = 20
# Rows solved at a time: beside a Hessian there is room for few matrices.
ROWS = 512
TINY = torch.finfo(torch.float32).tiny


def masked_least_squares(
    weight: Tensor, keep: Tensor, hessian: Tensor, target: Tensor, damping: float = 0.01, steps: int = STEPS
) -> Tensor:
    """The W, zero outside `keep`, of smallest ||X W' - Y||^2 + ridge ||W - weight||^2.

    weight: [out, in], where to start and what the ridge holds to; keep: bool [out, in]; hessian: H = X'X, [in, in];
    target: Y'X, [out, in], which is `dense_weight @ H` where Y = X dense_weight'; ridge: `damping` of the mean of H's
    diagonal. Returns float32 [out, in].
    """
    ridge = damping * hessian.diagonal().mean()
    solution = weight.float() * keep
    parts = zip(*(matrix.split(ROWS) for matrix in (solution, keep, target, weight)), strict=True)
    for rows, kept, wanted, held in parts:
        descend_(rows, kept, wanted.addcmul(held, ridge), hessian, ridge, steps)
    return solution


def descend_(solution: Tensor, keep: Tensor, target: Tensor, hessian: Tensor, ridge: Tensor, steps: int) -> Tensor:
    """Take W towards the smallest W (H + ridge) W' - 2 W target', in place, where it is free.

    solution: float32 [out, in], zero outside `keep`; ridge: []. Returns target - W (H + ridge), of pruned weights too.
    Conjugate gradients, preconditioned by H's diagonal (Hestenes & Stiefel 1952): each row is a problem of its own, and
    a step is one product with H for all of them, whatever the mask, where the exact solution factors a matrix per row.
    The error of a row never rises.
    """
    diagonal = (hessian.diagonal() + ridge).clamp(min=TINY)
    residual = torch.addmm(target, solution, hessian, alpha=-1).addcmul_(solution, ridge, value=-1)
    direction = (residual / diagonal).mul_(keep)
    square = _dot(residual, direction)
    for _ in range(steps):
        image = (direction @ hessian).addcmul_(direction, ridge)
        length = square / _dot(direction, image).clamp(min=TINY)
        solution.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        conditioned = (residual / diagonal).mul_(keep)
        before, square = square, _dot(residual, conditioned)
        direction = conditioned.add_(direction.mul_(square / before.clamp(min=TINY)))
    return residual


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Of each row with its counterpart: [out, 1]."""
    return torch.linalg.vecdot(left, right)[:, None]
