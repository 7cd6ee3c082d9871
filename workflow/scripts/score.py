"""Score every block of every prunable matrix: what it costs to take it from Dense to 2:4."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.models.checkpoint import Checkpoint, check_finite, save_tensors
from stepdown.models.decoder import choose_device
from stepdown.models.tier_maps import check_same_model, check_zeros, read_tier_map
from stepdown.prune.calibration import read_calibration
from stepdown.prune.stepping_down import COSTS, score_dense


def main(arguments: argparse.Namespace) -> None:
    checkpoint, tier_map = Checkpoint(arguments.model), read_tier_map(arguments.tier_map)
    check_same_model(tier_map, arguments.tier_map, checkpoint)
    calibration = read_calibration(arguments.calibration, tier_map, arguments.cost == "fisher")
    device, scores = choose_device(arguments.device), {}
    for name in cli.progress(tier_map.tiers, "score"):
        weight = checkpoint.matrix(name)
        check_zeros(tier_map, name, weight, checkpoint.folder)
        check_finite(checkpoint.folder, name, weight)
        scores[name] = score_dense(weight.to(device), name, calibration, tier_map.block_size, arguments.cost).cpu()
    save_tensors(scores, arguments.output, tier_map.identity | {"cost": arguments.cost})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model as last finetuned")
    parser.add_argument("--calibration", type=Path, required=True, help="what calibrate.py wrote for this model")
    parser.add_argument("--tier-map", type=Path, required=True, help="tier map of this model")
    cli.add_device_argument(parser)
    parser.add_argument("--cost", choices=COSTS, default="fisher", help="of a step down (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="float32 [block rows, block cols] per matrix")
    cli.run(main, parser)
