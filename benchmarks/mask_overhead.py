"""What keeping the mask costs per training step: time in masking gradients and weights against the rest of the step.

    python benchmarks/mask_overhead.py

One run of full finetuning on a random Llama of the bundled model's size, half of its weights pruned. Both times are
taken in the same steps, so what else the machine does falls on both, and on one thread, since several that wait for one
another measure the other processes. A step has few tokens (512 in one batch), which is the worst case: masking costs
the same however many tokens a step has. The first steps warm up and do not count. The target is at most 5 %.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow" / "scripts"))
from stepdown.recover.settings import RecoverySettings, training_arguments
from stepdown.recover.trainer import MaskedTrainer, Windows

TOKENS, BATCH, STEPS, WARM_UP = 128, 4, 16, 4
SPARSITY = 0.5


class TimedTrainer(MaskedTrainer):
    """Adds up the seconds spent in masking."""

    masking = 0.0

    def _mask_gradients(self) -> None:
        begin = time.perf_counter()
        super()._mask_gradients()
        self.masking += time.perf_counter() - begin

    def _mask_weights(self, *arguments) -> None:
        begin = time.perf_counter()
        super()._mask_weights(*arguments)
        self.masking += time.perf_counter() - begin


class StepTimer(TrainerCallback):
    """(seconds of the step, seconds of it in masking) for each step, logging left out."""

    def __init__(self, trainer: TimedTrainer) -> None:
        self.trainer = trainer
        self.steps: list[tuple[float, float]] = []

    def on_step_begin(self, args, state, control, **_) -> None:
        self.trainer.masking = 0.0
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **_) -> None:
        self.steps.append((time.perf_counter() - self.begin, self.trainer.masking))


def measure(bf16: bool) -> tuple[float, float]:
    """Mean milliseconds of a step without masking, and of masking."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config)
    linears = [
        name for name, module in model.model.named_modules(prefix="model") if isinstance(module, torch.nn.Linear)
    ]
    masks = {name: torch.rand(model.get_submodule(name).weight.shape) >= SPARSITY for name in linears}
    windows = Windows(torch.randint(0, config.vocab_size, (BATCH * STEPS, TOKENS)))
    settings = RecoverySettings(epochs=1, batch_size=BATCH, gradient_accumulation=1, bf16=bf16)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(settings, Path(folder), "cpu")
        arguments.set_evaluate("no")
        arguments.load_best_model_at_end = False
        arguments.set_save("no")
        trainer = TimedTrainer(masks, model=model, args=arguments, train_dataset=windows)
        timer = StepTimer(trainer)
        trainer.add_callback(timer)
        trainer.train()
    counted = timer.steps[WARM_UP:]
    masking = sum(masked for _, masked in counted) / len(counted)
    return 1e3 * (sum(step for step, _ in counted) / len(counted) - masking), 1e3 * masking


def main() -> None:
    torch.set_num_threads(1)
    print(__doc__.split("\n\n", 2)[2])
    print(f"torch {torch.__version__}, mean of {STEPS - WARM_UP} steps")
    print(f"{'':8}{'step without masks':>22}{'masks':>12}{'overhead':>12}")
    for bf16 in (False, True):
        step, masking = measure(bf16)
        print(f"{'bf16' if bf16 else 'float32':8}{step:>19.1f} ms{masking:>9.2f} ms{masking / step:>11.2%}")


if __name__ == "__main__":
    main()
