"""Several matrices in one stored tensor, such as those of all experts, seen as matrices of their own."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# The linears that a parameter of all experts holds, in their order; `_bias` behind the name: their biases.
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class Fused:
    """How a tensor [experts, ...] holds, of each expert, the matrices [out, in] or the biases [out] of some linears.

    name: of the experts; parts: their linears; shape: of the tensor; kind: weight or bias; transposed: whether matrices
    are [in, out]; interleaved: whether outputs of the parts take turns, or stand one part after the other.
    """

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str = "weight"
    transposed: bool = False
    interleaved: bool = False

    def views(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and view of each matrix [out, in] (or bias [out]) in the tensor."""
        for number, expert in enumerate(tensor):
            held = expert.T if self.transposed and expert.dim() == 2 else expert
            count = len(self.parts)
            for place, part in enumerate(self.parts):
                view = held[place::count] if self.interleaved else held.chunk(count)[place]
                yield f"{self.name}.{number}.{part}.{self.kind}", view

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each matrix (or bias) in the tensor."""
        return {part: tuple(view.shape) for part, view in self.views(torch.empty(self.shape, device="meta"))}
