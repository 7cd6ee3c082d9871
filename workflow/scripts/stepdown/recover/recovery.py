"""Finetuning under a fixed keep mask, full or LoRA; knows nothing of where the mask comes from.

`keep_masks` maps the name of a linear (without `.weight`) to its keep mask, bool [out, in]: True where the weight may
change, False where it is zero and stays zero.
"""

import contextlib
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from ..errors import UserError
from ..files import SINGLE_FILE_NAME
from ..models.checkpoint import load_tensors, save_tensors
from .distillation import Distillation
from .lora import ALL_LINEAR, add_masked_adapter, save_adapter
from .processes import is_first
from .sharding import load_optimizer, load_weights, save_optimizer, save_weights, shard_, sharded_like, unshard_, whole
from .training_state import last_checkpoint

METHODS = ("full", "lora")
# What AdamW keeps of a parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
# Our names of the learning-rate schedules, and the Trainer's.
LEARNING_RATE_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class RecoverySettings:
    """How to finetune. Raises UserError for a value that cannot be meant.

    A step is one update of the weights: `batch_size * gradient_accumulation` windows in each of the `processes`.
    `evaluation_steps` counts steps between evaluations, each of which is also a checkpoint to resume from;
    `early_stopping` counts evaluations without a new lowest loss after which training ends, 0 for never. `sharded`
    spreads the model over the processes, which otherwise each hold all of it. For distillation see
    `distillation.Distillation`.
    """

    epochs: int
    method: str = "full"
    batch_size: int = 4
    gradient_accumulation: int = 4
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    warmup_steps: int = 0
    learning_rate_schedule: str = "cosine"
    max_grad_norm: float = 1.0
    bf16: bool = True
    evaluation_steps: int = 100
    checkpoints_kept: int = 2
    lora_rank: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = (ALL_LINEAR,)
    distill_weight: float = 0.0
    distill_temperature: float = 1.0
    distill_hidden_states: float = 0.0
    gradient_checkpointing: bool = False
    early_stopping: int = 0
    processes: int = 1
    sharded: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "batch_size",
            "gradient_accumulation",
            "evaluation_steps",
            "checkpoints_kept",
            "lora_rank",
            "processes",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "lora_alpha", "max_grad_norm", "distill_temperature"):
            self._require(name, 0 < getattr(self, name) < math.inf, "a finite number above 0")
        for name in ("weight_decay", "warmup_steps", "seed", "early_stopping", "distill_hidden_states"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        for name, known in (("method", METHODS), ("learning_rate_schedule", LEARNING_RATE_SCHEDULES)):
            self._require(name, getattr(self, name) in known, " or ".join(known))
        self._require("distill_weight", 0 <= self.distill_weight <= 1, "from 0 to 1")
        self._require("sharded", self.processes > 1 or not self.sharded, "several processes, or no")
        self._require("lora_dropout", 0 <= self.lora_dropout < 1, "at least 0 and below 1")

    @property
    def windows_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation * self.processes

    def distillation(self, teacher: nn.Module | None) -> Distillation | None:
        """How to learn from the teacher, if at all."""
        if teacher is None or self.distill_weight == 0:
            return None
        return Distillation(teacher, self.distill_weight, self.distill_temperature, self.distill_hidden_states)

    def _require(self, name: str, fulfilled: bool, wanted: str) -> None:
        if not fulfilled:
            raise UserError(f"recovery: {name} is {getattr(self, name)!r}: give {wanted}")


@dataclass(frozen=True)
class Recovery:
    """What finetuning came to: the model as it was at its best evaluation after the first step, and how it got there.

    log: rows {"step", "epoch", "loss", "learning_rate"} of every step and {"step", "epoch", "eval_loss"} of every
    evaluation, the one before the first step included; tokens: trained on, all epochs together; moments: of the
    optimizer after the last step, see `moments_of`.
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
) -> Recovery:
    """Finetune a float32 model on windows of tokens, int64 [n, length], so that what the masks prune stays zero.

    `state` is the folder `training_state` yields: training goes on from the last checkpoint in it. device: `cpu` or
    `cuda`; teacher: the dense model, where `distill_weight` is above 0; moments: of an optimizer to go on with;
    tensorboard: folder for the learning curves; adapter: folder for LoRA's, which is merged either way. Raises
    UserError when there is no text, when LoRA targets match nothing, and when the loss is not finite.
    """
    for name, given in (("training", windows), ("evaluation", evaluation_windows)):
        if len(given) == 0:
            raise UserError(
                f"recovery: the {name} text is shorter than one window: shorten sequence_length or give more text"
            )
    transformers.set_seed(settings.seed)
    if settings.method == "lora":
        shape = (settings.lora_targets, settings.lora_rank, settings.lora_alpha, settings.lora_dropout)
        model = add_masked_adapter(model, keep_masks, *shape)
    training = _training_arguments(settings, state, device)
    if settings.sharded:
        for each in filter(None, (model, teacher)):
            shard_(each, training.device.type)
    elif teacher is not None:
        teacher.to(training.device)
    trainer = (_ShardedTrainer if settings.sharded else _MaskedTrainer)(
        # An adapter's own mask does all there is to do.
        {} if settings.method == "lora" else keep_masks,
        settings.distillation(teacher),
        moments,
        model=model,
        args=training,
        train_dataset=_Windows(windows),
        eval_dataset=_Windows(evaluation_windows),
    )
    _train(trainer, last_checkpoint(state), settings.early_stopping, tensorboard)
    moments = moments_of(trainer)
    if settings.sharded:
        unshard_(model)
    if is_first():
        if settings.method == "lora":
            if adapter:
                save_adapter(model, adapter)
            model = model.merge_and_unload()
        check_pruned_are_zero(model, keep_masks)
    log = _curve(trainer.state.log_history)
    tokens = trainer.state.global_step * settings.windows_per_step * windows.shape[1]
    tokens = min(tokens, settings.epochs * windows.numel())
    return Recovery(model, log, trainer.state.global_step, tokens, moments)


def check_pruned_are_zero(model: nn.Module, keep_masks: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError, since it would be a fault of this module, if a pruned weight is not zero."""
    for name, keep in keep_masks.items():
        weight = model.get_submodule(name).weight
        revived = int(weight.detach()[~keep.to(weight.device)].count_nonzero())
        if revived:
            raise RuntimeError(f"{name}: finetuning revived {revived} pruned weights")


# ---------------------------------------------------------------- training


class _Windows(torch.utils.data.Dataset):
    """Windows of tokens, [n, length], as a causal language model is trained on them; the model shifts the labels."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class _MaskedTrainer(Trainer):
    """A Trainer that zeroes the gradients of pruned weights before they are clipped, and the weights after each step.

    With a zero gradient AdamW leaves a zero weight at zero, decay and momentum included; that the weights are masked as
    well makes it hold whatever the optimizer.
    """

    def __init__(
        self,
        keep_masks: Mapping[str, Tensor],
        distillation: Distillation | None = None,
        moments: Mapping[str, Tensor] | None = None,
        **arguments,
    ) -> None:
        super().__init__(**arguments)
        self._moments = moments or {}
        self._distillation = distillation
        if distillation:
            # Its loss is a mean over the tokens of a batch, and windows are equally long.
            self.loss_is_scaled_for_ga = False
        # Multiplying by bytes is four times as fast on a CPU as multiplying by the same bytes called bool.
        self._masked = [
            (weight, sharded_like(keep.view(torch.uint8), weight))
            for name, keep in keep_masks.items()
            if not keep.all()
            for weight in [self.model.get_submodule(name).weight]
        ]
        self.remove_callback(PrinterCallback)
        self.add_callback(_FiniteLoss())
        if sys.stderr.isatty():
            self.add_callback(_Bar())

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
        return loss

    def create_optimizer(self, *arguments, **keywords) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*arguments, **keywords)
        optimizer.register_step_post_hook(self._mask_weights)
        for name, parameter in self.model.named_parameters():
            state = {key: self._moments[f"{name} {key}"] for key in MOMENTS if f"{name} {key}" in self._moments}
            if state:
                optimizer.state[parameter] = {key: sharded_like(value, parameter) for key, value in state.items()}
        return optimizer

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

    def _mask_gradients(self) -> None:
        for weight, keep in self._masked:
            if weight.grad is not None:
                weight.grad.mul_(keep)

    @torch.no_grad()
    def _mask_weights(self, *_) -> None:
        for weight, keep in self._masked:
            weight.mul_(keep)


class _ShardedTrainer(_MaskedTrainer):
    """The same for a model that `shard_` has sharded; the Trainer itself would not on CPUs, nor save such a one."""

    def __init__(self, *arguments, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        # What it calls a model that is in its place and adds up its own gradients.
        self.is_distributed_loading_by_transformers = True

    def load_optimizer(self, checkpoint: Path) -> None:
        # Accelerate wraps it once training has begun.
        load_optimizer(self.model, getattr(self.optimizer, "optimizer", self.optimizer), checkpoint)

    def _defer_fsdp_gradient_reduction(self) -> contextlib.AbstractContextManager:
        """Gradients are added up after every batch of an accumulation: whole ones would not fit beside each other."""
        return contextlib.nullcontext()

    def _save(self, output_dir: str, state_dict: dict[str, Tensor] | None = None) -> None:
        save_weights(self.model, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_optimizer(self.model, self.optimizer.optimizer, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.load_optimizer(Path(checkpoint))
            state = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True, map_location="cpu")
            self.lr_scheduler.load_state_dict(state)


class _FiniteLoss(TrainerCallback):
    """Ends a training that has diverged, before anything of it is saved."""

    def on_log(self, args, state, control, logs=None, **_) -> None:
        mend = f"lower learning_rate (now {args.learning_rate:g})" if state.global_step else "the model given is broken"
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                where = f"at step {state.global_step} of {state.max_steps}"
                raise UserError(f"recovery: {name} is {logs[name]} {where}: {mend}")


class _EarlyStop(TrainerCallback):
    """Ends a training whose evaluation loss has not been lower for some time; the log is all it remembers."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def is_due(self, history: list[dict[str, float]]) -> bool:
        """Whether the last `patience` evaluations of a log, if that is not 0, were no better than the best before."""
        losses = [row["eval_loss"] for row in history if "eval_loss" in row]
        if not 0 < self.patience < len(losses):
            return False
        return min(losses[-self.patience :]) >= min(losses[: -self.patience])

    def on_evaluate(self, args, state, control, **_) -> None:
        control.should_training_stop |= self.is_due(state.log_history)


class _TensorBoard(TrainerCallback):
    """Writes the learning curves where TensorBoard finds them; what a killed run wrote ahead of `step` is purged."""

    def __init__(self, folder: Path, step: int) -> None:
        # Costs a second to import, for those who want it.
        from torch.utils.tensorboard import SummaryWriter

        if step == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        for name in ("loss", "eval_loss", "learning_rate", "grad_norm"):
            if name in logs:
                self.writer.add_scalar(name, logs[name], state.global_step)

    def on_train_end(self, args, state, control, **_) -> None:
        self.writer.close()


class _Bar(ProgressCallback):
    """The Trainer's bar, with the losses beside it instead of a line per step."""

    def on_log(self, args, state, control, logs=None, **_) -> None:
        losses = {name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in logs}
        if self.training_bar is not None and losses:
            self.training_bar.set_postfix(losses)


def _training_arguments(settings: RecoverySettings, state: Path, device: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(state),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=LEARNING_RATE_SCHEDULES[settings.learning_rate_schedule],
        max_grad_norm=settings.max_grad_norm,
        # By their older names, which every transformers 5 knows.
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=settings.bf16,
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and settings.processes > 1 else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=device != "cpu",
        eval_strategy="steps",
        eval_steps=settings.evaluation_steps,
        save_strategy="steps",
        save_steps=settings.evaluation_steps,
        save_total_limit=settings.checkpoints_kept,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        # Every step: a loss that is not finite is seen at once, and a resumed run logs what an undisturbed one does.
        logging_steps=1,
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        label_names=["labels"],
        remove_unused_columns=False,
        seed=settings.seed,
        report_to="none",
        disable_tqdm=True,
    )


def _train(trainer: Trainer, checkpoint: Path | None, patience: int, tensorboard: Path | None) -> None:
    """Train, from a checkpoint if there is one; the model ends as at its best evaluation after the first step."""
    done = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else TrainerState()
    early_stop = _EarlyStop(patience)
    if early_stop.is_due(done.log_history):
        trainer.state = done
        trainer.create_optimizer()
        trainer.load_optimizer(checkpoint)
        trainer._load_best_model()
        return
    trainer.add_callback(early_stop)
    if tensorboard and is_first():
        trainer.add_callback(_TensorBoard(tensorboard, done.global_step))
    # The evaluation before the first step is part of a checkpoint's log already.
    trainer.args.eval_on_start = checkpoint is None
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        batch_size = trainer.args.per_device_train_batch_size
        raise UserError(f"recovery: out of memory at batch_size {batch_size}: lower it, or sequence_length") from error


def moments_of(trainer: Trainer) -> dict[str, Tensor]:
    """What AdamW remembers of each parameter, by "name key": its two moments and the number of steps, on the CPU."""
    state = trainer.optimizer.state
    parameters = trainer.model.named_parameters()
    return {f"{name} {key}": whole(state[p][key]).cpu() for name, p in parameters if p in state for key in MOMENTS}


def _curve(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The rows of a Trainer's log that are losses, without the times it took."""
    columns = ("step", "epoch", "loss", "eval_loss", "learning_rate")
    rows = [row for row in history if "loss" in row or "eval_loss" in row]
    return [{column: row[column] for column in columns if column in row} for row in rows]
