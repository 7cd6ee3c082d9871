"""Pruning a model in one shot, layer by layer: each layer is pruned by what it sees of the layers pruned before it."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

from ..cli import log
from ..errors import UserError
from ..models.checkpoint import rewriting_layers
from ..models.decoder import Decoder, LayerWalk
from ..models.pruning_reports import describe_pruning
from ..plan.runs import Run
from ..tensors.blocks import grid_shape
from ..tensors.masks import count_zeros
from ..tensors.patterns import Pattern, TierOptions, pattern_of
from .calibration import squared_input_norms
from .layer_sparsity import LayerOptions, by_outliers, by_table, in_whole_units, outlier_shares, uniform
from .methods import STATISTICS, arguments_of, load_method
from .statistics import accumulating_hessians, accumulating_squares


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

    identity = {"base_model": decoder.checkpoint.identity()["base_model"], "iteration": "1"}
    with rewriting_layers(decoder.checkpoint, target, identity) as write:

        def take(weights: dict[str, Tensor]) -> None:
            zeros.update({name: count_zeros(weight) for name, weight in weights.items()})
            write(weights)

        prune_layers(decoder, windows, batch_size, run.method, pattern_for, take)
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


@torch.no_grad()
def prune_layers(
    decoder: Decoder,
    windows: Tensor,
    batch_size: int,
    method: str,
    pattern_for: Callable[[str, Tensor], Pattern],
    take: Callable[[dict[str, Tensor]], None],
) -> None:
    """Prune the decoder layers in order; `take` gets the weights of each layer's linears, by stored name, on the CPU.

    windows: int64 [samples, tokens]; pattern_for: (name, weight [out, in]) -> the pattern of that matrix.
    One layer is loaded at a time, and only its statistics are held. A method that asks for none needs no forward pass.
    Raises `UserError` naming the linear whose weights or inputs are not finite, or whose pattern does not hold.
    """
    prune = load_method(method)
    asked = [statistic for statistic in STATISTICS if statistic in arguments_of(prune)]
    name_of = {module: name for name, module in decoder.linears().items()}
    walk = LayerWalk(decoder, list(windows.split(batch_size)))
    for _, layer, replay in walk.layers(f"prune by {method}"):
        linears = {name_of[module]: module for module in layer.modules() if module in name_of}
        statistics = _measure(linears, asked, replay, len(windows))
        for name, linear in linears.items():
            found = {statistic: values.get(name) for statistic, values in statistics.items()}
            _check_finite(f"{decoder.checkpoint.folder}: {name}", linear.weight, found)
            prune_linear_(linear, prune, pattern_for(name, linear.weight), name, found)
        if asked:
            replay()
        take({name: linear.weight.detach().cpu() for name, linear in linears.items()})


def prune_linear_(
    linear: nn.Linear, prune: Callable[..., Tensor], pattern: Pattern, name: str, statistics: dict[str, Tensor | None]
) -> None:
    """Prune a linear in place by a method's function `prune`, and check that the pattern holds.

    A linear without statistics, such as an expert that no token was routed to, is pruned by magnitude.
    """
    if None in statistics.values():
        log.warning("%s saw no token of the calibration text: pruned by magnitude", name)
        prune, statistics = load_method("magnitude"), {}
    offered = {"weight": linear.weight.float(), "pattern": pattern, "name": name, **statistics}
    pruned = prune(**{argument: offered[argument] for argument in arguments_of(prune)})
    where, shape = f"{prune.__module__}: {name}", linear.weight.shape
    if not isinstance(pruned, Tensor) or pruned.shape != shape:
        found = list(pruned.shape) if isinstance(pruned, Tensor) else type(pruned).__name__
        raise UserError(f"{where}: returned {found}; return the weight {list(shape)}")
    # Adding zero turns -0.0 into 0.0.
    linear.weight.copy_(pruned).add_(0.0)
    if not _is_finite(linear.weight):
        raise UserError(f"{where}: returned NaN or infinity")
    if fault := pattern.fault(linear.weight.cpu()):
        raise UserError(f"{where}: the pattern does not hold: {fault}; zero what pattern.keep drops")


def _tell_ragged_groups(run: Run, shapes: dict[str, tuple[int, int]]) -> None:
    ragged = [name for name, (_, inputs) in shapes.items() if run.m and inputs % run.m]
    if ragged:
        log.warning(
            "%s: %d matrices, %s first, have inputs that are no multiple of %d; of a tail of r, ceil(r * %d / %d) stay",
            *(run.name, len(ragged), ragged[0], run.m, run.n, run.m),
        )


def _measure(
    linears: dict[str, nn.Linear], asked: list[str], replay: Callable[..., None], samples: int
) -> dict[str, dict[str, Tensor]]:
    """The statistics asked for: statistic -> name of a linear -> values; a linear that had no inputs is missing."""
    found = {}
    with ExitStack() as open_until_replayed:
        if "squared_norms" in asked:
            found["squared_norms"] = open_until_replayed.enter_context(accumulating_squares(linears))
        if "hessian" in asked:
            found["hessian"] = open_until_replayed.enter_context(accumulating_hessians(linears, samples))
        if asked:
            replay(advance=False)
    if "squared_norms" in asked:
        found["squared_norms"] = {name: total / samples for name, total in found["squared_norms"].items()}
    return found


def _check_finite(where: str, weight: Tensor, statistics: dict[str, Tensor | None]) -> None:
    if not _is_finite(weight):
        raise UserError(f"{where}: a weight is NaN or infinite; copy or download the model again")
    for values in statistics.values():
        # No entry of a Hessian is larger than the largest of its diagonal, which are squared norms.
        if values is not None and not _is_finite(values if values.dim() == 1 else values.diagonal()):
            raise UserError(f"{where}: its inputs are not finite (NaN or infinity)")


def _is_finite(values: Tensor) -> bool:
    return all(bound.isfinite() for bound in values.aminmax())
