"""Bring the base model of a run to its place and write its tier map, in which every block is Dense."""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.models.checkpoint import write_base_index
from stepdown.models.importing import import_model, tell_what_is_pruned
from stepdown.models.tier_maps import dense_tier_map, write_tier_map
from stepdown.plan.block_size import check_block


def main(arguments: argparse.Namespace) -> None:
    check_block(arguments.block_size, arguments.k, ("--block-size", "--k"))
    decoder = import_model(arguments.model, arguments.revision, arguments.output_model, arguments.trust_remote_code)
    tell_what_is_pruned(decoder)
    shapes = {name: tuple(linear.weight.shape) for name, linear in decoder.linears().items()}
    base_model = write_base_index(decoder.checkpoint)
    write_tier_map(dense_tier_map(shapes, arguments.block_size, arguments.k, base_model), arguments.output_tier_map)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", required=True, help="folder of a Hugging Face model, its id on the hub, or a GGUF file"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument(
        "--block-size", type=cli.whole_number(), default=16, help="edge of a block (default: %(default)s)"
    )
    parser.add_argument(
        "--k", type=cli.whole_number(), default=10, help="weights kept in a TopK block (default: %(default)s)"
    )
    parser.add_argument("--output-model", type=Path, required=True, help="folder to make, of links where it can be")
    parser.add_argument("--output-tier-map", type=Path, required=True)
    cli.run(main, parser)
