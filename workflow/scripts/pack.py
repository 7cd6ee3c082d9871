"""Pack a step's model: of its 2:4 and TopK blocks only what is kept, in the form the three-tier kernels run.

Whole numbers are rounded to nearest here, without any text; pack_integers.py makes up for the rounding.
"""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.models.checkpoint import Checkpoint
from stepdown.models.tier_maps import read_tier_map
from stepdown.packed.folder import VALUES, write_packed


def main(arguments: argparse.Namespace) -> None:
    tier_map = read_tier_map(arguments.tier_map)
    checkpoint = Checkpoint(arguments.model)
    size = write_packed(checkpoint, tier_map, arguments.tier_map, arguments.output, arguments.values)
    cli.log.info("%s: the pruned matrices take %.3f bytes a weight", arguments.output, size)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the pruned or finetuned model")
    parser.add_argument("--tier-map", type=Path, required=True, help="tier map of this model")
    parser.add_argument("--values", choices=list(VALUES), default="bf16", help="of the weights (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the packed model")
    cli.run(main, parser)
