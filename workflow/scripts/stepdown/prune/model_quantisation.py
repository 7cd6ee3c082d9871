"""Quantising a model, pruned or not: every prunable matrix becomes packed whole numbers, layer by layer."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from ..cli import log, progress
from ..errors import UserError
from ..models.checkpoint import load_tensors, save_tensors, write_checkpoint
from ..models.decoder import Decoder, LayerWalk
from ..models.quantised_checkpoint import FORMAT, pack
from ..plan.compressions import Quantisation, check_groups
from ..tensors.quantisation import Quantised, gptq, round_to_nearest
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
    linears = decoder.linears()
    check_groups(asked, {name: linear.in_features for name, linear in linears.items()})
    if decoder.checkpoint.transposed or any(".experts." in name for name in linears):
        family = decoder.model.config.model_type
        raise UserError(f"{decoder.checkpoint.folder}: the matrices of {family} are no linears to compressed-tensors")
    file_of: dict[str, Path] = {}
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.") as waiting:
        for layer, found in _quantise_layers(decoder, windows, batch_size, asked):
            file = Path(waiting) / f"{layer}.safetensors"
            packed = {name: pack(quantised, asked) for name, quantised in found.items()}
            save_tensors(
                {f"{name}.{key}": part for name, parts in packed.items() for key, part in parts.items()}, file, {}
            )
            file_of.update(dict.fromkeys(found, file))

        def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
            for shard, names in progress(decoder.checkpoint.shards().items(), "write"):
                matrices = {name.removesuffix(".weight") for name in names if name.endswith(".weight")} & file_of.keys()
                tensors = decoder.checkpoint.tensors(set(names) - {f"{name}.weight" for name in matrices})
                for file in sorted({file_of[name] for name in matrices}):
                    tensors |= load_tensors(file)[0]
                yield shard, tensors

        write_checkpoint(decoder.checkpoint.folder, target, shards(), identity, texts=_texts(decoder, asked))


def _quantise_layers(
    decoder: Decoder, windows: Tensor | None, batch_size: int, asked: Quantisation
) -> Iterator[tuple[str, dict[str, Quantised]]]:
    """Name of each layer, and its matrices by name."""
    if asked.method == "int":
        for shard, names in progress(decoder.checkpoint.shards().items(), "round to nearest"):
            matrices = [name for name in decoder.linears() if f"{name}.weight" in names]
            if matrices:
                weights = {name: decoder.checkpoint.matrix(name) for name in matrices}
                _check_finite(decoder, weights)
                yield shard, {name: round_to_nearest(weight, asked, decoder.dtype) for name, weight in weights.items()}
        return
    name_of = {module: name for name, module in decoder.linears().items()}
    walk = LayerWalk(decoder, list(windows.split(batch_size)))
    for layer_name, layer, replay in walk.layers("gptq"):
        linears = {name_of[module]: module for module in layer.modules() if module in name_of}
        with accumulating_hessians(linears, len(windows)) as hessians:
            replay(advance=False)
        _check_finite(decoder, {name: linear.weight for name, linear in linears.items()})
        found = {}
        for name, linear in linears.items():
            found[name] = _by_gptq(linear, hessians.get(name), asked, decoder.dtype, name)
            linear.weight.copy_(found[name].weight)
        replay()
        yield layer_name, found


def _check_finite(decoder: Decoder, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(f"{decoder.checkpoint.folder}: {name}: a weight is NaN or infinite; copy the model again")


def _by_gptq(
    linear: nn.Linear, hessian: Tensor | None, asked: Quantisation, dtype: torch.dtype, name: str
) -> Quantised:
    if hessian is None:
        log.warning("%s saw no token of the calibration text: rounded to nearest", name)
        return round_to_nearest(linear.weight, asked, dtype)
    return gptq(linear.weight, hessian, asked, dtype, name)


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
