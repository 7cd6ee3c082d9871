"""The table of a run: one row per step, base model first, then the iterations, then the one-shot runs."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.files import atomic_write
from stepdown.report import summary
from stepdown.report.steps import read_results


def main(arguments: argparse.Namespace) -> None:
    results = read_results(arguments.evals)
    atomic_write(arguments.output, summary.table(results).to_csv(lineterminator="\n"))
    cli.tell(summary.as_text(results))
    if conclusion := summary.verdict(results):
        cli.tell(f"\n{conclusion}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evals", type=Path, nargs="+", required=True, help="eval.json of every step, in any order")
    parser.add_argument("--output", type=Path, required=True, help="the table as CSV, in full precision")
    cli.run(main, parser)
