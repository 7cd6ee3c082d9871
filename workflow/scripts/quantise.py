"""Quantise a model, pruned or not: 8-bit round to nearest (int8) or GPTQ (gptq4-g128-asym), zeros kept."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.files import write_json
from stepdown.models.decoder import open_decoder
from stepdown.plan.compressions import parse_quantised
from stepdown.prune.calibration import read_windows
from stepdown.prune.model_quantisation import quantise_checkpoint


def main(arguments: argparse.Namespace) -> None:
    asked = parse_quantised(arguments.run)
    decoder = open_decoder(arguments.model, arguments.device, arguments.trust_remote_code, arguments.hidden_states)
    # Rounding to nearest asks for no text.
    windows, calibration = read_windows(arguments) if asked.method == "gptq" else (None, None)
    identity = decoder.checkpoint.identity()
    quantise_checkpoint(decoder, windows, arguments.batch_size, asked, arguments.output_model, identity)
    options = {"method": asked.method, "bits": asked.bits, "group_size": asked.group_size, "symmetric": asked.symmetric}
    write_json(arguments.output_report, {"run": arguments.run, **identity, **options, "calibration": calibration})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="int or gptq, its bits, if wanted -gGROUP and -asym: gptq4-g128")
    cli.add_model_arguments(parser)
    cli.add_calibration_arguments(parser)
    parser.add_argument("--output-model", type=Path, required=True, help="folder of the quantised checkpoint")
    parser.add_argument("--output-report", type=Path, required=True, help="JSON: how it was quantised")
    cli.run(main, parser)
