"""Least squares of a matrix under a mask."""

import torch
from torch import Tensor

# Conjugate gradient steps: the least that leave the perplexity of a refitted model where twice as many do.
STEPS = 20
TINY = torch.finfo(torch.float32).tiny


def masked_least_squares(
    weight: Tensor, keep: Tensor, hessian: Tensor, target: Tensor, damping: float = 0.01, steps: int = STEPS
) -> Tensor:
    """The W, zero outside `keep`, of smallest ||X W' - Y||^2 + ridge ||W - weight||^2.

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
    residual = torch.addmm(target, solution, hessian, alpha=-1).mul_(keep)
    direction = residual / diagonal
    square = _dot(residual, direction)
    for _ in range(steps):
        # In place: beside a Hessian there is room for few matrices.
        image = (direction @ hessian).addcmul_(direction, ridge).mul_(keep)
        length = square / _dot(direction, image).clamp(min=TINY)
        solution.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        conditioned = residual / diagonal
        before, square = square, _dot(residual, conditioned)
        direction = conditioned.add_(direction.mul_(square / before.clamp(min=TINY)))
    return solution


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Of each row with its counterpart: [out, 1]."""
    return torch.linalg.vecdot(left, right)[:, None]
