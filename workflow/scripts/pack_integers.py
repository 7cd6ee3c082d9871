"""Pack a step's model as whole numbers: of its 2:4 and TopK blocks only what is kept, 8 or 4 bits a weight, by GPTQ."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.models.tier_maps import read_tier_map
from stepdown.packed.folder import VALUES
from stepdown.prune.calibrated_packing import pack_calibrated
from stepdown.prune.calibration import open_model, read_windows


def main(arguments: argparse.Namespace) -> None:
    windows, _ = read_windows(arguments)
    size = pack_calibrated(
        open_model(arguments),
        open_model(arguments),
        read_tier_map(arguments.tier_map),
        arguments.tier_map,
        windows,
        arguments.batch_size,
        arguments.values,
        arguments.output,
    )
    cli.log.info("%s: the pruned matrices take %.3f bytes a weight", arguments.output, size)


if __name__ == "__main__":
    parser = cli.calibration_parser(__doc__)
    parser.add_argument("--tier-map", type=Path, required=True, help="tier map of this model")
    parser.add_argument("--values", choices=[name for name, bits in VALUES.items() if bits], required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the packed model")
    cli.run(main, parser)
