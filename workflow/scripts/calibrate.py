"""Measure the inputs of every prunable matrix on calibration text, one decoder layer in memory at a time."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.calibration import squared_input_norms
from stepdown.checkpoint import save_tensors
from stepdown.decoder import open_decoder
from stepdown.files import check_length
from stepdown.text import calibration_windows, describe, parse_text


def main(arguments: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    text = parse_text(arguments.text)
    check_length("--sequence-length", arguments.sequence_length, arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=arguments.trust_remote_code)
    windows = calibration_windows(text, tokenizer, arguments.samples, arguments.sequence_length, arguments.seed)
    decoder = open_decoder(arguments.model, arguments.device, arguments.trust_remote_code, arguments.hidden_states)
    norms = squared_input_norms(decoder, windows, arguments.batch_size)
    protocol = f"{arguments.samples} samples x {arguments.sequence_length} tokens, seed {arguments.seed}"
    metadata = decoder.checkpoint.identity() | {"text": describe(text, "train"), "protocol": protocol}
    save_tensors(norms, arguments.output, metadata)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    cli.add_model_arguments(parser)
    cli.add_hidden_states_argument(parser)
    parser.add_argument("--text", default="pydoc", help="corpus name, path, or JSON of one path per split")
    parser.add_argument("--samples", type=int, default=128, help="windows of text (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens per window (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="windows at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="safetensors file, float32 [in] per matrix")
    cli.run(main, parser)
