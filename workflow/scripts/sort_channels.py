"""Sort the channels of the base model by their importance on calibration text; what it computes stays the same."""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stepdown import cli
from stepdown.errors import UserError
from stepdown.models.channels import Channels, find_channels
from stepdown.models.checkpoint import Checkpoint, write_base_index
from stepdown.models.permutation import write_orders
from stepdown.models.tier_maps import check_same_model, read_tier_map, write_tier_map
from stepdown.prune.calibration import calibrate, open_model, read_windows
from stepdown.prune.channel_sorting import check_same_function, importances, sorted_orders, write_permuted
from stepdown.prune.stepping_down import COSTS


def main(arguments: argparse.Namespace) -> None:
    windows, _ = read_windows(arguments)
    decoder, tier_map = open_model(arguments), read_tier_map(arguments.tier_map)
    check_same_model(tier_map, arguments.tier_map, decoder.checkpoint)
    channels = find_channels(decoder, windows[0])
    tell(channels)
    calibration = calibrate(decoder, windows, arguments.batch_size, arguments.cost == "fisher")
    orders = sorted_orders(channels, importances(decoder, channels, calibration))
    write_permuted(decoder, orders, arguments.output_model)
    try:
        check_same_function(decoder, open_model(arguments, arguments.output_model), windows[:1])
    except UserError:
        shutil.rmtree(arguments.output_model)
        raise
    sorted_model = write_base_index(Checkpoint(arguments.output_model))
    write_orders(orders, arguments.output_permutation, tier_map.base_model, sorted_model)
    write_tier_map(replace(tier_map, base_model=sorted_model), arguments.output_tier_map)


def tell(channels: Sequence[Channels]) -> None:
    """Say how many channels can change places."""
    residual = sum(len(group.heads) for group in channels if group.name == "residual")
    inside = sum(len(group.heads) for group in channels if group.name != "residual")
    cli.log.info("%d channels of the residual and %d inside the layers can change places", residual, inside)


if __name__ == "__main__":
    parser = cli.calibration_parser(__doc__)
    parser.add_argument("--tier-map", type=Path, required=True, help="tier map of this model, all Dense")
    parser.add_argument("--cost", choices=COSTS, default="fisher", help="what is weighed (default: %(default)s)")
    parser.add_argument("--output-model", type=Path, required=True, help="folder of the sorted model")
    parser.add_argument("--output-tier-map", type=Path, required=True)
    parser.add_argument("--output-permutation", type=Path, required=True, help="where every channel came from")
    cli.run(main, parser)
