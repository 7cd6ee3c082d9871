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
from ..models.checkpoint import check_identity, load_tensors
from ..models.decoder import Decoder, open_decoder
from ..models.layer_walk import LayerWalk
from ..models.tier_maps import TierMap
from ..text import calibration_windows, describe, parse_text
from .layerwise import added, visit, visit_backwards
from .statistics import accumulating_squared_gradients, accumulating_squares

# What stands behind the name of a linear in the file that calibrate.py writes.
GRADIENTS = " squared_gradients"


@dataclass(frozen=True)
class Calibration:
    """Per linear, means over samples of sums over a sample's tokens, float32.

    squared_norms: of x_j^2, x its inputs [in]; squared_gradients: of (dL/dy_i)^2, y its outputs and L the loss summed
    over a sample's tokens [out]; without any where costs do not ask for them.
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
    return _complete(decoder, norms, "inputs")


def calibrate_backwards(decoder: Decoder, windows: Tensor, batch_size: int) -> Calibration:
    """The same norms, and the squared gradients, by carrying the loss on the windows back through the layers.

    windows: int64 [samples, tokens]. One layer is in memory at a time; the states before each wait on disk.
    """
    gather = partial(accumulating_squares, samples=len(windows))
    norms: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for layer in visit_backwards(LayerWalk(decoder, windows.split(batch_size)), summed=True):
        with accumulating_squared_gradients(layer.linears, len(windows)) as found:
            _add(norms, layer.gather(gather, advance=True))
        _add(gradients, found)
    for name in sorted(norms.keys() - gradients.keys()):
        log.warning("%s: the loss has no gradient of its outputs; ones stand for it", name)
    return Calibration(_complete(decoder, norms, "inputs"), _complete(decoder, gradients, "gradients"))


def _add(sums: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Add what was found in a layer; a linear that several layers use has the sum of all uses."""
    sums.update({name: added(sums.get(name), values.cpu()) for name, values in found.items()})


def _complete(decoder: Decoder, found: dict[str, Tensor], of: str) -> dict[str, Tensor]:
    """What was found of the `inputs` or the `gradients` of every linear; ones where no token was."""
    for name, linear in decoder.linears().items():
        if name not in found:
            if of == "inputs":
                log.warning("%s saw no token of the calibration text: its weights go by magnitude", name)
            found[name] = torch.ones(linear.in_features if of == "inputs" else linear.out_features)
        if not found[name].isfinite().all():
            raise UserError(f"{decoder.checkpoint.folder}: the {of} of {name} are not finite (NaN or infinity)")
    return found


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
