"""Evaluate a step: perplexity of its pruned and its finetuned model, sparsity by tier and matrix, the protocol."""

import argparse
import json
from pathlib import Path

from stepdown import cli, evaluation
from stepdown.files import write_json


def main(arguments: argparse.Namespace) -> None:
    settings = evaluation.settings_of(arguments)
    base = json.loads(arguments.base_eval.read_text())["perplexity"]
    training = json.loads(arguments.training.read_text())
    evaluation.describe_model(arguments.step, arguments.model_name, arguments.masks, arguments.pruned_model)
    result = evaluation.describe_model(arguments.step, arguments.model_name, arguments.masks, arguments.finetuned_model)
    pruned = evaluation.perplexities(arguments.pruned_model, settings)
    # Without epochs the finetuned model is the pruned one.
    finetuned = evaluation.perplexities(arguments.finetuned_model, settings) if training["epochs"] else pruned
    result["perplexity"] = {
        text: {"base": base[text]["base"], "pruned": pruned[text], "finetuned": finetuned[text]} for text in pruned
    }
    result["finetuning"] = {key: training[key] for key in ("method", "epochs", "tokens")}
    write_json(arguments.output, result | {"protocol": evaluation.protocol(settings)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pruned-model", type=Path, required=True)
    parser.add_argument("--finetuned-model", type=Path, required=True)
    parser.add_argument("--training", type=Path, required=True, help="training.json of the finetuned model")
    parser.add_argument("--base-eval", type=Path, required=True, help="eval.json of the base model, same settings")
    parser.add_argument("--step", required=True, help="name of the step, such as iter3")
    cli.add_device_arguments(parser)
    evaluation.add_arguments(parser)
    cli.run(main, parser)
