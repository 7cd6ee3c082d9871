"""How a sparsity is spread over the matrices of a model: evenly, by a table, or by outliers. The sum comes out, unless
a table is not asked to meet it.

`sizes` is name of a matrix -> its number of weights. What comes back is name -> share of zeros, exact fractions.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import groupby

import torch
from torch import Tensor

from ..errors import UserError
from ..models.checkpoint import shard_of
from ..tensors.saliency import wanda

TABLE = "config key layer_sparsity.table"


@dataclass(frozen=True)
class LayerOptions:
    """What the configuration says of sparsity by layer: OWL's lambda and M as published; the table of `by_table`."""

    owl_lambda: float = 0.08
    owl_m: float = 5.0
    table: Mapping[str, str | float] = field(default_factory=dict)
    meet_overall: bool = True


def uniform(sizes: Mapping[str, int], overall: Fraction) -> dict[str, Fraction]:
    """Every matrix the same."""
    return dict.fromkeys(sizes, overall)


def by_table(
    sizes: Mapping[str, int], overall: Fraction, table: Mapping[str, str | float], meet_overall: bool = True
) -> dict[str, Fraction]:
    """Matrices the table names get what it says, the others what is missing to `overall`; or all of `overall`.

    table: pattern -> sparsity; of several patterns that match, the last counts. A pattern is a run of parts of a name:
    `layers.0-5` is every matrix of six layers, `mlp.*` every one of an MLP, `q_proj` every query.
    meet_overall: whether the others make up for what the table says.
    Raises `UserError` for a pattern that matches nothing, a sparsity outside [0, 1), or a sum that cannot be met.
    """
    chosen = {}
    for pattern, value in table.items():
        sparsity = Fraction(str(value))
        matched = [name for name in sizes if matches(pattern, name)]
        # 0 is what a matrix gets that is never pruned, such as an embedding.
        if not matched and sparsity:
            told = f"found {pattern}, which matches no matrix to prune; write parts of such as {next(iter(sizes))}"
            raise UserError(f"{TABLE}: {told}")
        chosen |= dict.fromkeys(matched, _checked(f"{TABLE}: {pattern}", sparsity, "write another"))
    others = sizes.keys() - chosen.keys()
    rest = overall
    if meet_overall:
        missing = overall * sum(sizes.values()) - sum(sizes[name] * sparsity for name, sparsity in chosen.items())
        room = sum(sizes[name] for name in others)
        if not others and missing:
            raise UserError(
                f"{TABLE}: names every matrix, and they sum to {_mean(sizes, chosen):.4g}, not {float(overall):g};"
                " leave some out, or set layer_sparsity.meet_overall to false"
            )
        remedy = "change the table, or set layer_sparsity.meet_overall to false"
        rest = _checked(f"{TABLE}: what it leaves to the other matrices", missing / (room or 1), remedy)
    return {name: chosen.get(name, rest) for name in sizes}


def by_outliers(
    sizes: Mapping[str, int], overall: Fraction, outliers: Mapping[str, float], reach: float
) -> dict[str, Fraction]:
    """OWL (Yin et al. 2023): the more outliers a decoder layer has, the fewer of its weights go.

    outliers: name of a layer -> its share of outliers. Densities differ in proportion to it, by 2 * `reach` (lambda)
    from the lowest to the highest layer; all matrices of a layer are alike.
    """
    low, high = min(outliers.values()), max(outliers.values())
    spread = {layer: Fraction(2 * reach * (share - low) / (high - low or 1)) for layer, share in outliers.items()}
    total = sum(sizes.values())
    mean = sum(size * spread[shard_of(name)] for name, size in sizes.items()) / total
    sparsities = {name: overall + mean - spread[shard_of(name)] for name in sizes}
    where, remedy = "config key layer_sparsity.owl_lambda", f"lower it from {reach:g}"
    return {name: _checked(f"{where}: {shard_of(name)}", sparsities[name], remedy) for name in sizes}


def outlier_shares(matrices: Iterable[tuple[str, Tensor, Tensor]], times_mean: float) -> dict[str, float]:
    """Per decoder layer, the share of weights whose Wanda metric is above `times_mean` (M) times the layer's mean.

    matrices: (name, weight [out, in], squared input norms [in]) of all matrices of the dense model, a layer's together.
    """
    shares = {}
    for layer, members in groupby(matrices, key=lambda matrix: shard_of(matrix[0])):
        metrics = [wanda(weight, squared_norms) for _, weight, squared_norms in members]
        weights = sum(metric.numel() for metric in metrics)
        bound = times_mean * sum(metric.sum(dtype=torch.float64) for metric in metrics) / weights
        shares[layer] = sum(int((metric > bound).sum()) for metric in metrics) / weights
    return shares


def in_whole_units(
    sizes: Mapping[str, int], sparsities: Mapping[str, Fraction], units: Mapping[str, int]
) -> dict[str, Fraction]:
    """The same sparsities as counts of what goes only whole: the weights of a row, the blocks of a matrix.

    units: how many of them a row (a matrix) has. What rounding takes from a matrix or gives it is carried to the next
    of the same sparsity, so that the sum comes out.
    """
    found, owed = {}, defaultdict(Fraction)
    for name, sparsity in sparsities.items():
        wanted = sparsity + owed[sparsity] / sizes[name]
        found[name] = Fraction(min(max(round(wanted * units[name]), 0), units[name] - 1), units[name])
        owed[sparsity] += sizes[name] * (sparsity - found[name])
    return found


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern's parts match a run of a name's parts: `layers.0-5` matches `model.layers.3.mlp.up_proj`."""
    wanted, parts = pattern.split("."), name.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(_part_matches, wanted, parts[start:])) for start in starts)


def _part_matches(wanted: str, part: str) -> bool:
    if bounds := re.fullmatch(r"(\d+)-(\d+)", wanted):
        return part.isdigit() and int(bounds[1]) <= int(part) <= int(bounds[2])
    return fnmatchcase(part, wanted)


def _checked(what: str, sparsity: Fraction, remedy: str) -> Fraction:
    if not 0 <= sparsity < 1:
        raise UserError(f"{what}: a sparsity of {float(sparsity):.4g}, not from 0 to below 1; {remedy}")
    return sparsity


def _mean(sizes: Mapping[str, int], sparsities: Mapping[str, Fraction]) -> float:
    return float(sum(sizes[name] * sparsity for name, sparsity in sparsities.items()) / sum(sizes.values()))
