"""The order in which a model's channels stand in another, the same model with its channels sorted.

A safetensors file with one int32 tensor per side of a stored tensor that was permuted, named "<tensor> <dimension>" in
the form [out, in]: of each place, the place that what is there came from. Its metadata name both models.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import load_tensors, save_tensors

FORMAT = "stepdown permutation 1"

# Of an embedding, to be put in another order.
ROWS_AT_ONCE = 1024

# (stored tensor, its dimension in the form [out, in]) -> int64 [length].
Orders = Mapping[tuple[str, int], Tensor]


def permute_(tensors: dict[str, Tensor], orders: Orders) -> None:
    """Put the tensors that `orders` speaks of in that order, in place; of the others nothing changes."""
    for (name, dim), order in orders.items():
        if name in tensors:
            tensor, order = tensors[name], order.to(tensors[name].device)
            # A part after the other along another dimension: there may be no room for a whole embedding twice.
            for part in tensor.split(ROWS_AT_ONCE, dim=1 - dim) if tensor.dim() == 2 else [tensor]:
                part.copy_(part.index_select(dim, order))


def inverse(orders: Orders) -> Orders:
    """The orders that undo others."""
    return {side: order.argsort() for side, order in orders.items()}


def write_orders(orders: Orders, path: Path | str, base_model: str, sorted_model: str) -> None:
    """Write the file; the models go by the sha256 of their tensors."""
    tensors = {f"{name} {dim}": order.to(torch.int32) for (name, dim), order in orders.items()}
    save_tensors(tensors, path, {"format": FORMAT, "base_model": base_model, "sorted_model": sorted_model})


def read_orders(path: Path | str) -> Orders:
    """The orders of a file that `write_orders` wrote."""
    tensors, _ = load_tensors(path)
    names = ((name.rpartition(" "), order.long()) for name, order in tensors.items())
    return {(tensor, int(dim)): order for (tensor, _, dim), order in names}
