"""What is summed of the inputs of linears while a layer is replayed: squares, and Hessians."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..models.linears import watching_inputs


@contextmanager
def accumulating_squares(linears: dict[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """While open, sums x_j^2 over all tokens each linear is given: name -> float32 [in]."""
    sums: dict[str, Tensor] = {}
    latest: tuple[Tensor | None, Tensor | None] = (None, None)

    def accumulate(name: str, inputs: Tensor) -> None:
        nonlocal latest
        # q, k and v (gate and up) are given the same tensor: its squares are summed once.
        if inputs is not latest[0]:
            latest = inputs, squared_column_sums(inputs)
        sums[name] = sums[name] + latest[1] if name in sums else latest[1]

    with watching_inputs(linears, accumulate):
        yield sums


def squared_column_sums(inputs: Tensor) -> Tensor:
    """Sum over all tokens of x_j^2, float32: [..., in] -> [in]."""
    return torch.linalg.vector_norm(inputs.flatten(0, -2), dim=0, dtype=torch.float32).square()


@contextmanager
def accumulating_hessians(linears: dict[str, nn.Linear], samples: int) -> Iterator[dict[str, Tensor]]:
    """While open, sums H = 2/samples * sum x x' over all tokens each linear is given: name -> float32 [in, in].

    Linears that are given the same tensor (q, k and v; gate and up) share one H; the first batch shows which those are.
    """
    hessians: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    latest: tuple[Tensor | None, str] = (None, "")

    def accumulate(name: str, inputs: Tensor) -> None:
        nonlocal latest
        latest = inputs, latest[1] if inputs is latest[0] else name
        if owner.setdefault(name, latest[1]) != name:
            hessians[name] = hessians[owner[name]]
            return
        tokens = inputs.flatten(0, -2).float()
        if name not in hessians:
            hessians[name] = tokens.new_zeros(tokens.shape[1], tokens.shape[1])
        hessians[name].addmm_(tokens.T, tokens, alpha=2 / samples)

    with watching_inputs(linears, accumulate):
        yield hessians
