"""What the inputs of every linear weigh on calibration text."""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..cli import log
from ..errors import UserError
from ..files import check_length
from ..models.checkpoint import load_tensors
from ..models.decoder import Decoder, open_decoder
from ..models.layer_walk import LayerWalk
from ..models.tier_maps import TierMap
from ..text import calibration_windows, describe, parse_text
from .layerwise import added, visit
from .statistics import accumulating_squares


def open_model(arguments: argparse.Namespace, folder: Path | None = None) -> Decoder:
    """The model of a command line (`cli.calibration_parser`), or that of another folder, opened the same way."""
    folder = folder or arguments.model
    return open_decoder(folder, arguments.device, arguments.trust_remote_code, arguments.hidden_states)


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


def squared_input_norms(decoder: Decoder, windows: Tensor, batch_size: int) -> dict[str, Tensor]:
    """Per linear, the mean over samples of the squared inputs summed over a sample's tokens: float32 [in].

    s_j = 1/n * sum over n samples of sum over tokens of x_j^2 (Wanda's scaler_row). windows: int64 [samples, tokens].
    A linear that saw no token, such as an expert that none was routed to, gets ones: Wanda is then magnitude.
    Raises `UserError` naming the linear whose inputs are not finite.
    """
    gather = partial(accumulating_squares, samples=len(windows))
    norms = {}
    for layer in visit(LayerWalk(decoder, windows.split(batch_size)), "calibrate"):
        found = layer.gather(gather, advance=True)
        for name, linear in layer.linears.items():
            norms[name] = added(norms.get(name), found[name].cpu() if name in found else None)
            if name in layer.used_later:
                continue
            if norms[name] is None:
                log.warning("%s saw no token of the calibration text: its weights go by magnitude", name)
                norms[name] = torch.ones(linear.in_features)
            if not norms[name].isfinite().all():
                raise UserError(f"{decoder.checkpoint.folder}: the inputs of {name} are not finite (NaN or infinity)")
    return norms


def read_norms(path: Path | str, tier_map: TierMap) -> dict[str, Tensor]:
    """What calibrate wrote; raises `UserError` unless it is of the tier map's model and covers its matrices."""
    norms, metadata = load_tensors(path)
    if metadata.get("base_model") != tier_map.base_model:
        raise UserError(f"{path}: calibration of another model; give what calibrate.py wrote for this one")
    for name, (_, columns) in tier_map.shapes.items():
        if name not in norms or norms[name].shape != (columns,):
            found = list(norms[name].shape) if name in norms else None
            raise UserError(f"{path}: {name}: {found} norms found, [{columns}] expected; calibrate this model again")
    return norms
