"""How to finetune: what a user may set, checked, and as the Trainer is told it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import UserError
from ..plan.training_memory import TrainingPlan

# What only looks at settings, such as zero epochs, should not wait seconds for these.
if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .distillation import Distillation

ALL_LINEAR = "all-linear"
METHODS = ("full", "lora")
MEMORY = ("full", "low")
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
    spreads the model over the processes, which otherwise each hold all of it. memory: `full` trains float32 weights,
    `low` bfloat16 ones with `BFloat16AdamW`. For distillation see `distillation.Distillation`.
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
    memory: str = "full"
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
        for name in ("weight_decay", "warmup_steps", "early_stopping", "distill_hidden_states"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        # What NumPy's generators take.
        self._require("seed", 0 <= self.seed < 2**32, "0 or more, below 2^32")
        choices = {"method": METHODS, "memory": MEMORY, "learning_rate_schedule": LEARNING_RATE_SCHEDULES}
        for name, known in choices.items():
            self._require(name, getattr(self, name) in known, " or ".join(known))
        self._require("memory", self.bf16 or self.memory == "full", "full, or bf16, in which low computes")
        self._require("distill_weight", 0 <= self.distill_weight <= 1, "from 0 to 1")
        self._require("sharded", self.processes > 1 or not self.sharded, "several processes, or no")
        self._require("lora_dropout", 0 <= self.lora_dropout < 1, "at least 0 and below 1")

    @property
    def windows_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation * self.processes

    @property
    def weights_dtype(self) -> torch.dtype:
        """What the weights of the model are while it trains."""
        return torch.bfloat16 if self.memory == "low" else torch.float32

    def plan(self, sequence_length: int) -> TrainingPlan:
        """What of it memory depends on."""
        same = ("method", "memory", "batch_size", "processes", "sharded", "gradient_checkpointing", "lora_rank")
        values = {name: getattr(self, name) for name in same}
        return TrainingPlan(sequence_length=sequence_length, distilled=self.distill_weight > 0, **values)

    def distillation(self, teacher: nn.Module | None) -> "Distillation | None":
        """How to learn from the teacher, if at all."""
        from .distillation import Distillation

        if teacher is None or self.distill_weight == 0:
            return None
        return Distillation(teacher, self.distill_weight, self.distill_temperature, self.distill_hidden_states)

    def _require(self, name: str, fulfilled: bool, wanted: str) -> None:
        if not fulfilled:
            raise UserError(f"recovery: {name} is {getattr(self, name)!r}: give {wanted}")


def training_arguments(settings: RecoverySettings, state: Path, device: str) -> "TrainingArguments":
    from transformers import TrainingArguments

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
        # Of float32 weights; bfloat16 ones compute in it as they are.
        bf16=settings.bf16 and settings.memory == "full",
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and settings.processes > 1 else None,
        ddp_find_unused_parameters=False,
        # They are the same everywhere, and LoRA's masks are as large as the matrices.
        ddp_broadcast_buffers=False,
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


def optimizer_of(settings: RecoverySettings) -> tuple[type[torch.optim.Optimizer], dict] | None:
    """The optimizer as the Trainer is given one; none where it is torch's AdamW, which is the Trainer's own.

    LoRA's adapters are float32 whatever the model is: nothing is saved on them.
    """
    from .bf16_adamw import BFloat16AdamW

    if settings.memory == "full" or settings.method == "lora":
        return None
    return BFloat16AdamW, {"lr": settings.learning_rate, "seed": settings.seed}
