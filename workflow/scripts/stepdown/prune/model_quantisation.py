"""Quantising a model, pruned or not: every prunable matrix becomes packed whole numbers, layer by layer."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..cli import log, progress
from ..errors import UserError
from ..models.checkpoint import check_finite, rewriting_layers
from ..models.decoder import Decoder
from ..models.layer_walk import LayerWalk
from ..models.linears import replace_module
from ..models.quantised_checkpoint import FORMAT, pack
from ..plan.compressions import Quantisation, check_groups
from ..tensors.quantisation import Quantised, gptq, round_to_nearest
from .layerwise import change_layers
from .statistics import accumulating_hessians


@torch.no_grad()
def quantise_checkpoint(
    decoder: Decoder,
    windows: Tensor | None,
    batch_size: int,
    asked: Quantisation,
    target: Path,
    identity: dict[str, str],
) -> None:
    """Write the model with every prunable matrix packed, one decoder layer in memory at a time.

    windows: int64 [samples, tokens], which only GPTQ asks for: each layer sees what the quantised ones before it give.
    Raises `UserError` for a group size that does not divide, and for matrices that are no linears in transformers.
    """
    check_groups(asked, {name: linear.in_features for name, linear in decoder.linears().items()})
    check_packable(decoder)
    with rewriting_layers(decoder.checkpoint, target, identity, _texts(decoder, asked)) as write:
        rounded = _by_rounding(decoder, asked)
        for layer in rounded if asked.method == "int" else _by_gptq(decoder, windows, batch_size, asked):
            write(layer)


@torch.no_grad()
def check_packable(decoder: Decoder) -> None:
    """Raises `UserError` for a family that transformers does not load with its matrices packed."""
    folder, family, linears = decoder.checkpoint.folder, decoder.model.config.model_type, decoder.linears()
    if decoder.checkpoint.transposed or any(".experts." in name for name in linears):
        raise UserError(f"{folder}: the matrices of {family} are no linears to compressed-tensors")
    if shared := decoder.shared():
        raise UserError(f"{folder}: several layers use {shared[0]}, and compressed-tensors packs each for itself")
    with torch.device("meta"):
        model = type(decoder.model)(decoder.model.config)
    own_name = {module: name for name, module in decoder.model.named_modules()}
    for linear in linears.values():
        replace_module(model, own_name[linear], nn.Identity())
    try:
        model.apply(model._init_weights)
    except AttributeError:
        raise UserError(
            f"{folder}: transformers loads no {family} with packed matrices: it asks for their weights beforehand"
        ) from None


def _by_rounding(decoder: Decoder, asked: Quantisation) -> Iterator[dict[str, Tensor]]:
    """The packed tensors of each layer by name, rounded to nearest: no text is asked for."""
    for names in progress(decoder.checkpoint.shards().values(), "round to nearest"):
        if linears := [name for name in decoder.linears() if f"{name}.weight" in names]:
            yield _packed({name: _to_nearest(decoder, name, asked) for name in linears}, asked)


def _to_nearest(decoder: Decoder, name: str, asked: Quantisation) -> Quantised:
    weight = decoder.checkpoint.matrix(name)
    check_finite(decoder.checkpoint.folder, name, weight)
    return round_to_nearest(weight, asked, decoder.dtype)


def _by_gptq(decoder: Decoder, windows: Tensor, batch_size: int, asked: Quantisation) -> Iterator[dict[str, Tensor]]:
    """The packed tensors of each layer by name, quantised by what the layer sees of those quantised before it."""
    found: dict[str, Quantised] = {}

    def make(name: str, weight: Tensor, statistics: dict[str, Tensor | None]) -> Tensor:
        check_finite(decoder.checkpoint.folder, name, weight)
        if (hessian := statistics["hessian"]) is not None:
            found[name] = gptq(weight, hessian, asked, decoder.dtype, name)
        else:
            log.warning("%s saw no token of the calibration text: rounded to nearest", name)
            found[name] = round_to_nearest(weight, asked, decoder.dtype)
        return found[name].weight

    gather = {"hessian": partial(accumulating_hessians, samples=len(windows))}
    for layer in change_layers(LayerWalk(decoder, windows.split(batch_size)), "gptq", gather, make):
        yield _packed({name: found.pop(name) for name in layer.linears if name in found}, asked)


def _packed(layer: dict[str, Quantised], asked: Quantisation) -> dict[str, Tensor]:
    return {f"{name}.{key}": part for name, found in layer.items() for key, part in pack(found, asked).items()}


def _texts(decoder: Decoder, asked: Quantisation) -> dict[str, str]:
    """config.json with what compressed-tensors has to know."""
    config = json.loads((decoder.checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    inside = f"{decoder.layers_name}."
    modules = decoder.model.named_modules()
    weights = {"num_bits": asked.bits, "type": "int", "symmetric": asked.symmetric, "dynamic": False}
    strategy = {"strategy": "group", "group_size": asked.group_size} if asked.group_size else {"strategy": "channel"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | strategy}},
        "ignore": [name for name, module in modules if isinstance(module, nn.Linear) and not name.startswith(inside)],
    }
    return {"config.json": json.dumps(config, indent=2) + "\n"}
