"""Pruning a model in one shot, layer by layer: each layer is pruned by what it sees of the layers pruned before it."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path

from torch import Tensor

from ..cli import log
from ..errors import UserError
from ..models.checkpoint import check_finite, is_finite, rewriting_layers
from ..models.decoder import Decoder
from ..models.layer_walk import LayerWalk
from ..models.pruning_reports import describe_pruning
from ..plan.runs import Run
from ..tensors.blocks import grid_shape
from ..tensors.masks import count_zeros
from ..tensors.patterns import Pattern, TierOptions, pattern_of
from .calibration import squared_input_norms
from .layer_sparsity import LayerOptions, by_outliers, by_table, in_whole_units, outlier_shares, uniform
from .layerwise import LoadedLayer, change_layers
from .methods import arguments_of, load_method
from .statistics import accumulating_hessians, accumulating_squares

# How each of `methods.STATISTICS` is gathered.
GATHERERS = {"squared_norms": accumulating_squares, "hessian": accumulating_hessians}


def prune_checkpoint(
    decoder: Decoder, run: Run, windows: Tensor, batch_size: int, target: Path, tiers: TierOptions, layers: LayerOptions
) -> dict:
    """Write the checkpoint of a run to `target`; returns its report, see `pruning_reports.describe_pruning`.

    windows: int64 [samples, tokens] of calibration text, `batch_size` of them through a layer at a time.
    """
    shapes = {name: tuple(linear.weight.shape) for name, linear in decoder.linears().items()}
    _tell_ragged_groups(run, shapes)
    sparsities = layer_sparsities(run, decoder, windows, batch_size, layers)
    zeros: dict[str, int] = {}

    def pattern_for(name: str, weight: Tensor) -> Pattern:
        return pattern_of(run, sparsities[name], tiers, weight)

    identity = decoder.checkpoint.identity() | {"iteration": "1"}
    with rewriting_layers(decoder.checkpoint, target, identity) as write:
        for layer in prune_layers(decoder, windows, batch_size, run.method, pattern_for):
            zeros |= {name: count_zeros(linear.weight) for name, linear in layer.linears.items()}
            write(layer.weights())
    return describe_pruning(run, identity["base_model"], shapes, sparsities, zeros)


def layer_sparsities(
    run: Run, decoder: Decoder, windows: Tensor, batch_size: int, options: LayerOptions
) -> dict[str, Fraction | None]:
    """The sparsity of every prunable matrix in a run; None where the pattern has none of its own.

    Only `owl` looks at the calibration windows, int64 [samples, tokens]: at what the dense model makes of them.
    """
    linears = decoder.linears()
    sizes = {name: linear.weight.numel() for name, linear in linears.items()}
    if run.sparsity is None:
        return dict.fromkeys(sizes)
    if run.layers == "uniform":
        return uniform(sizes, run.sparsity)
    if run.layers == "table":
        sparsities = by_table(sizes, run.sparsity, options.table, options.meet_overall)
    else:
        norms = squared_input_norms(decoder, windows, batch_size)
        matrices = ((name, decoder.checkpoint.matrix(name), norms[name]) for name in linears)
        outliers = outlier_shares(matrices, options.owl_m)
        sparsities = by_outliers(sizes, run.sparsity, outliers, options.owl_lambda)
    units = {name: units_of(run, tuple(linear.weight.shape)) for name, linear in linears.items()}
    return in_whole_units(sizes, sparsities, units)


def units_of(run: Run, shape: tuple[int, int]) -> int:
    """How many blocks a matrix [out, in] has, or weights a row, where the pattern of a run takes them one by one."""
    return math.prod(grid_shape(shape, run.block_size)) if run.block_size else shape[1]


def prune_layers(
    decoder: Decoder, windows: Tensor, batch_size: int, method: str, pattern_for: Callable[[str, Tensor], Pattern]
) -> Iterator[LoadedLayer]:
    """Prune the decoder layers in order; yields each once it is pruned.

    windows: int64 [samples, tokens]; pattern_for: (name, weight [out, in]) -> the pattern of that matrix.
    One layer is loaded at a time, and only its statistics are held. A method that asks for none needs no forward pass.
    Raises `UserError` naming the linear whose weights or inputs are not finite, or whose pattern does not hold.
    """
    prune = load_method(method)
    asked = {statistic: by for statistic, by in GATHERERS.items() if statistic in arguments_of(prune)}

    def make(name: str, weight: Tensor, statistics: dict[str, Tensor | None]) -> Tensor:
        check_finite(decoder.checkpoint.folder, name, weight)
        _check_statistics(f"{decoder.checkpoint.folder}: {name}", statistics)
        return pruned(weight, prune, pattern_for(name, weight), name, statistics)

    walk = LayerWalk(decoder, windows.split(batch_size))
    gather = {statistic: partial(by, samples=len(windows)) for statistic, by in asked.items()}
    return change_layers(walk, f"prune by {method}", gather, make)


def pruned(
    weight: Tensor, prune: Callable[..., Tensor], pattern: Pattern, name: str, statistics: dict[str, Tensor | None]
) -> Tensor:
    """The weight [out, in] of a linear pruned by a method's function `prune`, checked to hold the pattern.

    A linear without statistics, such as an expert that no token was routed to, is pruned by magnitude.
    """
    if None in statistics.values():
        log.warning("%s saw no token of the calibration text: pruned by magnitude", name)
        prune, statistics = load_method("magnitude"), {}
    offered = {"weight": weight.float(), "pattern": pattern, "name": name, **statistics}
    returned = prune(**{argument: offered[argument] for argument in arguments_of(prune)})
    where = f"{prune.__module__}: {name}"
    if not isinstance(returned, Tensor) or returned.shape != weight.shape:
        found = list(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
        raise UserError(f"{where}: returned {found}; return the weight {list(weight.shape)}")
    # Adding zero turns -0.0 into 0.0.
    weight = returned.to(weight) + 0.0
    if not is_finite(weight):
        raise UserError(f"{where}: returned NaN or infinity")
    if fault := pattern.fault(weight):
        raise UserError(f"{where}: the pattern does not hold: {fault}; zero what pattern.keep drops")
    return weight


def _tell_ragged_groups(run: Run, shapes: dict[str, tuple[int, int]]) -> None:
    ragged = [name for name, (_, inputs) in shapes.items() if run.m and inputs % run.m]
    if ragged:
        log.warning(
            "%s: %d matrices, %s first, have inputs that are no multiple of %d; of a tail of r, ceil(r * %d / %d) stay",
            *(run.name, len(ragged), ragged[0], run.m, run.n, run.m),
        )


def _check_statistics(where: str, statistics: dict[str, Tensor | None]) -> None:
    for values in statistics.values():
        # No entry of a Hessian is larger than the largest of its diagonal, which are squared norms.
        if values is not None and not is_finite(values if values.dim() == 1 else values.diagonal()):
            raise UserError(f"{where}: its inputs are not finite (NaN or infinity)")
