"""Measure the inputs of every prunable matrix on calibration text, and the gradients of its outputs, layer by layer."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.models.checkpoint import save_tensors
from stepdown.prune.calibration import as_tensors, calibrate, open_model, read_windows
from stepdown.prune.stepping_down import COSTS


def main(arguments: argparse.Namespace) -> None:
    windows, calibration = read_windows(arguments)
    decoder = open_model(arguments)
    found = calibrate(decoder, windows, arguments.batch_size, arguments.cost == "fisher")
    protocol = f"{arguments.samples} samples x {arguments.sequence_length} tokens, seed {arguments.seed}"
    metadata = decoder.checkpoint.identity() | {"text": calibration["text"], "protocol": protocol}
    save_tensors(as_tensors(found), arguments.output, metadata)


if __name__ == "__main__":
    parser = cli.calibration_parser(__doc__)
    parser.add_argument("--cost", choices=COSTS, default="fisher", help="fisher asks for gradients too")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file: float32 [in] and [out]")
    cli.run(main, parser)
