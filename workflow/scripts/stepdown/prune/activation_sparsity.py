"""Activation sparsity at inference: inputs of a linear below its threshold count as zero (TEAL, Liu et al. 2024).

Thresholds are quantiles of |x| on calibration text, found layer by layer on what the sparse layers before give. Names
are those of the modules in the transformers model, so that `switch_on` finds them in a loaded one.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.decoder import Decoder
from ..models.layer_walk import LayerWalk
from ..models.linears import as_linears_
from ..plan.compressions import Dynamic
from .layerwise import LoadedLayer, visit
from .statistics import accumulating

FORMAT = "stepdown activation sparsity 1"
# |x| is counted by its exponent and the first 11 bits of its mantissa: a threshold is exact to 1/2048 of itself.
BITS_DROPPED = 12
BINS = 1 << (31 - BITS_DROPPED)
# What a step of the greedy search adds to the share of zeros of a layer (TEAL's step size).
STEP = 0.05


# --- calibration -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def calibrate_thresholds(decoder: Decoder, windows: Tensor, batch_size: int, asked: Dynamic) -> dict[str, dict]:
    """Per linear of the decoder layers: `threshold`, and the share of zeros `target` and `achieved` on the windows.

    windows: int64 [samples, tokens]. `uniform` gives every linear the same share; `greedy` spreads the share over the
    linears of a layer, weighted by their size, so that the layer's output changes least (TEAL, algorithm 1).
    """
    own_name = {module: name for name, module in decoder.model.named_modules()}
    walk = LayerWalk(decoder, windows.split(batch_size))
    found = {}
    for layer in visit(walk, f"{asked.allocation} thresholds"):
        quantiles = _quantiles(layer.gather(counting_magnitudes))
        seen = {name: layer.linears[name] for name in quantiles}
        shares = dict.fromkeys(seen, float(asked.share))
        if asked.allocation == "greedy":
            shares = _greedy_shares(layer, seen, quantiles, float(asked.share))
        thresholds = _thresholds(quantiles, shares)
        # What a linear sees changes with the thresholds of those before it in the layer: once more, on sparse inputs.
        with counting_magnitudes(seen) as counts, sparse_inputs(seen, thresholds):
            layer.replay(advance=False)
        quantiles |= _quantiles(counts)
        thresholds = _thresholds(quantiles, shares)
        with sparse_inputs(seen, thresholds), counting_magnitudes(seen) as counts:
            layer.replay()
        quantiles |= _quantiles(counts)
        for name, threshold in thresholds.items():
            achieved = quantiles[name].share_below(threshold)
            found[own_name[layer.linears[name]]] = {
                "threshold": threshold,
                "target": shares[name],
                "achieved": achieved,
            }
    return found


class Quantiles:
    """The distribution of |x| from counts of its leading bits, int64 [BINS]."""

    def __init__(self, counts: Tensor):
        self.cumulative = counts.cumsum(0).double() / counts.sum()

    def threshold(self, share: float) -> float:
        """t such that |x| < t holds for `share` of the entries, or as near as the counts allow; 0 for none."""
        if share <= 0:
            return 0.0
        above = int(torch.searchsorted(self.cumulative, share))
        below = self.cumulative[above - 1].item() if above else 0.0
        nearest = above if self.cumulative[above].item() - share <= share - below else above - 1
        return _lower_edge(nearest + 1)

    def share_below(self, threshold: float) -> float:
        """The share of entries with |x| < threshold, a lower edge of a bin."""
        bin_of = _bins(torch.tensor([threshold]))[0]
        return self.cumulative[bin_of - 1].item() if bin_of else 0.0


def counting_magnitudes(linears: Mapping[str, nn.Linear]) -> AbstractContextManager[dict[str, Tensor]]:
    """While open, counts |x| of the inputs of each linear by its leading bits: name -> int64 [BINS]."""
    return accumulating(linears, lambda inputs: torch.bincount(_bins(inputs), minlength=BINS))


def _quantiles(counts: Mapping[str, Tensor]) -> dict[str, Quantiles]:
    return {name: Quantiles(count) for name, count in counts.items()}


def _thresholds(quantiles: Mapping[str, Quantiles], shares: Mapping[str, float]) -> dict[str, float]:
    return {name: quantiles[name].threshold(share) for name, share in shares.items()}


def _greedy_shares(
    layer: LoadedLayer, linears: Mapping[str, nn.Linear], quantiles: Mapping[str, Quantiles], share: float
) -> dict[str, float]:
    """Step by step, the linear gets more zeros for which the layer's output moves least on the first batch."""
    sizes = {name: linear.weight.numel() for name, linear in linears.items()}
    total, shares = sum(sizes.values()), dict.fromkeys(linears, 0.0)
    dense = layer.output(0)

    def error(shares: Mapping[str, float]) -> float:
        with sparse_inputs(linears, _thresholds(quantiles, shares)):
            return (layer.output(0) - dense).float().norm().item()

    # The same number of multiplications is saved whichever linear it is.
    missing, step = share * total, STEP * total
    while missing > 1e-9 * total:
        step = min(step, missing)
        raised = [shares | {name: shares[name] + step / sizes[name]} for name in linears]
        possible = [choice for choice in raised if max(choice.values()) <= 1]
        if not possible:
            # No linear has as many left.
            step /= 2
            continue
        shares = min(possible, key=error)
        missing -= step
    return shares


def _bins(values: Tensor) -> Tensor:
    """The leading bits of |x| in float32, which are in the order of |x|."""
    return (values.detach().abs().float().contiguous().view(torch.int32).flatten() >> BITS_DROPPED).long()


def _lower_edge(number: int) -> float:
    return torch.tensor([number << BITS_DROPPED], dtype=torch.int32).view(torch.float32).item()


# --- inference -------------------------------------------------------------------------------------------------------


def sparse_inputs(linears: Mapping[str, nn.Module], thresholds: Mapping[str, float]) -> ExitStack:
    """Until it is closed, inputs of the linears that are below their thresholds count as zero."""
    hooks = ExitStack()
    for name, threshold in thresholds.items():
        hooks.enter_context(linears[name].register_forward_pre_hook(_below_is_zero(threshold)))
    return hooks


def _below_is_zero(threshold: float) -> Callable:
    # In float32, as they were counted: bfloat16 would round the threshold onto a value below it.
    return lambda _, inputs: inputs[0] * (inputs[0].abs().float() >= threshold)


def switch_on(model: nn.Module, path: Path | str) -> Callable[[], None]:
    """Make a loaded model's activations sparse by a file of thresholds; the function returned switches it off again.

    Raises `UserError` when the file is none, or names a linear that the model does not have.
    """
    thresholds = read_thresholds(path)
    as_linears_(model)
    modules = dict(model.named_modules())
    if missing := [name for name in thresholds if not isinstance(modules.get(name), nn.Linear)]:
        raise UserError(
            f"{path}: {missing[0]} is no linear of this {type(model).__name__}; thresholds of another model?"
        )
    return sparse_inputs(modules, thresholds).close


def read_thresholds(path: Path | str) -> dict[str, float]:
    """Name of a linear -> its threshold; raises `UserError` when the file is none of ours."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        assert record["format"] == FORMAT
        return {name: float(linear["threshold"]) for name, linear in record["linears"].items()}
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"{path}: not a file of activation thresholds ({FORMAT!r}); make it again") from None
