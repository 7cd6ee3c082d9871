"""What watches a training: ends it when it must end, and shows how it goes."""

import math
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from ..errors import UserError


class FiniteLoss(TrainerCallback):
    """Ends a training that has diverged, before anything of it is saved."""

    def on_log(self, args, state, control, logs=None, **_) -> None:
        mend = f"lower learning_rate (now {args.learning_rate:g})" if state.global_step else "the model given is broken"
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                where = f"at step {state.global_step} of {state.max_steps}"
                raise UserError(f"recovery: {name} is {logs[name]} {where}: {mend}")


class EarlyStop(TrainerCallback):
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


class TensorBoard(TrainerCallback):
    """Writes the learning curves where TensorBoard finds them; what a killed run wrote ahead of `step` is purged."""

    def __init__(self, folder: Path, step: int) -> None:
        # Costs a second to import, for those who want it.
        from torch.utils.tensorboard import SummaryWriter

        if step == 0:
            for events in folder.glob("events.out.tfevents.*"):
                events.unlink()
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        for name in ("loss", "eval_loss", "learning_rate", "grad_norm"):
            if name in logs:
                self.writer.add_scalar(name, logs[name], state.global_step)

    def on_train_end(self, args, state, control, **_) -> None:
        self.writer.close()


class Bar(ProgressCallback):
    """The Trainer's bar, with the losses beside it instead of a line per step."""

    def on_log(self, args, state, control, logs=None, **_) -> None:
        losses = {name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in logs}
        if self.training_bar is not None and losses:
            self.training_bar.set_postfix(losses)
