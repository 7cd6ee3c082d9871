"""The report's figures: perplexity against sparsity, tier shares, one matrix's tier maps, training curves."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.files import atomic_write
from stepdown.report import curves, figures, tier_pictures
from stepdown.report.drawing import as_svg, style
from stepdown.report.steps import read_results


def main(arguments: argparse.Namespace) -> None:
    results = read_results(arguments.evals)
    steps = next(iter(results.values()))
    losses = curves.read_curves(arguments.training, steps)
    matrix, maps = tier_pictures.read_tier_maps(arguments.tier_maps, steps.index)
    drawings = {
        "perplexity": lambda: figures.perplexity(results),
        "tier_shares": lambda: figures.tier_shares(steps),
        "tier_maps": lambda: tier_pictures.tier_maps(matrix, maps),
        "training": lambda: curves.training(steps, losses),
    }
    with style():
        for name, draw in cli.progress(drawings.items(), "figures"):
            atomic_write(arguments.output_folder / f"{name}.svg", as_svg(draw()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evals", type=Path, nargs="+", required=True, help="eval.json of every step, in any order")
    parser.add_argument("--training", type=Path, nargs="*", default=[], help="training.json of every finetuned step")
    parser.add_argument(
        "--tier-maps", type=Path, nargs="*", default=[], help="tier_map.safetensors, each in its step's folder"
    )
    parser.add_argument("--output-folder", type=Path, required=True, help="where the four .svg files go")
    cli.run(main, parser)
