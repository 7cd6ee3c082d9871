"""Magnitude pruning."""

from torch import Tensor

from ...tensors.patterns import Pattern


def prune(weight: Tensor, pattern: Pattern) -> Tensor:
    """The smallest |W| go, of the whole matrix where the pattern leaves the choice (Han et al. 2015)."""
    return weight * pattern.keep(weight.abs(), whole=True)
