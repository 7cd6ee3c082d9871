"""Prune a model in one shot, by the method and pattern its run is named after, such as wanda-2of4."""

import argparse
import json
import math
from fractions import Fraction

from stepdown import cli
from stepdown.errors import UserError
from stepdown.files import write_json
from stepdown.plan.block_size import check_block
from stepdown.plan.runs import FORM, PATTERNS, parse_run
from stepdown.prune.calibration import open_model, read_windows
from stepdown.prune.layer_sparsity import LayerOptions
from stepdown.prune.methods import load_method, method_names
from stepdown.prune.oneshot import prune_checkpoint
from stepdown.tensors.patterns import TierOptions
from stepdown.tensors.saliency import SELECTIONS


def main(arguments: argparse.Namespace) -> None:
    run = parse_run(arguments.run, method_names())
    load_method(run.method)
    tiers, layers = _tiers(arguments), _layers(arguments)
    windows, calibration = read_windows(arguments)
    decoder = open_model(arguments)
    report = prune_checkpoint(decoder, run, windows, arguments.batch_size, arguments.output_model, tiers, layers)
    write_json(arguments.output_report, report | {"calibration": calibration})
    cli.log.info("%s: sparsity %.4f", run.name, report["sparsity"]["achieved"])


def _tiers(arguments: argparse.Namespace) -> TierOptions:
    check_block(arguments.block_size, arguments.k, ("--block-size", "--k"))
    cli.check_shares("--shares", arguments.shares)
    return TierOptions(
        block_size=arguments.block_size,
        k=arguments.k,
        shares=tuple(arguments.shares),
        top=Fraction(arguments.top_blocks),
        threshold=arguments.threshold,
        selection=arguments.selection,
    )


def _layers(arguments: argparse.Namespace) -> LayerOptions:
    try:
        table = json.loads(arguments.layer_sparsity)
    except ValueError as error:
        raise UserError(f'--layer-sparsity: not JSON ({error}); write such as {{"layers.0-5": 0.3}}') from None
    if not isinstance(table, dict) or not all(map(_is_number, table.values())):
        raise UserError(f'--layer-sparsity: found {arguments.layer_sparsity}; write such as {{"layers.0-5": 0.3}}')
    return LayerOptions(float(Fraction(arguments.owl_lambda)), arguments.owl_m, table, arguments.meet_overall)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _parser() -> argparse.ArgumentParser:
    parser = cli.calibration_parser(__doc__, run=f"{FORM}; patterns: {', '.join(PATTERNS)}")
    tiers = parser.add_argument_group("three-tier and hybrid")
    tiers.add_argument(
        "--block-size", type=cli.whole_number(), default=16, help="edge of a block (default: %(default)s)"
    )
    tiers.add_argument(
        "--k", type=cli.whole_number(), default=10, help="weights kept in a TopK block (default: %(default)s)"
    )
    shares = ["0.35", "0.45", "0.2"]
    tiers.add_argument("--shares", nargs=3, type=cli.share, default=shares, help="of dense, 2:4 and TopK blocks")
    tiers.add_argument(
        "--top-blocks",
        type=cli.share,
        default="0.6",
        help="share of blocks above TopK in hybrid (default: %(default)s)",
    )
    tiers.add_argument(
        "--threshold", type=float, default=0.8, help="of its metric that 2:4 must leave a block in hybrid"
    )
    tiers.add_argument("--selection", choices=SELECTIONS, default="wanda", help="what decides inside a block")
    layers = parser.add_argument_group("-owl and -table")
    layers.add_argument(
        "--owl-lambda", type=cli.share, default="0.08", help="reach around the mean (default: %(default)s)"
    )
    layers.add_argument(
        "--owl-m", type=cli.positive, default=5.0, help="an outlier is above M times the mean (default: 5)"
    )
    layers.add_argument("--layer-sparsity", default="{}", help="JSON: pattern of names -> sparsity")
    layers.add_argument("--meet-overall", action=argparse.BooleanOptionalAction, default=True)
    cli.add_output_arguments(parser, "pruned", report="what came of every matrix")
    return parser


if __name__ == "__main__":
    cli.run(main, _parser())
