"""All ways of pruning a model side by side: what they kept, what they lost, what they cost."""

import math
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from ..files import NUMBER, read_result
from ..plan.steps import BASE, iteration_of
from .steps import Results, difference_percent
from .text import aligned, cells, flush_left

# How the names of jobs begin that neither prune a step nor finetune it.
MEASURING = ("base_model", "evaluate", "gguf", "pack", "zero_shot")
SIZES = ["parameters", "nonzeros", "bytes", "packed_bytes"]
SPEEDS = ["tokens_per_second", "dense_tokens_per_second"]
# What measure.py writes.
MEASUREMENTS = {"steps": {str: dict.fromkeys(SIZES, int | None) | {name: {str: NUMBER | None} for name in SPEEDS}}}


def table(results: Results, benchmarks: Path, tasks: pd.DataFrame, measurements: pd.DataFrame) -> pd.DataFrame:
    """A row per step; the differences are those of the finished model to the dense one.

    Seconds and memory are what the jobs of a step took, those of the iterations before it included; missing where
    `benchmarks`, a folder of Snakemake's benchmark files by step, has none. Packed models, which are measured and not
    evaluated, come last.
    """
    steps = next(iter(results.values()))
    packed = [run for run in measurements.index if run not in steps.index]
    table = steps[["method", "pattern", "layers", "sparsity"]].reindex([*steps.index, *packed]).rename_axis("run")
    for text, found in results.items():
        table[f"perplexity_{text}_pruned"] = found.pruned
        table[f"perplexity_{text}_finetuned"] = found.finetuned
        table[f"difference_{text}"] = found.finetuned - found.base
        table[f"difference_percent_{text}"] = difference_percent(found.finetuned, found.base)
    tokens = steps.total_tokens.rename("finetuning_tokens").astype("Int64")
    return table.join([tasks, tokens, costs(steps.index, benchmarks), measurements])


def read_tasks(paths: Iterable[Path]) -> pd.DataFrame:
    """Step -> TASK_METRIC of zero-shot tasks, from zero_shot.json files."""
    found = {}
    for path in paths:
        record = read_result(path, "the result of zero_shot.py", {"step": str, "tasks": {str: dict}})
        tasks = record["tasks"].items()
        found[record["step"]] = {f"{task}_{metric}": value for task, of in tasks for metric, value in of.items()}
    return pd.DataFrame.from_dict(found, orient="index").sort_index(axis="columns")


def read_measurements(paths: Iterable[Path]) -> pd.DataFrame:
    """Step or packed model -> size and speed, from what measure.py wrote; speeds beside those of the dense model."""
    found = [pd.DataFrame()]
    for path in paths:
        record = read_result(path, "the result of measure.py", MEASUREMENTS)
        steps = pd.DataFrame.from_dict(record["steps"], orient="index")
        speed, dense = (steps[name].apply(pd.Series) for name in SPEEDS)
        columns = steps[SIZES].astype("Int64").assign(bytes_per_weight=steps.bytes / steps.parameters)
        for kind in speed:
            columns[f"{kind}_tokens_per_second"] = speed[kind]
            columns[f"{kind}_to_dense"] = speed[kind] / dense[kind]
        found.append(columns)
    measured = pd.concat(found)
    # The dense model is in every file.
    return measured[~measured.index.duplicated()]


def costs(steps: Iterable[str], benchmarks: Path) -> pd.DataFrame:
    """Step -> seconds of pruning and of finetuning that led to its model, and the peak resident memory of the jobs."""
    rows = []
    for step in steps:
        for path in _jobs_of(step, benchmarks):
            record = read_result(path, "a benchmark file of Snakemake", {"s": NUMBER})
            rows.append((step, path.stem == "finetune", float(record["s"]), record.get("max_rss")))
    jobs = pd.DataFrame(rows, columns=["step", "finetuning", "s", "memory"])
    # A job that ends within a second or so is gone before its memory is read.
    memory = pd.to_numeric(jobs.memory, errors="coerce").groupby(jobs.step).max()
    seconds = jobs.groupby(["step", "finetuning"]).s.agg(math.fsum).unstack().reindex(columns=[False, True])
    return seconds.set_axis(["pruning_seconds", "finetuning_seconds"], axis="columns").assign(peak_memory_mb=memory)


def _jobs_of(step: str, benchmarks: Path) -> list[Path]:
    """The benchmark files of the jobs that led from the base model to a step's."""
    number = iteration_of(step)
    folders = [f"iter{index}" for index in range(1, number + 1)] if number else [step]
    jobs = [
        job for folder in folders for job in (benchmarks / folder).glob("*.jsonl") if not job.stem.startswith(MEASURING)
    ]
    if step.startswith(("quantised/", "dynamic/")):
        # Done to the model of another step: quantised/NAME/STEP.
        jobs += _jobs_of(step.split("/", 2)[2], benchmarks)
    elif not number and any(job.stem.startswith("degrade") for job in jobs):
        # It has the statistics of the base model in common with the first iteration.
        jobs += [job for job in (benchmarks / "iter1").glob("*.jsonl") if job.stem in ("calibrate", "score")]
    return jobs


# --- the tables for people -------------------------------------------------------------------------------------------


def as_text(table: pd.DataFrame, text: str) -> str:
    """The rows on one text, best first at each sparsity; the base model on top."""
    final = f"perplexity_{text}_finetuned"
    table = table[table[final].notna()]
    order = table[1:].assign(zeros=table.sparsity.round(2)).sort_values(["zeros", final]).index
    table = table.loc[[*table.index[:1], *order]]
    tuned, differs = table.finetuning_tokens > 0, table.index != BASE
    columns = [
        *(flush_left(words) for words in (table.index.to_series(), table.method, table.pattern)),
        cells("zeros %", 100 * table.sparsity, "{:.1f}"),
        cells("pruned", table[f"perplexity_{text}_pruned"]),
        cells("finetuned", table[final].where(tuned)),
        cells("+", table[f"difference_{text}"].where(differs)),
        cells("+ %", table[f"difference_percent_{text}"].where(differs), "{:.1f}"),
        cells("pruning s", table.pruning_seconds, "{:.0f}"),
        cells("finetuning s", table.finetuning_seconds.where(tuned), "{:.0f}"),
        cells("MB", table.peak_memory_mb, "{:.0f}"),
    ]
    return f"perplexity on {text}\n" + "\n".join(aligned(columns).str.rstrip())


def sizes_as_text(table: pd.DataFrame) -> str:
    """The rows that were measured: size, and speed beside the dense model; nothing where none was."""
    if "bytes" not in table:
        return ""
    table = table[table.bytes.notna()]
    sizes = [cells(name.removesuffix("_bytes"), table[name], "{:,}", math.inf) for name in SIZES]
    columns = [flush_left(table.index.to_series()), *sizes, cells("bytes/weight", table.bytes_per_weight)]
    # A model that remembers nothing from token to token has no decode.
    for kind in (kind for kind in ("prefill", "decode") if f"{kind}_tokens_per_second" in table):
        columns.append(cells(f"{kind} /s", table[f"{kind}_tokens_per_second"], "{:.1f}"))
        columns.append(cells("to dense", table[f"{kind}_to_dense"], "{:.2f}x"))
    return "size and speed, tokens/s\n" + "\n".join(aligned(columns).str.rstrip())
