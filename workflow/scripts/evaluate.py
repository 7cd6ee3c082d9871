"""Evaluate a step: perplexity from pruned to finetuned, sparsity by tier and matrix, the protocol."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.files import read_result, write_json
from stepdown.measure import evaluation


def main(arguments: argparse.Namespace) -> None:
    settings = evaluation.settings_of(arguments)
    base = evaluation.read_base(arguments.base_eval, settings, arguments.model_name)
    form = {"step": arguments.step, "method": str, "epochs": int, "tokens": int, "best_step": int}
    training = read_result(arguments.training, f"the training.json of {arguments.step}", form)
    folders = {
        "pruned": arguments.pruned_model,
        "refitted": arguments.refitted_model,
        "reconstructed": arguments.reconstructed_model,
    }
    folders = {when: folder for when, folder in folders.items() if folder}
    for folder in folders.values():
        evaluation.describe_model(arguments.step, arguments.model_name, arguments.masks, folder)
    result = evaluation.describe_model(arguments.step, arguments.model_name, arguments.masks, arguments.finetuned_model)
    found = {when: evaluation.perplexities(folder, settings) for when, folder in folders.items()}
    # Where training was no gain, or there was none, the finetuned model is the one before it.
    last = list(found.values())[-1]
    found["finetuned"] = evaluation.perplexities(arguments.finetuned_model, settings) if training["best_step"] else last
    result["perplexity"] = evaluation.beside_base(base, found)
    result["finetuning"] = {key: training[key] for key in ("method", "epochs", "tokens")}
    write_json(arguments.output, result | {"protocol": evaluation.protocol(settings)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pruned-model", type=Path, required=True)
    parser.add_argument("--refitted-model", type=Path)
    parser.add_argument("--reconstructed-model", type=Path)
    parser.add_argument("--finetuned-model", type=Path, required=True)
    parser.add_argument("--training", type=Path, required=True, help="training.json of the finetuned model")
    evaluation.add_step_arguments(parser)
    cli.add_device_arguments(parser)
    evaluation.add_arguments(parser)
    cli.run(main, parser)
