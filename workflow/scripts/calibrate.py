"""Measure the inputs of every prunable matrix on calibration text, one decoder layer in memory at a time."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.models.checkpoint import save_tensors
from stepdown.prune.calibration import open_model, read_windows, squared_input_norms


def main(arguments: argparse.Namespace) -> None:
    windows, calibration = read_windows(arguments)
    decoder = open_model(arguments)
    norms = squared_input_norms(decoder, windows, arguments.batch_size)
    protocol = f"{arguments.samples} samples x {arguments.sequence_length} tokens, seed {arguments.seed}"
    metadata = decoder.checkpoint.identity() | {"text": calibration["text"], "protocol": protocol}
    save_tensors(norms, arguments.output, metadata)


if __name__ == "__main__":
    parser = cli.calibration_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="safetensors file, float32 [in] per matrix")
    cli.run(main, parser)
