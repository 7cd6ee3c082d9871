"""The report's figures: perplexity against sparsity, tier shares, one matrix's tier maps, training curves."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.files import atomic_write
from stepdown.report import figures, summary


def main(arguments: argparse.Namespace) -> None:
    steps = summary.read_steps(arguments.evals, arguments.training)
    matrix, maps = figures.read_tier_maps(arguments.tier_maps, steps)
    drawings = {
        "perplexity": lambda: figures.perplexity(steps),
        "tier_shares": lambda: figures.tier_shares(steps),
        "tier_maps": lambda: figures.tier_maps(matrix, maps),
        "training": lambda: figures.training(steps),
    }
    with figures.style():
        for name, draw in cli.progress(drawings.items(), "figures"):
            atomic_write(arguments.output_folder / f"{name}.svg", figures.as_svg(draw()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evals", type=Path, nargs="+", required=True, help="eval.json of every step, in any order")
    parser.add_argument("--training", type=Path, nargs="*", default=[], help="training.json of every finetuned step")
    parser.add_argument(
        "--tier-maps", type=Path, nargs="*", default=[], help="tier_map.safetensors, each in its step's folder"
    )
    parser.add_argument("--output-folder", type=Path, required=True, help="where the four .svg files go")
    cli.run(main, parser)
