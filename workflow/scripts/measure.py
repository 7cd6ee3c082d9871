"""Measure every model in one run: parameters, those that are not zero, bytes, tokens/s of prefill and decode."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.activation_sparsity import switch_on
from stepdown.errors import UserError
from stepdown.files import write_json
from stepdown.sizes import size_of
from stepdown.speed import load_model, measure_speed


def main(arguments: argparse.Namespace) -> None:
    found = {}
    for step, folder, *thresholds in cli.progress(arguments.step, "measure"):
        if len(thresholds) > 1:
            raise UserError(f"--step {step}: give a name, a folder and at most one file of thresholds")
        model = load_model(folder, arguments.device, arguments.trust_remote_code)
        for path in thresholds:
            switch_on(model, path)
        speed = measure_speed(model, arguments.prompt_tokens, arguments.new_tokens, arguments.repeats)
        found[step] = {**size_of(folder), "tokens_per_second": speed}
    protocol = (
        f"batch 1; prefill: a prompt of {arguments.prompt_tokens} random tokens in one pass; decode: the next"
        f" {arguments.new_tokens} tokens one by one, greedily, with a cache; median of {arguments.repeats} runs; all"
        " models one after the other in one process. Zeros, packed weights and sparse activations run through dense"
        " kernels."
    )
    write_json(arguments.output, {"protocol": protocol, "steps": found})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--step", nargs="+", action="append", required=True, metavar="PART", help="NAME FOLDER [THRESHOLDS]"
    )
    cli.add_device_arguments(parser)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="JSON: per step its size and speed")
    cli.run(main, parser)
