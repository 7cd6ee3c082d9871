"""Stage 2: prune the new 2:4 blocks, rescore all on what is left, step the lowest down to TopK; write the model."""

import argparse
from pathlib import Path

from torch import Tensor

from stepdown import cli
from stepdown.models.checkpoint import Checkpoint, rewrite_checkpoint
from stepdown.models.decoder import choose_device
from stepdown.models.tier_maps import check_same_model, read_tier_map, write_tier_map
from stepdown.prune.calibration import read_calibration
from stepdown.prune.stepping_down import prune_stepped_, second_stage
from stepdown.tensors.saliency import SELECTIONS


def main(arguments: argparse.Namespace) -> None:
    before, stage_1 = read_tier_map(arguments.tier_map_before), read_tier_map(arguments.tier_map)
    checkpoint = Checkpoint(arguments.model)
    check_same_model(before, arguments.tier_map_before, checkpoint)
    check_same_model(stage_1, arguments.tier_map, checkpoint, iterations_ahead=1)
    calibration = read_calibration(arguments.calibration, before, stage_1.cost == "fisher")
    device = choose_device(arguments.device)
    tiers = second_stage(checkpoint, before, stage_1, calibration, arguments.selection, device)
    maps = (before, stage_1, stage_1.with_tiers(tiers))

    def prune(shard: dict[str, Tensor]) -> None:
        for name in (key.removesuffix(".weight") for key in shard):
            if name in tiers:
                weight = shard[f"{name}.weight"].to(device)
                prune_stepped_(weight, name, maps, calibration, arguments.selection)
                shard[f"{name}.weight"] = weight.cpu()

    rewrite_checkpoint(arguments.model, arguments.output_model, prune, stage_1.identity, "2:4 -> TopK")
    write_tier_map(maps[-1], arguments.output_tier_map)


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
