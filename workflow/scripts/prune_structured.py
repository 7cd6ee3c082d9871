"""Make a model smaller: fewer decoder layers (shortgpt-6) or a narrower residual (slicegpt-0.25)."""

import argparse

from stepdown import cli
from stepdown.files import write_json
from stepdown.models.decoder import Decoder
from stepdown.plan.compressions import REMOVALS, Structured, check_structured, parse_structured, sliced_width
from stepdown.prune.calibration import open_model, read_windows
from stepdown.prune.layer_removal import choose_layers, write_without_layers
from stepdown.prune.slicing import slice_checkpoint


def main(arguments: argparse.Namespace) -> None:
    asked = parse_structured(arguments.run)
    check_structured(asked, arguments.model, arguments.round_to)
    decoder = open_model(arguments)
    windows, calibration = read_windows(arguments)
    identity = decoder.checkpoint.identity() | {"iteration": "1"}
    compress = remove_layers if asked.method == "shortgpt" else cut_residual
    outcome = compress(arguments, asked, decoder, windows, identity)
    report = {"run": arguments.run, "method": asked.method, **identity, **outcome, "calibration": calibration}
    write_json(arguments.output_report, report)


def remove_layers(arguments: argparse.Namespace, asked: Structured, decoder: Decoder, windows, identity: dict) -> dict:
    removed, scores = choose_layers(decoder, windows, arguments.batch_size, asked.layers, arguments.removal)
    write_without_layers(decoder, removed, arguments.output_model, identity)
    cli.log.info("layers %s go, of %d", ", ".join(map(str, removed)), len(decoder.layers))
    return {"removal": arguments.removal, "removed_layers": removed, "scores": scores}


def cut_residual(arguments: argparse.Namespace, asked: Structured, decoder: Decoder, windows, identity: dict) -> dict:
    full_width = decoder.model.config.hidden_size
    width = sliced_width(full_width, asked.ratio, arguments.round_to)
    slice_checkpoint(decoder, windows, arguments.batch_size, width, arguments.output_model, identity)
    cli.log.info("the residual is %d wide, of %d", width, full_width)
    return {"ratio": float(asked.ratio), "round_to": arguments.round_to, "full_width": full_width, "width": width}


def _parser() -> argparse.ArgumentParser:
    parser = cli.calibration_parser(__doc__, run="shortgpt-LAYERS or slicegpt-RATIO, such as slicegpt-0.25")
    parser.add_argument("--removal", choices=REMOVALS, default=REMOVALS[0], help="how layers are chosen")
    parser.add_argument("--round-to", type=int, default=8, help="the width is a multiple of it (default: %(default)s)")
    cli.add_output_arguments(parser, "smaller", report="what was taken away and why")
    return parser


if __name__ == "__main__":
    cli.run(main, _parser())
