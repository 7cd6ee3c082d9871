"""Refit a pruned checkpoint: what its masks keep moves to where every linear does again what it did; no training."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.checkpoint import rewriting_layers
from stepdown.decoder import open_decoder
from stepdown.files import check_length
from stepdown.refit import refit_layers
from stepdown.step_masks import read_step_masks
from stepdown.text import calibration_windows, parse_text


def main(arguments: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    text = parse_text(arguments.text)
    check_length("--sequence-length", arguments.sequence_length, arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=arguments.trust_remote_code)
    windows = calibration_windows(text, tokenizer, arguments.samples, arguments.sequence_length, arguments.seed)
    dense, pruned = (
        open_decoder(folder, arguments.device, arguments.trust_remote_code, arguments.hidden_states)
        for folder in (arguments.dense_model, arguments.model)
    )
    masks = read_step_masks(arguments.masks, pruned.checkpoint)
    with rewriting_layers(pruned.checkpoint, arguments.output_model, masks.identity) as write:
        refit_layers(dense, pruned, masks.keep, windows, arguments.batch_size, arguments.damping, write)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    cli.add_model_arguments(parser)
    cli.add_hidden_states_argument(parser)
    parser.add_argument("--dense-model", type=Path, required=True, help="folder of the model it was pruned from")
    parser.add_argument("--masks", type=Path, required=True, help="tier map, or the report of a one-shot run")
    parser.add_argument("--damping", type=float, default=0.01, help="hold to the pruned weights (default: %(default)s)")
    parser.add_argument("--text", default="pydoc", help="corpus name, path, or JSON of one path per split")
    parser.add_argument("--samples", type=int, default=128, help="windows of text (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens per window (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="windows at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-model", type=Path, required=True, help="folder of the refitted checkpoint")
    cli.run(main, parser)
