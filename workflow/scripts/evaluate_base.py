"""Evaluate the base model: its perplexity, which every later one is held against."""

import argparse

from stepdown import cli
from stepdown.files import write_json
from stepdown.measure import evaluation
from stepdown.plan.steps import BASE


def main(arguments: argparse.Namespace) -> None:
    settings = evaluation.settings_of(arguments)
    result = evaluation.describe_model(BASE, arguments.model_name, arguments.masks, arguments.model)
    found = evaluation.perplexities(arguments.model, settings)
    result["perplexity"] = {text: {"base": value} for text, value in found.items()}
    write_json(arguments.output, result | {"protocol": evaluation.protocol(settings)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    cli.add_model_arguments(parser)
    evaluation.add_arguments(parser)
    cli.run(main, parser)
