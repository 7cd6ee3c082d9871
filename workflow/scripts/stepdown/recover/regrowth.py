"""Masks chosen anew while a model trains, inside the tiers of its blocks (SR-STE: Zhou et al. 2021; of language models
AST: Huang et al. 2025).

The forward pass sees masked weights, and their gradient goes straight through to all: what a mask m holds back is
trained too, and fades,

    w <- w - lr Adam(g),  then  (1 - m) w <- exp(-lambda_t) (1 - m) w,

lambda_t rising from step to step. Every few steps each 2:4 and TopK block keeps the largest of all its weights anew.
For the last part of the training masks stay, and what they hold back is gone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.checkpoint import load_tensors, save_tensors
from ..tensors.patterns import keep_tiers
from ..tensors.saliency import magnitude, wanda
from ..tensors.tiers import violations
from .look_ahead import left_after
from .trainer import MaskedTrainer

FILE_NAME = "masks.safetensors"


@dataclass(frozen=True)
class Blocks:
    """The blocks of a matrix that choose their weights anew.

    tiers: uint8 [block rows, block cols]; k: of TopK; squared_norms: of the matrix's inputs [in], for Wanda's metric,
    None for magnitude; before: weights [out, in] that what is pruned starts with, None for zeros.
    """

    tiers: Tensor
    block_size: int
    k: int
    squared_norms: Tensor | None = None
    before: Tensor | None = None

    def keep(self, weight: Tensor) -> Tensor:
        """What a weight [out, in] keeps: bool [out, in]."""
        norms = self.squared_norms
        metric = magnitude(weight) if norms is None else wanda(weight, norms.to(weight.device))
        return keep_tiers(metric, self.tiers.to(weight.device), self.block_size, self.k)

    def held_back(self, keep: Tensor) -> Tensor:
        """What is pruned starts with: float32 [out, in]; keep: uint8 [out, in]."""
        if self.before is None:
            return torch.zeros_like(keep, dtype=torch.float32)
        return self.before.to(keep.device, torch.float32) * (1 - keep)


class RegrowingTrainer(MaskedTrainer):
    """A Trainer whose masks move. Between two steps a weight holds what its mask keeps and nothing else, so that what
    is evaluated and saved is as sparse as its tiers; only the optimizer sees it whole."""

    def __init__(self, blocks: Mapping[str, Blocks], every: int, share: float, decay: float, **arguments) -> None:
        """blocks: by name of a linear; every: steps from one choice to the next; share: of the steps, after which masks
        stay; decay: what is held back fades by exp(-decay) until then."""
        super().__init__(**arguments)
        self._blocks = blocks
        self._every, self._share, self._decay = every, share, decay
        self._held_back = {name: blocks[name].held_back(keep) for name, (_, keep) in self._masked.items()}

    def create_optimizer(self, *arguments, **keywords) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*arguments, **keywords)
        optimizer.register_step_pre_hook(self._reveal)
        return optimizer

    @property
    def _last(self) -> int:
        """The last step at which masks are chosen, counted from 1."""
        return int(self._share * self.state.max_steps)

    def _mask_gradients(self) -> None:
        if self.step_number > self._last:
            super()._mask_gradients()

    @torch.no_grad()
    def _reveal(self, *_) -> None:
        """Before the optimizer's step: weights whole."""
        if self.step_number <= self._last:
            for name, (weight, _) in self._masked.items():
                weight.add_(self._held_back[name])

    @torch.no_grad()
    def _mask_weights(self, *_) -> None:
        """After the optimizer's step: masks, chosen anew where it is time, and the weights that they keep."""
        step, last = self.step_number, self._last
        if step <= last:
            left = left_after(step, last, self._decay) if step < last else 0.0
            for name, (weight, keep) in self._masked.items():
                if step % self._every == 0 or step == last:
                    keep.copy_(self._blocks[name].keep(weight))
                torch.mul(weight, 1 - keep, out=self._held_back[name]).mul_(left)
        super()._mask_weights()
        for weight, _ in self._masked.values():
            weight.add_(0.0)  # turns -0.0 into 0.0

    def _save(self, output_dir: str, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            held_back = {f"{name} held back": held for name, held in self._held_back.items()}
            masks = {f"{name} keep": keep for name, (_, keep) in self._masked.items()}
            save_tensors(held_back | masks, Path(output_dir) / FILE_NAME, {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = load_tensors(Path(resume_from_checkpoint) / FILE_NAME)[0]
        for name, (_, keep) in self._masked.items():
            keep.copy_(state[f"{name} keep"])
            self._held_back[name].copy_(state[f"{name} held back"])


def check_tiers(model: nn.Module, blocks: Mapping[str, Blocks]) -> None:
    """Raises RuntimeError, since it would be a fault of this module, where a block holds more than its tier allows."""
    for name, matrix in blocks.items():
        weight = model.get_submodule(name).weight.detach().cpu()
        if crowded := violations(weight, matrix.tiers, matrix.block_size, matrix.k):
            raise RuntimeError(f"{name}: training left {crowded} blocks with more weights than their tier allows")
