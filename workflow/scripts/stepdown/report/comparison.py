"""All ways of pruning a model side by side: what they kept, what they lost, what they cost. Standard library only."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import UserError
from .summary import BASE, difference_percent, iteration_of

# Jobs of a step that neither prune nor finetune it.
MEASURING = {"base_model", "evaluate", "evaluate_base", "evaluate_compressed", "zero_shot"}
HEADINGS = ("run", "method", "pattern", "zeros %", "pruned", "finetuned", "+", "+ %", "pruning s", "finetuning s", "MB")
SIZES = ("parameters", "nonzeros", "bytes", "packed_bytes")
SIZE_HEADINGS = ("run", "parameters", "nonzeros", "bytes", "packed", "prefill /s", "to dense", "decode /s", "to dense")


def rows(
    steps: Sequence[dict], benchmarks: Path, tasks: dict[str, dict[str, float]], measurements: dict[str, dict]
) -> list[dict]:
    """One flat row per step of `summary.read_steps`.

    The differences are those of the finished model to the dense one. Seconds and memory are what the jobs of a step
    took, those of the iterations before it included; None where `benchmarks`, a folder of Snakemake's benchmark files
    by step, has none. tasks: step -> metric of a zero-shot task -> value, as of `read_tasks`; measurements: step ->
    column -> value, as of `read_measurements`.
    """
    metrics = sorted({metric for found in tasks.values() for metric in found})
    table = []
    for step in steps:
        row = {"run": step["step"], **step["pruning"], "sparsity": step["sparsity"]}
        for text, perplexity in step["perplexity"].items():
            final, dense = perplexity["finetuned"], perplexity["base"]
            row |= {
                f"perplexity_{text}_pruned": perplexity["pruned"],
                f"perplexity_{text}_finetuned": final,
                f"difference_{text}": final - dense,
                f"difference_percent_{text}": difference_percent(final, dense),
            }
        row |= {metric: tasks.get(step["step"], {}).get(metric) for metric in metrics}
        row |= {"finetuning_tokens": step["total_tokens"], **cost(step["step"], benchmarks)}
        table.append(row | measurements.get(step["step"], {}))
    return table


def read_tasks(paths: Iterable[Path]) -> dict[str, dict[str, float]]:
    """step -> metric of a task -> value, from zero_shot.json files."""
    found = {}
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found[record["step"]] = {
                f"{task}_{metric}": value
                for task, metrics in record["tasks"].items()
                for metric, value in metrics.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: not the result of zero_shot.py; delete it and run again") from None
    return found


def read_measurements(paths: Iterable[Path]) -> dict[str, dict[str, float]]:
    """step -> column of size or speed -> value, from what measure.py wrote; speeds beside those of the dense model."""
    found = {}
    for path in paths:
        try:
            for step, record in json.loads(path.read_text(encoding="utf-8"))["steps"].items():
                found[step] = {key: record[key] for key in SIZES}
                dense = record["dense_tokens_per_second"]
                for kind, speed in record["tokens_per_second"].items():
                    found[step] |= {f"{kind}_tokens_per_second": speed, f"{kind}_to_dense": speed / dense[kind]}
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
            raise UserError(f"{path}: not the result of measure.py; delete it and run again") from None
    return found


# --- cost ------------------------------------------------------------------------------------------------------------


def cost(step: str, benchmarks: Path) -> dict[str, float | None]:
    """Seconds of pruning and of finetuning that led to a step's model, and the peak resident memory of the jobs."""
    jobs = [(job, _read_benchmark(job)) for job in _jobs_of(step, benchmarks) if job.stem not in MEASURING]
    finetuning = [job["s"] for path, job in jobs if path.stem == "finetune"]
    pruning = [job["s"] for path, job in jobs if path.stem != "finetune"]
    # A job that ends within a second or so is gone before its memory is read.
    peaks = [job["max_rss"] for _, job in jobs if isinstance(job.get("max_rss"), (int, float))]
    return {
        "pruning_seconds": math.fsum(pruning) if pruning else None,
        "finetuning_seconds": math.fsum(finetuning) if finetuning else None,
        "peak_memory_mb": max(peaks, default=None),
    }


def _jobs_of(step: str, benchmarks: Path) -> list[Path]:
    """The benchmark files of the jobs that led from the base model to a step's."""
    if number := iteration_of(step):
        return [job for index in range(1, number + 1) for job in sorted((benchmarks / f"iter{index}").glob("*.jsonl"))]
    own = sorted((benchmarks / step).glob("*.jsonl"))
    if step.startswith(("quantised/", "dynamic/")):
        # Done to the model of another step: quantised/NAME/STEP.
        return own + _jobs_of(step.split("/", 2)[2], benchmarks)
    if any(job.stem.startswith("degrade") for job in own):
        # It has the statistics of the base model in common with the first iteration.
        own += [benchmarks / "iter1" / f"{rule}.jsonl" for rule in ("calibrate", "score")]
    return [job for job in own if job.exists()]


def _read_benchmark(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    except (ValueError, IndexError):
        raise UserError(f"{path}: not a benchmark file of Snakemake; delete it and run its rule again") from None


# --- the table for people --------------------------------------------------------------------------------------------


def as_text(table: Sequence[dict], text: str) -> str:
    """The rows on one text, best first at each sparsity; the base model on top."""
    base, *others = table
    others.sort(key=lambda row: (round(row["sparsity"], 2), row[f"perplexity_{text}_finetuned"]))
    return _aligned(f"perplexity on {text}", [HEADINGS, *(_cells(row, text) for row in [base, *others])], left=3)


def sizes_as_text(table: Sequence[dict]) -> str:
    """The rows that were measured: size, and speed beside the dense model; nothing where none was."""
    lines = [SIZE_HEADINGS, *(_size_cells(row) for row in table if "bytes" in row)]
    return _aligned("size and speed, tokens/s", lines, left=1) if len(lines) > 1 else ""


def _aligned(title: str, lines: Sequence[tuple[str, ...]], left: int) -> str:
    """Cells in columns under a title, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    align = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    padded = [[side(cell, width) for side, cell, width in zip(align, line, widths, strict=True)] for line in lines]
    return "\n".join([title] + ["  ".join(line).rstrip() for line in padded])


def _size_cells(row: dict) -> tuple[str, ...]:
    speeds = [
        text
        for kind in ("prefill", "decode")
        for text in (_rounded(row[f"{kind}_tokens_per_second"], 1), f"{row[f'{kind}_to_dense']:.2f}x")
    ]
    return row["run"], *("" if row[key] is None else f"{row[key]:,}" for key in SIZES), *speeds


def _cells(row: dict, text: str) -> tuple[str, ...]:
    tuned = row["finetuning_tokens"] > 0
    differs = row["run"] != BASE
    return (
        row["run"],
        row["method"],
        row["pattern"],
        f"{100 * row['sparsity']:.1f}",
        _rounded(row[f"perplexity_{text}_pruned"]),
        _rounded(row[f"perplexity_{text}_finetuned"]) if tuned else "",
        _rounded(row[f"difference_{text}"]) if differs else "",
        _rounded(row[f"difference_percent_{text}"], 1) if differs else "",
        _rounded(row["pruning_seconds"], 0),
        _rounded(row["finetuning_seconds"], 0) if tuned else "",
        _rounded(row["peak_memory_mb"], 0),
    )


def _rounded(value: float | None, digits: int = 2) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if abs(value) < 100_000 else f"{value:.3g}"
