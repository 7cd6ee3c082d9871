"""Stage 1: the lowest-scoring Dense blocks of every matrix step down to 2:4 until the Dense share is met."""

import argparse
from dataclasses import replace
from pathlib import Path

from stepdown import cli
from stepdown.errors import UserError
from stepdown.models.checkpoint import load_tensors
from stepdown.models.tier_maps import read_tier_map, write_tier_map
from stepdown.tensors.tiers import degrade_dense_to_two_four


def main(arguments: argparse.Namespace) -> None:
    before = read_tier_map(arguments.tier_map)
    scores, metadata = load_tensors(arguments.scores)
    if metadata != before.identity or scores.keys() != before.tiers.keys():
        raise UserError(f"{arguments.scores}: scores of another model or iteration than {arguments.tier_map}")
    shares = (arguments.dense, arguments.mid_2_4, arguments.topk)
    tiers = {
        name: degrade_dense_to_two_four(tiers, scores[name], shares)
        for name, tiers in cli.progress(before.tiers.items(), "Dense -> 2:4")
    }
    write_tier_map(replace(before, tiers=tiers, iteration=arguments.iteration, shares=shares), arguments.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scores", type=Path, required=True, help="what score.py wrote")
    parser.add_argument("--tier-map", type=Path, required=True, help="tier map of the iteration before")
    parser.add_argument("--iteration", type=int, required=True, help="of the map to write")
    for share in ("--dense", "--mid-2-4", "--topk"):
        parser.add_argument(share, required=True, help="share of the blocks after this iteration, such as 0.35")
    parser.add_argument("--output", type=Path, required=True, help="tier map after stage 1")
    cli.run(main, parser)
