"""Prune a model while it trains, its sparsity rising by the cubic schedule: magnitude-unstructured-0.5, wanda-2of4."""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepdown import cli
from stepdown.errors import UserError
from stepdown.files import check_length, write_json
from stepdown.models.checkpoint import rewrite_checkpoint
from stepdown.models.decoder import Decoder, choose_device, open_decoder
from stepdown.models.linears import as_linears_
from stepdown.models.pruning_reports import describe_pruning
from stepdown.plan.runs import Run, parse_gradual
from stepdown.prune.calibration import squared_input_norms
from stepdown.prune.methods import method_names
from stepdown.recover.gradual_sparsity import GradualSettings, prune_while_training, saliency_and_last_mask
from stepdown.tensors.masks import count_zeros
from stepdown.tensors.patterns import TierOptions, pattern_of
from stepdown.text import describe, parse_text, training_windows

# Windows of the training text on which Wanda's norms are measured.
CALIBRATION_WINDOWS = 128


def main(arguments: argparse.Namespace) -> None:
    run = parse_gradual(arguments.run, method_names())
    text = parse_text(arguments.text)
    check_length("--sequence-length", arguments.sequence_length, arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=arguments.trust_remote_code)
    count = None if arguments.tokens is None else max(1, arguments.tokens // arguments.sequence_length)
    windows = training_windows(text, tokenizer, "train", arguments.sequence_length, count, arguments.seed)
    decoder = open_decoder(arguments.model, arguments.device, arguments.trust_remote_code)
    losses = prune(arguments, run, decoder, windows)
    cli.log.info("%s: %d steps, loss %.3f -> %.3f", run.name, len(losses), losses[0], losses[-1])


def prune(arguments: argparse.Namespace, run: Run, decoder: Decoder, windows: Tensor) -> list[float]:
    """Train, write the checkpoint and the report; returns the losses."""
    own = {stored: name.removesuffix(".weight") for name, stored in decoder.stored.items()}
    linears = {own[f"{name}.weight"]: name for name in decoder.linears()}
    norms: dict[str, Tensor] = {}
    if run.method == "wanda":
        norms = squared_input_norms(decoder, windows[:CALIBRATION_WINDOWS], arguments.batch_size)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, trust_remote_code=arguments.trust_remote_code
    )
    as_linears_(model)
    model.to(choose_device(arguments.device))
    patterns = {
        name: pattern_of(run, run.sparsity, TierOptions(), model.get_submodule(name).weight.detach())
        for name in linears
    }

    def keep_of(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        squared_norms, in_groups = norms.get(linears[name]), run.pattern == "n-of-m"
        return saliency_and_last_mask(weight.detach(), squared_norms, patterns[name], run.sparsity, in_groups)

    settings = GradualSettings(
        arguments.batch_size, arguments.learning_rate, arguments.updates, arguments.rise, arguments.bf16, arguments.seed
    )
    losses = prune_while_training(model, windows, linears, keep_of, settings)
    _write(arguments, run, decoder, model, linears, losses)
    return losses


def _write(
    arguments: argparse.Namespace, run: Run, decoder: Decoder, model, linears: dict[str, str], losses: list[float]
) -> None:
    weights = {decoder.stored[name]: tensor for name, tensor in model.state_dict().items() if name in decoder.stored}
    shapes, zeros = {}, {}
    for name, stored in linears.items():
        weight = model.get_submodule(name).weight.detach()
        shapes[stored], zeros[stored] = tuple(weight.shape), count_zeros(weight)
        if fault := pattern_of(run, run.sparsity, TierOptions(), weight).fault(weight.cpu()):
            raise UserError(f"{stored}: the pattern does not hold: {fault}; train for more steps than --updates")
    identity = {"base_model": decoder.checkpoint.identity()["base_model"], "iteration": "1"}

    def replace(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: weights[name].cpu() for name in tensors if name in weights})

    rewrite_checkpoint(decoder.checkpoint, arguments.output_model, replace, identity)
    report = describe_pruning(run, identity["base_model"], shapes, dict.fromkeys(shapes, run.sparsity), zeros)
    training = {"text": describe(parse_text(arguments.text), "train"), "steps": len(losses), "losses": losses}
    write_json(arguments.output_report, report | {"training": training})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="magnitude or wanda, and unstructured-SHARE or N of M")
    cli.add_model_arguments(parser)
    parser.add_argument("--text", default="pydoc", help="corpus name, path, or JSON of one path per split")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens per window (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="to train on (default: the whole text)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows of a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="default: %(default)s")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--updates", type=int, default=20, help="times that masks are chosen (default: %(default)s)")
    parser.add_argument("--rise", type=float, default=0.8, help="share of the steps in which sparsity rises")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-model", type=Path, required=True, help="folder of the pruned checkpoint")
    parser.add_argument("--output-report", type=Path, required=True, help="JSON: what came of every matrix")
    return parser


if __name__ == "__main__":
    cli.run(main, _parser())
