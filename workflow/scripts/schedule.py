"""Write a schedule file: the shares of the tiers after each iteration on the way to a target."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.files import atomic_write
from stepdown.plan.schedule import read_schedule
from stepdown.plan.schedule_writing import SHAPES, as_csv, published_rows, rows_towards


def main(arguments: argparse.Namespace) -> None:
    if arguments.shape == "published":
        rows = published_rows()
    else:
        rows = rows_towards(tuple(arguments.target), arguments.iterations, arguments.shape, arguments.epochs)
    atomic_write(arguments.output, as_csv(rows))
    read_schedule(arguments.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=[*SHAPES, "published"], default="cubic", help="default: %(default)s")
    parser.add_argument(
        "--target",
        nargs=3,
        default=["0.35", "0.45", "0.20"],
        metavar=("DENSE", "MID_2_4", "TOPK"),
        help="shares at the end",
    )
    parser.add_argument("--iterations", type=int, default=5, help="default: %(default)s; published has five")
    parser.add_argument("--epochs", type=int, default=2, help="of finetuning after each (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="CSV file for the config key schedule")
    cli.run(main, parser)
