"""Measure every model, and the first, the dense one, beside it: parameters, nonzeros, bytes, tokens/s."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.errors import UserError
from stepdown.files import fitting, write_json
from stepdown.measure.sizes import size_of
from stepdown.measure.speed import load_model, measure_speed
from stepdown.models.tier_maps import read_tier_map
from stepdown.prune.activation_sparsity import switch_on


def main(arguments: argparse.Namespace) -> None:
    check_steps(arguments.step)
    found = {}
    asked = arguments.prompt_tokens, arguments.new_tokens
    prompt, new = fitting(*asked, Path(arguments.step[0][1]))
    if (prompt, new) != asked:
        folder = arguments.step[0][1]
        cli.log.warning("%s has no place for %d and %d tokens: measured with %d and %d", folder, *asked, prompt, new)
    dense = load_model(arguments.step[0][1], arguments.device, arguments.trust_remote_code)
    for step, folder, *more in cli.progress(arguments.step, "measure"):
        model = load_model(folder, arguments.device, arguments.trust_remote_code)
        tier_map = None
        for path in map(Path, more):
            if path.suffix == ".json":
                switch_on(model, path)
            else:
                tier_map = read_tier_map(path)
        speed, beside = measure_speed([model, dense], prompt, new, arguments.repeats)
        found[step] = {**size_of(folder, tier_map), "tokens_per_second": speed, "dense_tokens_per_second": beside}
    protocol = (
        f"batch 1; prefill: a prompt of {prompt} random tokens in one pass; decode: the next"
        f" {new} tokens one by one, greedily, with a cache; median of {arguments.repeats} runs, in"
        " which the model and the dense one take turns. Packed models run on kernels of their own; zeros, quantised"
        " weights and sparse activations through dense ones."
    )
    write_json(arguments.output, {"protocol": protocol, "steps": found})


def check_steps(steps: list[list[str]]) -> None:
    names = set()
    for name, *parts in steps:
        if not 1 <= len(parts) <= 2:
            raise UserError(f"--step {name}: give a name, a folder, and at most a tier map or a file of thresholds")
        if name in names:
            raise UserError(f"--step {name}: named twice; give each step a name of its own")
        names.add(name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--step", nargs="+", action="append", required=True, metavar="PART", help="NAME FOLDER [TIER_MAP | THRESHOLDS]"
    )
    cli.add_device_arguments(parser)
    parser.add_argument("--prompt-tokens", type=cli.whole_number(), default=128, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=cli.whole_number(), default=32, help="default: %(default)s")
    parser.add_argument("--repeats", type=cli.whole_number(), default=5, help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="JSON: per step its size and speed")
    cli.run(main, parser)
