"""What the inputs of every linear weigh on calibration text, and what its outputs do to the loss."""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..cli import log
from ..errors import UserError
from ..files import check_length
from ..models.checkpoint import check_identity, load_tensors, shard_of
from ..models.decoder import Decoder, open_decoder
from ..models.layer_walk import LayerWalk
from ..models.tier_maps import TierMap
from ..text import calibration_windows, describe, parse_text
from .layerwise import added, visit, visit_backwards
from .statistics import accumulating_squared_gradients, accumulating_squares, counting_tokens

# What stands behind the name of a linear in the file that calibrate.py writes.
GRADIENTS = " squared_gradients"


@dataclass(frozen=True)
class Calibration:
    """Per linear, means over samples of sums over a sample's tokens, float32.

    squared_norms: of x_j^2, x its inputs [in]; squared_gradients: of (dL/dy_i)^2, y its outputs and L the loss summed
    over a sample's tokens [out], times all tokens over those the linear is given; without any where costs do not ask.
    """

    squared_norms: dict[str, Tensor]
    squared_gradients: dict[str, Tensor]

    def of(self, name: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The norms and the gradients of a linear on a device."""
        gradients = self.squared_gradients.get(name)
        return self.squared_norms[name].to(device), None if gradients is None else gradients.to(device)


def open_model(arguments: argparse.Namespace, folder: Path | None = None) -> Decoder:
    """The model of a command line (`cli.calibration_parser`), or that of another folder, opened the same way."""
    folder = folder or arguments.model
    return open_decoder(folder, arguments.device, arguments.trust_remote_code, arguments.hidden_states)


def open_pair(arguments: argparse.Namespace) -> tuple[Decoder, Decoder]:
    """The model of `--dense-model` and what was pruned of it, `--model`; `UserError` where they cannot be these."""
    dense, pruned = open_model(arguments, arguments.dense_model), open_model(arguments)
    shapes = [{name: linear.weight.shape for name, linear in each.linears().items()} for each in (dense, pruned)]
    if shapes[0] != shapes[1]:
        raise UserError(f"--dense-model {arguments.dense_model}: not what {arguments.model} was pruned from")
    return dense, pruned


def read_windows(arguments: argparse.Namespace) -> tuple[Tensor, dict]:
    """The windows a command line asks for (`cli.calibration_parser`), int64 [samples, tokens], and what they are in
    words and numbers for a report."""
    from ..models.loading import load_tokenizer

    text = parse_text(arguments.text)
    check_length("--sequence-length", arguments.sequence_length, arguments.model)
    tokenizer = load_tokenizer(arguments.model, arguments.trust_remote_code)
    windows = calibration_windows(text, tokenizer, arguments.samples, arguments.sequence_length, arguments.seed)
    numbers = {key: getattr(arguments, key) for key in ("samples", "sequence_length", "seed")}
    return windows, {"text": describe(text, "train"), **numbers}


def calibrate(decoder: Decoder, windows: Tensor, batch_size: int, with_gradients: bool) -> Calibration:
    """The squared inputs of every linear, and the squared gradients of its outputs where they are asked for."""
    if with_gradients:
        return calibrate_backwards(decoder, windows, batch_size)
    return Calibration(squared_input_norms(decoder, windows, batch_size), {})


def squared_input_norms(decoder: Decoder, windows: Tensor, batch_size: int) -> dict[str, Tensor]:
    """Per linear, the mean over samples of the squared inputs summed over a sample's tokens: float32 [in].

    s_j = 1/n * sum over n samples of sum over tokens of x_j^2 (Wanda's scaler_row). windows: int64 [samples, tokens].
    A linear that saw no token, such as an expert that none was routed to, gets ones: Wanda is then magnitude.
    Raises `UserError` naming the linear whose inputs are not finite.
    """
    gather = partial(accumulating_squares, samples=len(windows))
    norms: dict[str, Tensor] = {}
    for layer in visit(LayerWalk(decoder, windows.split(batch_size)), "calibrate"):
        _add(norms, layer.gather(gather, advance=True))
    return _complete_norms(decoder, norms)


def calibrate_backwards(decoder: Decoder, windows: Tensor, batch_size: int) -> Calibration:
    """The same norms, and the squared gradients, by carrying the loss on the windows back through the layers.

    windows: int64 [samples, tokens]. One layer is in memory at a time; the states before each wait on disk.
    """
    gather = partial(accumulating_squares, samples=len(windows))
    norms: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}
    for layer in visit_backwards(LayerWalk(decoder, windows.split(batch_size)), summed=True):
        linears = layer.linears
        with accumulating_squared_gradients(linears, len(windows)) as found, counting_tokens(linears) as seen:
            _add(norms, layer.gather(gather, advance=True))
        _add(gradients, found)
        _add(tokens, seen)
    # Sum of x^2 g^2 = tokens * mean of x^2 * mean of g^2 = sum of x^2 * sum of g^2 / tokens, each of the linear's own.
    gradients = {name: gradients[name] * (windows.numel() / n) for name in gradients if (n := int(tokens[name]))}
    for name in sorted(norms.keys() - gradients.keys()):
        log.warning("%s: the loss has no gradient of its outputs; it costs what the cheapest of its layer does", name)
    norms = _complete_norms(decoder, norms)
    return Calibration(norms, _complete_gradients(decoder, gradients, norms))


def _add(sums: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Add what was found in a layer; a linear that several layers use has the sum of all uses."""
    sums.update({name: added(sums.get(name), values.cpu()) for name, values in found.items()})


def _complete_norms(decoder: Decoder, norms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The norms of the inputs of every linear; ones where no token was."""
    for name, linear in decoder.linears().items():
        if name not in norms:
            log.warning("%s saw no token of the calibration text: its weights go by magnitude", name)
            norms[name] = torch.ones(linear.in_features)
    _check_finite(decoder, norms, "inputs")
    return norms


def _complete_gradients(decoder: Decoder, gradients: dict[str, Tensor], norms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of every linear; of one that has none as much as lets its weights cost, on average, what those of
    the cheapest linear of its decoder layer do: an expert without a token is rarer than any that has some."""
    _check_finite(decoder, gradients, "gradients")
    cheapest: dict[str, float] = {}
    for name, found in gradients.items():
        cost = float(norms[name].mean() * found.mean())
        cheapest[shard_of(name)] = min(cost, cheapest.get(shard_of(name), cost))
    for name, linear in decoder.linears().items():
        if name not in gradients:
            cost, mean = cheapest.get(shard_of(name), 1.0), float(norms[name].mean())
            gradients[name] = torch.full((linear.out_features,), cost / mean if mean else cost)
    return gradients


def _check_finite(decoder: Decoder, found: dict[str, Tensor], of: str) -> None:
    for name, values in found.items():
        if not values.isfinite().all():
            raise UserError(f"{decoder.checkpoint.folder}: the {of} of {name} are not finite (NaN or infinity)")


def as_tensors(calibration: Calibration) -> dict[str, Tensor]:
    """The tensors of the file that `read_calibration` reads."""
    gradients = {f"{name}{GRADIENTS}": values for name, values in calibration.squared_gradients.items()}
    return calibration.squared_norms | gradients


def read_calibration(path: Path | str, tier_map: TierMap, with_gradients: bool) -> Calibration:
    """What calibrate.py wrote; raises `UserError` unless it is of the tier map's model and covers its matrices."""
    tensors, metadata = load_tensors(path)
    check_identity(path, "the calibration of the tier map's model", metadata, tier_map.identity)
    norms, gradients = {}, {}
    for name, (rows, columns) in tier_map.shapes.items():
        norms[name] = _found(tensors, name, columns, "norms", path)
        if with_gradients:
            gradients[name] = _found(tensors, f"{name}{GRADIENTS}", rows, "squared gradients", path)
    return Calibration(norms, gradients)


def _found(tensors: dict[str, Tensor], name: str, length: int, what: str, path: Path | str) -> Tensor:
    if name not in tensors or tensors[name].shape != (length,):
        found = list(tensors[name].shape) if name in tensors else None
        linear = name.removesuffix(GRADIENTS)
        raise UserError(f"{path}: {linear}: {found} {what} found, [{length}] expected; calibrate this model again")
    return tensors[name]
