"""Matrices with inputs, for tests of what solves for them."""

import torch


def random_case(rows, columns, seed, samples=None):
    """A weight and the Hessian of random inputs that depend on one another; of few samples it is singular.

    Symmetric to the last bit: some processors sum X'X in another order above the diagonal than below, and solvers that
    read different halves would be given different problems.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(samples or 4 * columns, columns, generator=generator)
    inputs = inputs @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator) / columns**0.5)
    hessian = 2 / len(inputs) * inputs.T.double() @ inputs.double()
    return weight, ((hessian + hessian.T) / 2).float()


def damped(hessian):
    """As published, in float64: dead inputs count as 1, and 1 % of the mean of the diagonal is added to it."""
    hessian = hessian.double().clone()
    hessian.diagonal()[hessian.diagonal() == 0] = 1
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def loss(weight, pruned, hessian):
    """What the layer's outputs change by, tr (W - W') H (W - W')'."""
    change = (weight - pruned).double()
    return ((change @ damped(hessian)) * change).sum()
