"""Reconstruct a refitted checkpoint: each layer is trained to make again what it made before it was pruned."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.models.checkpoint import rewriting_layers
from stepdown.models.step_masks import read_step_masks
from stepdown.prune.calibration import open_pair, read_windows
from stepdown.prune.reconstruction import Settings, reconstruct_layers


def main(arguments: argparse.Namespace) -> None:
    windows, _ = read_windows(arguments)
    dense, pruned = open_pair(arguments)
    masks = read_step_masks(arguments.masks, pruned.checkpoint)
    settings = Settings(arguments.steps, arguments.learning_rate, arguments.seed)
    with rewriting_layers(pruned.checkpoint, arguments.output_model, masks.identity) as write:
        for tensors in reconstruct_layers(dense, pruned, masks.keep, windows, arguments.batch_size, settings):
            write(tensors)


if __name__ == "__main__":
    parser = cli.calibration_parser(__doc__)
    parser.add_argument("--dense-model", type=Path, required=True, help="folder of the model it was pruned from")
    parser.add_argument("--masks", type=Path, required=True, help="tier map, or the report of a one-shot run")
    parser.add_argument(
        "--steps", type=cli.whole_number(), default=300, help="of AdamW in each layer (default: %(default)s)"
    )
    parser.add_argument(
        "--learning-rate",
        type=cli.positive,
        default=0.01,
        help="a share of a tensor's size, at first (default: %(default)s)",
    )
    parser.add_argument("--output-model", type=Path, required=True, help="folder of the reconstructed checkpoint")
    cli.run(main, parser)
