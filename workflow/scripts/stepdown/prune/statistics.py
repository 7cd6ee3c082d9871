"""What is summed of the inputs of linears while a layer is replayed: squares, Hessians, whatever a function makes.

A linear that is given no token, such as an expert that none is routed to, is missing in what comes out.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.linears import watching_inputs, watching_outputs


@contextmanager
def accumulating(modules: Mapping[str, nn.Module], of: Callable[[Tensor], Tensor]) -> Iterator[dict[str, Tensor]]:
    """While open, sums over batches what `of` makes of the inputs [..., in] of each module: name -> the sum."""
    sums: dict[str, Tensor] = {}
    latest: tuple[Tensor | None, Tensor | None] = (None, None)

    # The way back through a layer needs none of this.
    @torch.no_grad()
    def add(name: str, inputs: Tensor) -> None:
        nonlocal latest
        # q, k and v (gate and up) are given the same tensor: it is looked at once.
        if inputs is not latest[0]:
            latest = inputs, of(inputs)
        sums[name] = sums[name] + latest[1] if name in sums else latest[1]

    with watching_inputs(modules, add):
        yield sums


@contextmanager
def accumulating_squares(linears: Mapping[str, nn.Linear], samples: int) -> Iterator[dict[str, Tensor]]:
    """While open, sums x_j^2 over all tokens each linear is given; then the mean over samples: name -> float32 [in]."""
    with accumulating(linears, squared_column_sums) as sums:
        yield sums
    sums.update({name: total / samples for name, total in sums.items()})


def squared_column_sums(inputs: Tensor) -> Tensor:
    """Sum over all tokens of x_j^2, float32: [..., in] -> [in]."""
    return torch.linalg.vector_norm(inputs.flatten(0, -2), dim=0, dtype=torch.float32).square()


@contextmanager
def accumulating_squared_gradients(linears: Mapping[str, nn.Linear], samples: int) -> Iterator[dict[str, Tensor]]:
    """While open, sums (dL/dy_i)^2 over all tokens, y the outputs of each linear and L the loss that is carried back;
    then the mean over samples: name -> float32 [out]. A linear that the loss has no gradient of is missing, such as one
    that only chooses which tokens are attended to, or a router whose class answers with its choice."""
    sums: dict[str, Tensor] = {}

    def watch(name: str, outputs: Any) -> None:
        if isinstance(outputs, Tensor) and outputs.requires_grad:
            outputs.register_hook(partial(add, name))

    def add(name: str, gradient: Tensor) -> None:
        # Rows of what a family's own linear answers with may lie in groups.
        squares = squared_column_sums(gradient.reshape(-1, linears[name].weight.shape[0]))
        sums[name] = sums[name] + squares if name in sums else squares

    with watching_outputs(linears, watch):
        yield sums
    sums.update({name: total / samples for name, total in sums.items()})


def counting_tokens(linears: Mapping[str, nn.Linear]) -> AbstractContextManager[dict[str, Tensor]]:
    """While open, counts the tokens each linear is given: name -> int64 []."""
    return accumulating(linears, lambda inputs: torch.tensor(inputs.shape[:-1].numel()))


@contextmanager
def accumulating_hessians(linears: Mapping[str, nn.Linear], samples: int) -> Iterator[dict[str, Tensor]]:
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
