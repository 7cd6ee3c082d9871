"""Measure a model on tasks of lm-eval, named there or described by YAML files of one's own."""

import argparse
import difflib
from pathlib import Path

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from stepdown import cli
from stepdown.errors import UserError
from stepdown.files import write_json
from stepdown.models import loading
from stepdown.models.decoder import choose_device


def main(arguments: argparse.Namespace) -> None:
    if arguments.task_folder and not arguments.task_folder.is_dir():
        raise UserError(f"--task-folder {arguments.task_folder}: no such folder; give one with the tasks' YAML files")
    manager = TaskManager(include_path=str(arguments.task_folder) if arguments.task_folder else None)
    check_tasks(arguments.tasks, manager.all_tasks)
    found = lm_eval.simple_evaluate(
        model=load_model(arguments),
        tasks=arguments.tasks,
        num_fewshot=arguments.shots,
        limit=arguments.examples,
        task_manager=manager,
        random_seed=0,
        numpy_random_seed=0,
        torch_random_seed=0,
        fewshot_random_seed=0,
        bootstrap_iters=0,
    )
    shots = "as each task has it" if arguments.shots is None else arguments.shots
    examples = "all" if arguments.examples is None else f"the first {arguments.examples}"
    protocol = f"lm-eval {lm_eval.__version__}; shots: {shots}; examples: {examples}"
    tasks = {task: metrics_of(values) for task, values in found["results"].items()}
    write_json(arguments.output, {"step": arguments.step, "tasks": tasks, "protocol": protocol})


def check_tasks(wanted: list[str], known: list[str]) -> None:
    for task in wanted:
        if task not in known:
            near = difflib.get_close_matches(task, known, 1)
            hint = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists those there are"
            raise UserError(f"zero-shot task {task!r}: unknown to lm-eval and not in the task folder; {hint}")


def load_model(arguments: argparse.Namespace) -> HFLM:
    """The model as lm-eval takes it: whole, and in the type of its checkpoint."""
    device = choose_device(arguments.device)
    model = loading.load_model(arguments.model, "auto", arguments.trust_remote_code).to(device).eval()
    tokenizer = loading.load_tokenizer(arguments.model, arguments.trust_remote_code)
    torch.manual_seed(0)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch_size)


def metrics_of(values: dict) -> dict[str, float]:
    """The metrics of a task: `acc,none` is acc; standard errors and names are left out."""
    named = {key.partition(",")[0]: value for key, value in values.items() if "," in key}
    return {metric: value for metric, value in named.items() if isinstance(value, float) and "_stderr" not in metric}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    cli.add_model_arguments(parser)
    parser.add_argument("--step", required=True, help="name of the step in the result, such as iter3")
    parser.add_argument("--tasks", nargs="+", required=True, help="names of tasks")
    parser.add_argument("--task-folder", type=Path, help="folder with YAML files of tasks that lm-eval does not know")
    parser.add_argument("--shots", type=int, help="examples in the prompt (default: as the task has it)")
    parser.add_argument("--examples", type=int, help="use no more of each task than this (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, help="requests at a time (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="JSON: task -> metric -> value")
    cli.run(main, parser)
