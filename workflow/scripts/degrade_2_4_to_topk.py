"""Stage 2: prune the new 2:4 blocks, rescore all on what is left, step the lowest down to TopK; write the model."""

import argparse
from pathlib import Path

from torch import Tensor

from stepdown import cli
from stepdown.models.checkpoint import Checkpoint, rewrite_checkpoint
from stepdown.models.decoder import choose_device
from stepdown.models.tier_maps import check_same_model, read_tier_map, write_tier_map
from stepdown.prune.calibration import read_norms
from stepdown.tensors.saliency import SELECTIONS
from stepdown.tensors.tiers import degrade_two_four_to_top_k_


def main(arguments: argparse.Namespace) -> None:
    before, stage_1 = read_tier_map(arguments.tier_map_before), read_tier_map(arguments.tier_map)
    checkpoint = Checkpoint(arguments.model)
    check_same_model(before, arguments.tier_map_before, checkpoint)
    check_same_model(stage_1, arguments.tier_map, checkpoint, iterations_ahead=1)
    norms = read_norms(arguments.calibration, stage_1)
    device, tiers = choose_device(arguments.device), {}

    def degrade(shard: dict[str, Tensor]) -> None:
        for name in (key.removesuffix(".weight") for key in shard):
            if name in stage_1.tiers:
                weight = shard[f"{name}.weight"].to(device)
                tiers[name] = degrade_two_four_to_top_k_(
                    weight,
                    norms[name].to(device),
                    before.tiers[name].to(device),
                    stage_1.tiers[name].to(device),
                    stage_1.shares,
                    stage_1.block_size,
                    stage_1.k,
                    arguments.selection,
                ).cpu()
                shard[f"{name}.weight"] = weight.cpu()

    rewrite_checkpoint(arguments.model, arguments.output_model, degrade, stage_1.identity, "2:4 -> TopK")
    write_tier_map(stage_1.with_tiers(tiers), arguments.output_tier_map)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model as last finetuned")
    parser.add_argument("--calibration", type=Path, required=True, help="what calibrate.py wrote for this model")
    parser.add_argument("--tier-map-before", type=Path, required=True, help="tier map of this model")
    parser.add_argument("--tier-map", type=Path, required=True, help="what degrade_dense_to_2_4.py wrote")
    parser.add_argument("--selection", choices=SELECTIONS, default="wanda", help="what decides inside a block")
    cli.add_device_argument(parser)
    parser.add_argument("--output-tier-map", type=Path, required=True)
    parser.add_argument("--output-model", type=Path, required=True, help="folder of the pruned checkpoint")
    cli.run(main, parser)
