"""Pruning by weights and activations."""

from torch import Tensor

from ...tensors.patterns import Pattern
from ...tensors.saliency import wanda


def prune(weight: Tensor, squared_norms: Tensor, pattern: Pattern) -> Tensor:
    """The smallest |W| * ||x|| go, row by row where the pattern leaves the choice (Sun et al. 2023)."""
    return weight * pattern.keep(wanda(weight, squared_norms))
