"""The table of a run: one row per step, base model first, then the iterations, then the one-shot runs."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.files import atomic_write
from stepdown.report import summary


def main(arguments: argparse.Namespace) -> None:
    steps = summary.read_steps(arguments.evals, arguments.training)
    atomic_write(arguments.output, summary.as_csv(summary.rows(steps)))
    print(summary.as_text(steps))
    if conclusion := summary.verdict(steps):
        print(f"\n{conclusion}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evals", type=Path, nargs="+", required=True, help="eval.json of every step, in any order")
    parser.add_argument("--training", type=Path, nargs="*", default=[], help="training.json of every finetuned step")
    parser.add_argument("--output", type=Path, required=True, help="the table as CSV, in full precision")
    cli.run(main, parser)
