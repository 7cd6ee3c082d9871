"""Quantise a model, pruned or not: 8-bit round to nearest (int8) or GPTQ (gptq4-g128-asym), zeros kept."""

import argparse

from stepdown import cli
from stepdown.files import write_json
from stepdown.plan.compressions import parse_quantised
from stepdown.prune.calibration import open_model, read_windows
from stepdown.prune.model_quantisation import quantise_checkpoint


def main(arguments: argparse.Namespace) -> None:
    asked = parse_quantised(arguments.run)
    decoder = open_model(arguments)
    # Rounding to nearest asks for no text.
    windows, calibration = read_windows(arguments) if asked.method == "gptq" else (None, None)
    identity = decoder.checkpoint.identity()
    quantise_checkpoint(decoder, windows, arguments.batch_size, asked, arguments.output_model, identity)
    options = {"method": asked.method, "bits": asked.bits, "group_size": asked.group_size, "symmetric": asked.symmetric}
    write_json(arguments.output_report, {"run": arguments.run, **identity, **options, "calibration": calibration})


if __name__ == "__main__":
    parser = cli.calibration_parser(__doc__, run="int or gptq, its bits, if wanted -gGROUP and -asym: gptq4-g128")
    cli.add_output_arguments(parser, "quantised", report="how it was quantised")
    cli.run(main, parser)
