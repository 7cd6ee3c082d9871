"""A Trainer under keep masks, its model whole in every process or sharded over them."""

import contextlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

from ..errors import UserError
from ..files import SINGLE_FILE_NAME
from ..memory import give_back_freed
from ..models.checkpoint import load_tensors, save_tensors
from ..tensors.masks import as_bits, from_bits
from .distillation import Distillation
from .settings import MOMENTS
from .sharding import beside, load_optimizer, load_weights, local, own_parameters, save_optimizer, save_weights
from .training_callbacks import Bar, FiniteLoss


class Windows(torch.utils.data.Dataset):
    """Windows of tokens, [n, length], as a causal language model is trained on them; the model shifts the labels."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class MaskedTrainer(Trainer):
    """A Trainer that zeroes the gradients of pruned weights before they are clipped, and the weights after each step.

    With a zero gradient AdamW leaves a zero weight at zero, decay and momentum included; that the weights are masked as
    well makes it hold whatever the optimizer.
    """

    def __init__(
        self,
        keep_masks: Mapping[str, Tensor],
        distillation: Distillation | None = None,
        moments: Mapping[str, Tensor] | None = None,
        low_memory: bool = False,
        **arguments,
    ) -> None:
        """Of arguments, those of a Trainer; low_memory: hold a bit of a mask for each weight, and not a byte. Masks and
        moments of a model in shards: of each the rows that this process has."""
        super().__init__(**arguments)
        self._moments = moments or {}
        self._distillation = distillation
        if distillation:
            # Its loss is a mean over the tokens of a batch, and windows are equally long.
            self.loss_is_scaled_for_ga = False
        self._bits = low_memory
        self._masked = self._beside_weights((name, keep) for name, keep in keep_masks.items() if not keep.all())
        self.remove_callback(PrinterCallback)
        self.add_callback(FiniteLoss())
        if sys.stderr.isatty():
            self.add_callback(Bar())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._distillation is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        asked = inputs | {"output_hidden_states": self._distillation.hidden_states > 0}
        cross_entropy, outputs = super().compute_loss(model, asked, return_outputs=True)
        loss = self._distillation.loss(cross_entropy, outputs, inputs["input_ids"])
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *arguments, **keywords) -> Tensor:
        loss = super().training_step(*arguments, **keywords)
        # Once per step, when the last batch of the accumulation has been added.
        if self.accelerator.sync_gradients:
            self._mask_gradients()
            # What the layers left between the gradients would be held beside all that the optimizer makes.
            give_back_freed()
        return loss

    def create_optimizer(self, *arguments, **keywords) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*arguments, **keywords)
        optimizer.register_step_post_hook(self._mask_weights)
        self._check_moments()
        for name, parameter in self.model.named_parameters():
            state = {key: self._moments[f"{name} {key}"] for key in MOMENTS if f"{name} {key}" in self._moments}
            if state:
                optimizer.state[parameter] = {key: beside(value, parameter) for key, value in state.items()}
        return optimizer

    def _check_moments(self) -> None:
        shapes = {name: local(parameter).shape for name, parameter in self.model.named_parameters()}
        for moment, values in self._moments.items():
            name, _, key = moment.rpartition(" ")
            if name not in shapes or (key != "step" and values.shape != shapes[name]):
                told = f"{moment} {list(values.shape)} is of no parameter that is trained here"
                raise UserError(f"--optimizer: {told}; give what was written for this model")

    def _save(self, output_dir: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save what is trained, by the model's own names, and nothing that a library could refuse to save."""
        if self.args.should_save:
            trained = {name: weight.detach() for name, weight in self.model.named_parameters() if weight.requires_grad}
            save_tensors(trained, Path(output_dir) / SINGLE_FILE_NAME, {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_state_dict(load_tensors(Path(resume_from_checkpoint) / SINGLE_FILE_NAME)[0], strict=False)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_checkpoint(self, *arguments, **keywords) -> None:
        try:
            super()._save_checkpoint(*arguments, **keywords)
        except RuntimeError as error:
            # What torch makes of a failed write; it is no OSError.
            reason = str(error).partition("\n")[0]
            raise UserError(f"{self.args.output_dir}: not written ({reason}); is the disk full?") from error

    def load_optimizer(self, checkpoint: Path) -> None:
        """The optimizer as a checkpoint has it."""
        self.optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu"))

    def _beside_weights(self, masks: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """Per linear its weight, and its mask where the weight is: as bytes, by which multiplying is four times as fast
        on a CPU as by the same bytes called bool; or in little memory as bits."""
        masked = {}
        for name, keep in masks:
            weight = self.model.get_submodule(name).weight
            mask = keep.view(torch.uint8).to(weight.device)
            masked[name] = weight, as_bits(mask) if self._bits else mask
        return masked

    def _mask_gradients(self) -> None:
        for weight, keep in self._masked.values():
            if weight.grad is not None:
                mask_(weight.grad, keep)

    @torch.no_grad()
    def _mask_weights(self, *_) -> None:
        for weight, keep in self._masked.values():
            mask_(weight, keep)


def mask_(tensor: Tensor, mask: Tensor) -> None:
    """Zero what a mask, in bytes or bits, drops of what this process has of a tensor."""
    held = local(tensor)
    held.mul_(from_bits(mask, held.shape))


class ShardedTrainer(MaskedTrainer):
    """The same for a model that `shard_` has sharded; the Trainer itself would not on CPUs, nor save such a one."""

    def __init__(self, *arguments, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        # What it calls a model that is in its place and adds up its own gradients.
        self.is_distributed_loading_by_transformers = True
        # Copies of whole weights that are kept would be the whole model in each process.
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)

    def load_optimizer(self, checkpoint: Path) -> None:
        # Accelerate wraps it once training has begun.
        load_optimizer(getattr(self.optimizer, "optimizer", self.optimizer), checkpoint)

    def _defer_fsdp_gradient_reduction(self) -> contextlib.AbstractContextManager:
        """Gradients are added up after every batch of an accumulation: whole ones would not fit beside each other."""
        return contextlib.nullcontext()

    def _save(self, output_dir: str, state_dict: dict[str, Tensor] | None = None) -> None:
        save_weights(self.model, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_optimizer(self.optimizer.optimizer, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.load_optimizer(Path(checkpoint))
            state = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True, map_location="cpu")
            self.lr_scheduler.load_state_dict(state)


def moments_of(trainer: Trainer) -> dict[str, Tensor]:
    """What AdamW remembers of each parameter, by "name key": its two moments and the number of steps; of a model in
    shards in shards."""
    state = trainer.optimizer.state
    return {
        f"{name} {key}": state[parameter][key]
        for name, parameter in own_parameters(trainer.model)
        for key in (MOMENTS if parameter in state else ())
    }
