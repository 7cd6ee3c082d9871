"""Finetuning under a keep mask, full or LoRA; knows nothing of where the mask comes from.

`keep_masks` maps the name of a linear (without `.weight`) to its keep mask, bool [out, in]: True where the weight may
change, False where it is zero and stays zero.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import TrainerState

from ..errors import UserError
from .lora import add_masked_adapter, merge, save_adapter
from .losses import use_chunked_cross_entropy_
from .processes import is_first
from .settings import RecoverySettings, optimizer_of, training_arguments
from .sharding import local, own_rows, shard_
from .trainer import MaskedTrainer, ShardedTrainer, Windows, moments_of
from .training_callbacks import EarlyStop, TensorBoard
from .training_state import last_checkpoint


@dataclass(frozen=True)
class Recovery:
    """What finetuning came to: the model as it was at its best evaluation after the first step, and how it got there.

    log: rows {"step", "epoch", "loss", "learning_rate"} of every step and {"step", "epoch", "eval_loss"} of every
    evaluation, the one before the first step included; tokens: trained on, all epochs together; moments: of the
    optimizer after the last step, see `moments_of`, if they were asked for. Model and moments are still in shards where
    it trained so.
    """

    model: PreTrainedModel
    log: list[dict[str, float]]
    steps: int
    tokens: int
    moments: dict[str, Tensor]

    @property
    def evaluations(self) -> dict[int, float]:
        """Evaluation loss by step."""
        return {row["step"]: row["eval_loss"] for row in self.log if "eval_loss" in row}

    @property
    def best_step(self) -> int:
        """Where the evaluation loss is lowest, first of all if equal.

        0 says that training has not improved on the model it was given, which the caller should then keep instead.
        """
        return min(self.evaluations, key=self.evaluations.__getitem__)


def recover(
    model: PreTrainedModel,
    keep_masks: Mapping[str, Tensor],
    windows: Tensor,
    evaluation_windows: Tensor,
    settings: RecoverySettings,
    state: Path,
    device: str = "cpu",
    teacher: nn.Module | None = None,
    moments: Mapping[str, Tensor] | None = None,
    tensorboard: Path | None = None,
    adapter: Path | None = None,
    keep_moments: bool = False,
    read: Callable[[nn.Module], None] | None = None,
) -> Recovery:
    """Finetune a model on windows of tokens, int64 [n, length], so that what the masks prune stays zero.

    The model is of `settings.weights_dtype`.
    `state` is the folder `training_state` yields: training goes on from the last checkpoint in it. device: `cpu` or
    `cuda`; teacher: the dense model, where `distill_weight` is above 0; moments: of an optimizer to go on with;
    tensorboard: folder for the learning curves; adapter: folder for LoRA's, which is merged either way; keep_moments:
    whether the optimizer is wanted too; read: what gives a part of model and teacher its weights, where they are in
    shards and on the meta device until then (`sharding.reader`); there the mappings have of every tensor this process's
    rows, but for LoRA's masks. Raises UserError when there is no text, when LoRA targets match nothing, and when the
    loss is not finite.
    """
    _check_texts(training=windows, evaluation=evaluation_windows)
    if settings.gradient_checkpointing and not model.supports_gradient_checkpointing:
        kind = type(model).__name__
        raise UserError(f"recovery: gradient_checkpointing: transformers has none for a {kind}; set it to false")
    transformers.set_seed(settings.seed)
    use_chunked_cross_entropy_(model)
    if settings.method == "lora":
        shape = (settings.lora_targets, settings.lora_rank, settings.lora_alpha, settings.lora_dropout)
        model = add_masked_adapter(model, keep_masks, *shape, low_memory=settings.memory == "low")
    training = training_arguments(settings, state, device)
    if settings.processes > 1 and not settings.sharded:
        training.ddp_find_unused_parameters = not _text_reaches_all(model, windows[:1, :1])
    with _memory_told(settings.batch_size):
        _place(model, teacher, settings.sharded, training.device, read)
        trainer = (ShardedTrainer if settings.sharded else MaskedTrainer)(
            # An adapter's own mask does all there is to do.
            keep_masks={} if settings.method == "lora" else keep_masks,
            distillation=settings.distillation(teacher),
            moments=moments,
            low_memory=settings.memory == "low",
            model=model,
            args=training,
            train_dataset=Windows(windows),
            eval_dataset=Windows(evaluation_windows),
            optimizer_cls_and_kwargs=optimizer_of(settings),
        )
        _train(trainer, last_checkpoint(state), settings.early_stopping, tensorboard)
    moments = moments_of(trainer) if keep_moments else {}
    model = _finished(model, keep_masks, settings, adapter)
    log = _curve(trainer.state.log_history)
    tokens = trainer.state.global_step * settings.windows_per_step * windows.shape[1]
    tokens = min(tokens, settings.epochs * windows.numel())
    return Recovery(model, log, trainer.state.global_step, tokens, moments)


def _check_texts(**windows: Tensor) -> None:
    for name, given in windows.items():
        if len(given) == 0:
            raise UserError(
                f"recovery: the {name} text is shorter than one window: shorten sequence_length or give more text"
            )


def _text_reaches_all(model: nn.Module, tokens: Tensor) -> bool:
    """Whether what a model makes of tokens depends on all that is trained: not on a part for images, nor on an indexer
    that is trained by itself. Processes would wait for the gradients of these."""
    # Only who took part in it is asked, so nothing is held for the way back.
    with torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: None):
        logits = model.eval()(input_ids=tokens).logits
    nodes, seen = [logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    reached = {node.variable for node in seen if hasattr(node, "variable")}
    return all(parameter in reached for parameter in model.parameters() if parameter.requires_grad)


def _place(
    model: nn.Module,
    teacher: nn.Module | None,
    sharded: bool,
    device: torch.device,
    read: Callable[[nn.Module], None] | None,
) -> None:
    """Put what the Trainer does not put where it is needed."""
    if sharded:
        for each in filter(None, (model, teacher)):
            shard_(each, device.type, read)
    elif teacher is not None:
        teacher.to(device)


def _finished(
    model: PreTrainedModel, keep_masks: Mapping[str, Tensor], settings: RecoverySettings, adapter: Path | None
) -> PreTrainedModel:
    """What was trained as a model like the one before: its adapter merged, its zeros checked."""
    if settings.method == "lora":
        if adapter:
            save_adapter(model, adapter)
        model = merge(model)
    check_pruned_are_zero(model, keep_masks)
    return model


def check_pruned_are_zero(model: nn.Module, keep_masks: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError, since it would be a fault of this module, if a pruned weight is not zero."""
    for name, keep in keep_masks.items():
        weight = model.get_submodule(name).weight.detach()
        held = local(weight)
        if keep.shape != held.shape:
            keep = keep[own_rows(len(keep))]
        revived = int(held[~keep.to(held.device)].count_nonzero())
        if revived:
            raise RuntimeError(f"{name}: finetuning revived {revived} pruned weights")


def _train(trainer: Trainer, checkpoint: Path | None, patience: int, tensorboard: Path | None) -> None:
    """Train, from a checkpoint if there is one; the model ends as at its best evaluation after the first step."""
    done = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else TrainerState()
    early_stop = EarlyStop(patience)
    if early_stop.is_due(done.log_history):
        trainer.state = done
        trainer.create_optimizer()
        trainer.load_optimizer(checkpoint)
        trainer._load_best_model()
        return
    trainer.add_callback(early_stop)
    if tensorboard and is_first():
        trainer.add_callback(TensorBoard(tensorboard, done.global_step))
    # The evaluation before the first step is part of a checkpoint's log already.
    trainer.args.eval_on_start = checkpoint is None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


@contextmanager
def _memory_told(batch_size: int) -> Iterator[None]:
    """`UserError` where there is no memory: for the model, its teacher, or what is computed of a batch."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"recovery: out of memory at batch_size {batch_size}: lower it, or sequence_length") from error


def _curve(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The rows of a Trainer's log that are losses, without the times it took."""
    columns = ("step", "epoch", "loss", "eval_loss", "learning_rate")
    rows = [row for row in history if "loss" in row or "eval_loss" in row]
    return [{column: row[column] for column in columns if column in row} for row in rows]
