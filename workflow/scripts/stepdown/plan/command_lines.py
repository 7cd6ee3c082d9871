"""From sections of the configuration to words of command lines."""

import json
from collections.abc import Iterable, Mapping

from .schedule import Row


def flags(options: Mapping) -> list[str]:
    """Options as words of a command line: {"batch_size": 4, "bf16": False, "k": None} -> --batch-size 4 --no-bf16."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return words


def text_words(texts: Iterable[str | dict], splits: tuple[str, ...]) -> list[str]:
    """Texts as the scripts take them: a name, a path, or JSON with a path for each split that is read."""
    return [text if isinstance(text, str) else json.dumps({split: text[split] for split in splits}) for text in texts]


def recovery_options(recovery: dict, step_folder: str, teacher: str | None, one_schedule: dict) -> dict:
    """How a step is finetuned. Who an option belongs to is told it: LoRA's rank must not rerun full finetuning.

    recovery: that section of the configuration; teacher: the model to learn from as well, if any; one_schedule: what
    `one_schedule_options` says of the step.
    """
    apart = ("text", "lora", "distill", "one_schedule")
    options = {key: value for key, value in recovery.items() if key not in apart} | one_schedule
    if recovery["method"] == "lora":
        options |= {f"lora_{key}": value for key, value in recovery["lora"].items() if key != "keep_adapter"}
        options |= {"output_adapter": f"{step_folder}/adapter"} if recovery["lora"]["keep_adapter"] else {}
    if teacher:
        options |= {f"distill_{key}": value for key, value in recovery["distill"].items()} | {"teacher": teacher}
    return options


def passing_on_options(recovery: dict, one_schedule: dict) -> dict:
    """What a step of no epochs is told, which is passed on as it is: no setting of a training, which would rerun it."""
    moments = {key: file for key, file in one_schedule.items() if key in ("optimizer", "output_optimizer")}
    return {"sequence_length": recovery["sequence_length"], **moments}


def one_schedule_options(schedule: list[Row], row: Row, method: str, results: str) -> dict:
    """One schedule over the iterations: the first warms up, the last comes down, and the optimizer goes on in between.

    An iteration asks for nothing of later rows but whether there are any, so that an edited row reruns it and those
    after it. LoRA's adapter is a new one in every iteration, and so is its optimizer.
    """
    options = {}
    carried = method == "full"
    if row is not schedule[-1]:
        options["learning_rate_schedule"] = "constant"
        if carried:
            options["output_optimizer"] = f"{results}/iter{row.iteration}/optimizer.safetensors"
    if carried and any(earlier.epochs for earlier in schedule[: row.iteration - 1]):
        options |= {"warmup_steps": 0, "optimizer": f"{results}/iter{row.iteration - 1}/optimizer.safetensors"}
    return options
