"""Find the thresholds below which activations count as zero at inference, for a share of zeros (uniform-0.5)."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.files import write_json
from stepdown.plan.compressions import parse_dynamic
from stepdown.prune.activation_sparsity import FORMAT, calibrate_thresholds
from stepdown.prune.calibration import open_model, read_windows


def main(arguments: argparse.Namespace) -> None:
    asked = parse_dynamic(arguments.run)
    decoder = open_model(arguments)
    windows, calibration = read_windows(arguments)
    linears = calibrate_thresholds(decoder, windows, arguments.batch_size, asked)
    sizes = {name: decoder.model.get_submodule(name).weight.numel() for name in linears}
    achieved = sum(sizes[name] * linear["achieved"] for name, linear in linears.items()) / sum(sizes.values())
    record = {
        "format": FORMAT,
        "run": arguments.run,
        "base_model": decoder.checkpoint.identity()["base_model"],
        "share": {"target": float(asked.share), "achieved": achieved},
        "linears": linears,
        "calibration": calibration,
    }
    write_json(arguments.output, record)
    cli.log.info("%s: %.4f of the inputs are zero, weighted by the size of their linears", arguments.run, achieved)


if __name__ == "__main__":
    parser = cli.calibration_parser(__doc__, run="uniform-SHARE or greedy-SHARE, such as uniform-0.5")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of thresholds")
    cli.run(main, parser)
