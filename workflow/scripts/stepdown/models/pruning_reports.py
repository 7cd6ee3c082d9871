"""The report of a one-shot run: what was asked of every matrix, what came of it; its checkpoint is held against it."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from ..files import NUMBER, read_result
from ..plan.runs import Run, parse_run
from ..plan.steps import check_iteration
from ..tensors.masks import count_zeros
from ..tensors.patterns import n_of_m
from .checkpoint import Checkpoint

FORMAT = "stepdown one-shot 1"
SHARE = NUMBER | None
# What is read of a report.
FORM = {
    "format": FORMAT,
    **dict.fromkeys(("run", "method", "pattern", "layers", "base_model"), str),
    "iteration": int,
    "sparsity": {"target": SHARE},
    "matrices": {str: {"shape": [int], "target": SHARE, "zeros": int}},
}


def describe_pruning(
    run: Run,
    base_model: str,
    shapes: Mapping[str, tuple[int, int]],
    sparsities: Mapping[str, Fraction | None],
    zeros: Mapping[str, int],
) -> dict:
    """The report as it is written to a file.

    All mappings go by the name of a matrix; sparsities: the shares of zeros asked for, None where the pattern has none
    of its own; zeros: the numbers found.
    """
    entries = {name: rows * columns for name, (rows, columns) in shapes.items()}
    return {
        "format": FORMAT,
        "run": run.name,
        "method": run.method,
        "pattern": run.pattern_name,
        "layers": run.layers,
        "base_model": base_model,
        "iteration": 1,
        "sparsity": {"target": _number(run.sparsity), "achieved": sum(zeros.values()) / sum(entries.values())},
        "matrices": {
            name: {
                "shape": list(shape),
                "target": _number(sparsities[name]),
                "achieved": zeros[name] / entries[name],
                "zeros": zeros[name],
            }
            for name, shape in shapes.items()
        },
    }


def read_report(path: Path | str) -> dict:
    """Read a report; raises `UserError` when the file is none."""
    return read_result(Path(path), "the report of a one-shot run", FORM)


def check_same_model(report: dict, path: Path | str, checkpoint: Checkpoint) -> None:
    """Raise `UserError` unless the checkpoint is of the report's base model and has its matrices."""
    if checkpoint.identity() != {"base_model": report["base_model"], "iteration": str(report["iteration"])}:
        raise UserError(f"{path}: report of another model than {checkpoint.folder}; give the one made with it")
    for name, matrix in report["matrices"].items():
        weight = f"{name}.weight"
        found = list(checkpoint.shape(weight)) if weight in checkpoint else None
        if found != matrix["shape"]:
            raise UserError(f"{path}: {name} is {matrix['shape']} in the report, {found} in {checkpoint.folder}")


def check_zeros(report: dict, name: str, weight: Tensor, folder: Path | str) -> None:
    """Raise `UserError` when a weight [out, in] has fewer zeros than the report says, or a group more than N of M."""
    zeros, due = count_zeros(weight), report["matrices"][name]["zeros"]
    if zeros < due:
        raise UserError(f"{folder}: {name}: {zeros} zeros where {due} are due; pruned weights were revived")
    run = parse_run(report["run"], [report["method"]])
    if run.m and (fault := n_of_m(run.n, run.m).fault(weight)):
        raise UserError(f"{folder}: {name}: {fault}; pruned weights were revived")


def describe_checkpoint(step: str, model_name: str, path: Path, folder: Path) -> dict:
    """What the weights of a run show, as `evaluation.describe_model` has it of a step with tiers.

    Raises `UserError` when a matrix has fewer zeros than the report at `path` says.
    """
    report, checkpoint = read_report(path), Checkpoint(folder)
    check_iteration(path, step, report["iteration"])
    if "/" in step and (run := step.partition("/")[2]) != report["run"]:
        raise UserError(f"{path}: report of {report['run']}, not of {run}; give the one of {step}")
    check_same_model(report, path, checkpoint)
    zeros, weights, per_matrix = 0, 0, {}
    for name in report["matrices"]:
        weight = checkpoint.matrix(name)
        check_zeros(report, name, weight, folder)
        per_matrix[name] = count_zeros(weight) / weight.numel()
        zeros, weights = zeros + count_zeros(weight), weights + weight.numel()
    return {
        "step": step,
        "iteration": report["iteration"],
        "model": model_name,
        "perplexity": {},
        "pruning": {key: report[key] for key in ("method", "pattern", "layers")},
        "sparsity": {
            "target": report["sparsity"]["target"],
            "overall": zeros / weights,
            "weights": weights,
            "per_matrix": per_matrix,
            "target_per_matrix": {name: matrix["target"] for name, matrix in report["matrices"].items()},
        },
    }


def _number(sparsity: Fraction | None) -> float | None:
    return None if sparsity is None else float(sparsity)
