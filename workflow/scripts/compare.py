"""Every run beside every other, as a table and a figure: method, pattern, sparsity, perplexity, tasks, time, memory."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.files import atomic_write
from stepdown.report import comparison, figures
from stepdown.report.drawing import as_svg, style
from stepdown.report.steps import read_results


def main(arguments: argparse.Namespace) -> None:
    results = read_results(arguments.evals, tiers=False)
    tasks = comparison.read_tasks(arguments.zero_shot)
    measurements = comparison.read_measurements(arguments.measurements)
    table = comparison.table(results, arguments.benchmarks, tasks, measurements)
    atomic_write(arguments.output, table.to_csv(lineterminator="\n"))
    with style():
        atomic_write(arguments.output_figure, as_svg(figures.comparison(results)))
    texts = [comparison.as_text(table, text) for text in results]
    cli.tell("\n\n".join(filter(None, [*texts, comparison.sizes_as_text(table)])))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evals", type=Path, nargs="+", required=True, help="eval.json of every step, in any order")
    parser.add_argument("--zero-shot", type=Path, nargs="*", default=[], help="zero_shot.json of steps that have one")
    parser.add_argument("--measurements", type=Path, nargs="*", default=[], help="what measure.py wrote, if anything")
    parser.add_argument("--benchmarks", type=Path, required=True, help="folder of Snakemake's benchmark files by step")
    parser.add_argument("--output", type=Path, required=True, help="the table as CSV, in full precision")
    parser.add_argument("--output-figure", type=Path, required=True, help="perplexity against sparsity, SVG")
    cli.run(main, parser)
