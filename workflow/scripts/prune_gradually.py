"""Prune a model while it trains, its sparsity rising by the cubic schedule: magnitude-unstructured-0.5, wanda-2of4."""

import argparse
from dataclasses import fields

import torch

from stepdown import cli
from stepdown.errors import UserError
from stepdown.files import check_length, write_json
from stepdown.models.decoder import choose_device, open_decoder
from stepdown.models.linears import as_linears_
from stepdown.models.loading import load_model, load_tokenizer
from stepdown.plan.runs import parse_gradual
from stepdown.prune.methods import method_names
from stepdown.recover.gradual_sparsity import GradualSettings, prune_checkpoint
from stepdown.text import describe, parse_text, training_windows


def main(arguments: argparse.Namespace) -> None:
    if arguments.rise > 1:
        raise UserError(f"--rise: found {arguments.rise:g}; write a share of the steps, 1 at most")
    run = parse_gradual(arguments.run, method_names())
    text = parse_text(arguments.text)
    check_length("--sequence-length", arguments.sequence_length, arguments.model)
    tokenizer = load_tokenizer(arguments.model, arguments.trust_remote_code)
    count = None if arguments.tokens is None else max(1, arguments.tokens // arguments.sequence_length)
    windows = training_windows(text, tokenizer, "train", arguments.sequence_length, count, arguments.seed)
    decoder = open_decoder(arguments.model, arguments.device, arguments.trust_remote_code)
    model = load_model(arguments.model, torch.float32, arguments.trust_remote_code)
    as_linears_(model)
    model.to(choose_device(arguments.device))
    settings = GradualSettings(**{field.name: getattr(arguments, field.name) for field in fields(GradualSettings)})
    report, losses = prune_checkpoint(decoder, model, run, windows, settings, arguments.output_model)
    training = {"text": describe(text, "train"), "steps": len(losses), "losses": losses}
    write_json(arguments.output_report, report | {"training": training})
    cli.log.info("%s: %d steps, loss %.3f -> %.3f", run.name, len(losses), losses[0], losses[-1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="magnitude or wanda, and unstructured-SHARE or N of M")
    cli.add_model_arguments(parser)
    parser.add_argument("--text", default="pydoc", help="corpus name, path, or JSON of one path per split")
    parser.add_argument(
        "--sequence-length", type=cli.whole_number(2), default=2048, help="tokens per window (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=cli.whole_number(), help="to train on (default: the whole text)")
    parser.add_argument(
        "--batch-size", type=cli.whole_number(), default=4, help="windows of a step (default: %(default)s)"
    )
    parser.add_argument("--learning-rate", type=cli.positive, default=2e-5, help="default: %(default)s")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--updates", type=cli.whole_number(), default=20, help="times that masks are chosen (default: %(default)s)"
    )
    parser.add_argument("--rise", type=cli.positive, default=0.8, help="share of the steps in which sparsity rises")
    parser.add_argument("--seed", type=cli.whole_number(0), default=0)
    cli.add_output_arguments(parser, "pruned", report="what came of every matrix")
    return parser


if __name__ == "__main__":
    cli.run(main, _parser())
