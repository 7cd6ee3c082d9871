"""Refit a pruned checkpoint: what it keeps moves to where every linear does again what it did; no training."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.models.checkpoint import rewriting_layers
from stepdown.models.step_masks import read_step_masks
from stepdown.prune.calibration import open_pair, read_windows
from stepdown.prune.refit import fit_within, refit_layers


def main(arguments: argparse.Namespace) -> None:
    windows, _ = read_windows(arguments)
    dense, pruned = open_pair(arguments)
    masks = read_step_masks(arguments.masks, pruned.checkpoint)
    fit = fit_within(masks, arguments.damping, arguments.swaps)
    with rewriting_layers(pruned.checkpoint, arguments.output_model, masks.identity) as write:
        for layer in refit_layers(dense, pruned, fit, windows, arguments.batch_size):
            write(layer.weights())


if __name__ == "__main__":
    parser = cli.calibration_parser(__doc__)
    parser.add_argument("--dense-model", type=Path, required=True, help="folder of the model it was pruned from")
    parser.add_argument("--masks", type=Path, required=True, help="tier map, or the report of a one-shot run")
    help = "let a block of a tier choose anew which of its weights it keeps, where the outputs lose less by it"
    parser.add_argument("--swaps", action=argparse.BooleanOptionalAction, default=True, help=help)
    parser.add_argument(
        "--damping", type=cli.positive, default=0.01, help="hold to the pruned weights (default: %(default)s)"
    )
    parser.add_argument("--output-model", type=Path, required=True, help="folder of the refitted checkpoint")
    cli.run(main, parser)
