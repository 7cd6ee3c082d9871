"""Optimal brain surgeon, column by column."""

from torch import Tensor

from ...tensors.patterns import Pattern
from ...tensors.sparsegpt import optimal_brain_surgeon


def prune(weight: Tensor, hessian: Tensor, pattern: Pattern, name: str) -> Tensor:
    """What goes is made up for by what stays (Frantar & Alistarh 2023)."""
    return optimal_brain_surgeon(weight, hessian, pattern, name)
