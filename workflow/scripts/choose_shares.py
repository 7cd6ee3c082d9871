"""Choose the shares of the tiers after the last iteration by a budget and what it costs all blocks to step down."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.files import write_json
from stepdown.models.checkpoint import Checkpoint
from stepdown.models.decoder import choose_device
from stepdown.models.tier_maps import check_same_model, read_tier_map
from stepdown.prune.calibration import read_calibration
from stepdown.prune.target import shares_for
from stepdown.tensors.saliency import SELECTIONS


def main(arguments: argparse.Namespace) -> None:
    checkpoint, tier_map = Checkpoint(arguments.model), read_tier_map(arguments.tier_map)
    check_same_model(tier_map, arguments.tier_map, checkpoint)
    calibration = read_calibration(arguments.calibration, tier_map, with_gradients=True)
    target = {key: vars(arguments)[key] for key in ("bytes", "sparsity") if vars(arguments)[key] is not None}
    device = choose_device(arguments.device)
    shares = shares_for(target, checkpoint, tier_map, calibration, arguments.selection, device)
    write_json(arguments.output, shares)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--calibration", type=Path, required=True, help="what calibrate.py wrote for this model")
    parser.add_argument("--tier-map", type=Path, required=True, help="tier map of this model")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--bytes", type=cli.share, help="share of the bytes, packed in bfloat16 against dense bfloat16")
    target.add_argument("--sparsity", type=cli.share, help="share of zeros")
    parser.add_argument("--selection", choices=SELECTIONS, default="wanda", help="what decides inside a block")
    cli.add_device_argument(parser)
    parser.add_argument("--output", type=Path, required=True, help="JSON: the share of each tier")
    cli.run(main, parser)
