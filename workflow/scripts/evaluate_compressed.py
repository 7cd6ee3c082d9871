"""Evaluate a model that was made smaller, quantised, or runs on sparse activations: perplexity, sparsity, size."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.files import read_result, write_json
from stepdown.measure import evaluation
from stepdown.measure.sizes import remaining, size_of
from stepdown.plan.compressions import parse_step
from stepdown.prune.activation_sparsity import switch_on


def main(arguments: argparse.Namespace) -> None:
    settings = evaluation.settings_of(arguments)
    parse_step(arguments.step)
    kind, name = arguments.step.split("/")[:2]
    base = evaluation.read_base(arguments.base_eval, settings, arguments.model_name)
    report = read_result(arguments.masks, f"the report of {arguments.step}", {"run": name, "base_model": str})
    prepare = (lambda decoder: switch_on(decoder.model, arguments.masks)) if "linears" in report else None
    found = evaluation.perplexities(arguments.model, settings, prepare)
    method, _, pattern = name.partition("-")
    result = {
        "step": arguments.step,
        "iteration": 1,
        "model": arguments.model_name,
        "perplexity": evaluation.beside_base(base, {"pruned": found}),
        "pruning": {"method": method, "pattern": pattern, "layers": kind},
        "sparsity": remaining(arguments.model, arguments.base_model, arguments.trust_remote_code),
        "size": size_of(arguments.model),
        "compression": {key: value for key, value in report.items() if key not in ("format", "linears")},
        "finetuning": {"method": "none", "epochs": 0, "tokens": 0},
        "protocol": f"{evaluation.protocol(settings)} What of the dense model is no longer there counts as zero.",
    }
    write_json(arguments.output, result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", type=Path, required=True, help="folder of the dense model")
    evaluation.add_step_arguments(parser)
    cli.add_model_arguments(parser)
    evaluation.add_arguments(parser)
    cli.run(main, parser)
