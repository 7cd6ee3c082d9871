"""Score every block of every prunable matrix: the mean Wanda metric over its weights."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.models.checkpoint import Checkpoint, save_tensors
from stepdown.models.decoder import choose_device
from stepdown.models.tier_maps import check_same_model, check_zeros, read_tier_map
from stepdown.prune.calibration import read_norms
from stepdown.tensors.saliency import block_scores


def main(arguments: argparse.Namespace) -> None:
    checkpoint, tier_map = Checkpoint(arguments.model), read_tier_map(arguments.tier_map)
    check_same_model(tier_map, arguments.tier_map, checkpoint)
    norms = read_norms(arguments.calibration, tier_map)
    device, scores = choose_device(arguments.device), {}
    for name in cli.progress(tier_map.tiers, "score"):
        weight = checkpoint.matrix(name)
        check_zeros(tier_map, name, weight, checkpoint.folder)
        scores[name] = block_scores(weight.to(device), norms[name].to(device), tier_map.block_size).cpu()
    save_tensors(scores, arguments.output, tier_map.identity)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model as last finetuned")
    parser.add_argument("--calibration", type=Path, required=True, help="what calibrate.py wrote for this model")
    parser.add_argument("--tier-map", type=Path, required=True, help="tier map of this model")
    cli.add_device_argument(parser)
    parser.add_argument("--output", type=Path, required=True, help="float32 [block rows, block cols] per matrix")
    cli.run(main, parser)
