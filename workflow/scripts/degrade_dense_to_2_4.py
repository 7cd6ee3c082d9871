"""Stage 1: the Dense blocks that it costs least step down to 2:4 until the Dense share is met."""

import argparse
from dataclasses import replace
from pathlib import Path

from stepdown import cli
from stepdown.errors import UserError
from stepdown.files import read_result
from stepdown.models.checkpoint import load_tensors
from stepdown.models.tier_maps import read_tier_map, write_tier_map
from stepdown.prune.stepping_down import SHARED_OVER, first_stage
from stepdown.prune.target import in_proportion
from stepdown.tensors.tiers import TIER_NAMES


def main(arguments: argparse.Namespace) -> None:
    shares = (arguments.dense, arguments.mid_2_4, arguments.topk)
    cli.check_shares("--dense, --mid-2-4, --topk", shares)
    if arguments.target and not arguments.last:
        raise UserError("--target: goes with --last, the shares of the schedule's last row; give both")
    before = read_tier_map(arguments.tier_map)
    scores, metadata = load_tensors(arguments.scores)
    cost = metadata.pop("cost", "wanda")
    if metadata != before.identity or scores.keys() != before.tiers.keys():
        raise UserError(f"{arguments.scores}: scores of another model or iteration than {arguments.tier_map}")
    if arguments.target:
        target = read_result(arguments.target, "what choose_shares.py wrote", dict.fromkeys(TIER_NAMES.values(), str))
        shares = in_proportion(shares, tuple(arguments.last), [target[tier] for tier in TIER_NAMES.values()])
    tiers = first_stage(before, scores, shares, arguments.shared_over)
    chosen = {"shares": shares, "cost": cost, "shared_over": arguments.shared_over}
    write_tier_map(replace(before, tiers=tiers, iteration=arguments.iteration, **chosen), arguments.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scores", type=Path, required=True, help="what score.py wrote")
    parser.add_argument("--tier-map", type=Path, required=True, help="tier map of the iteration before")
    parser.add_argument("--iteration", type=int, required=True, help="of the map to write")
    for share in ("--dense", "--mid-2-4", "--topk"):
        parser.add_argument(
            share, type=cli.share, required=True, help="share of the blocks after this iteration, such as 0.35"
        )
    parser.add_argument("--target", type=Path, help="what choose_shares.py wrote, in place of the last row's shares")
    parser.add_argument(
        "--last", nargs=3, type=cli.share, metavar="SHARE", help="with --target: the shares of the schedule's last row"
    )
    parser.add_argument("--shared-over", choices=SHARED_OVER, default="model", help="where the shares are met")
    parser.add_argument("--output", type=Path, required=True, help="tier map after stage 1")
    cli.run(main, parser)
