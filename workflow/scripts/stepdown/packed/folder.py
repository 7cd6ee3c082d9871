"""A packed model on disk, written from a checkpoint and its tier map, and read and checked file by file.

docs/packed-format.md has it byte for byte: one safetensors file per decoder layer, and `packed.json`, written last.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..cli import progress
from ..errors import UserError
from ..files import read_json_object, safetensors_header, write_json
from ..models.checkpoint import (
    REST,
    Checkpoint,
    check_finite,
    load_tensors,
    new_folder,
    save_tensors,
    shard_of,
    side_files,
)
from ..models.tier_maps import TierMap, check_same_model, check_zeros
from ..registration import QUANT_METHOD
from ..tensors.block_rounding import Rounded, round_in_blocks
from ..tensors.blocks import grid_shape
from .format import BLOCK_SIZE, PARTS, PackedMatrix, pack
from .integers import PARTS as INTEGER_PARTS
from .integers import IntegerMatrix, pack_integers

FORMAT = "stepdown packed 2"
# The first had no `values`: they were of the type that the checkpoint has.
FORMATS = "stepdown packed 1", FORMAT
# By what the kept weights are stored as: the bits of whole numbers.
VALUES = {"bf16": None, "int8": 8, "int4": 4}
# Of the head where kept weights are whole numbers, of 8 or 4.
HEAD_BITS = 8
INDEX_NAME = "packed.json"

# What becomes of a weight [out, in] of that name with tiers uint8 [block rows, block cols].
Rounding = Callable[[str, Tensor, Tensor], Rounded]


@dataclass(frozen=True)
class Head:
    """The head as whole numbers of `HEAD_BITS`. name: in the folder; shared_as: what its weight, as it was, is called
    there for whatever else uses it."""

    name: str
    rounded: Rounded
    shared_as: str | None


def write_packed(
    checkpoint: Checkpoint,
    tier_map: TierMap,
    map_path: Path | str,
    target: Path | str,
    values: str = "bf16",
    rounding: Rounding | None = None,
    head: Head | None = None,
) -> float:
    """Write the folder `target` from a checkpoint, one decoder layer in memory at a time.

    values: one of `VALUES`; rounding: to whole numbers, by itself to nearest; head: if not given, it stays as it is.
    Returns the bytes of the packed matrices per weight, without the head. Raises `UserError` when the map is of another
    checkpoint or block size, and for values that are not finite, and leaves nothing half-written.
    """
    check_packable(checkpoint, tier_map, map_path)
    bits, sizes = VALUES[values], []
    if bits and rounding is None:
        rounding = partial(_to_nearest, bits=bits)
    marks = {"format": FORMAT, "values": values}
    with new_folder(target) as folder:
        for file in side_files(checkpoint.folder):
            shutil.copyfile(file, folder / file.name)
        config = read_json_object(checkpoint.folder / "config.json")
        config["quantization_config"] = {"quant_method": QUANT_METHOD, **marks}
        write_json(folder / "config.json", config)
        hashes = {}
        for shard, names in progress(checkpoint.shards().items(), "pack"):
            file = folder / f"{shard}.safetensors"
            tensors, shapes = _pack_shard(checkpoint, names, tier_map, bits, rounding, sizes)
            metadata = marks | {"k": str(tier_map.k)}
            if head and shard == REST:
                metadata["head"] = head.name
                shapes[head.name] = _pack_head(head, tier_map.k, tensors)
            metadata["shapes"] = json.dumps(shapes, sort_keys=True)
            save_tensors(tensors, file, metadata)
            hashes[file.name] = sha256(file)
        index = {**marks, "block_size": BLOCK_SIZE, "k": tier_map.k, **tier_map.identity, "sha256": hashes}
        write_json(folder / INDEX_NAME, index)
    packed, weights = map(sum, zip(*sizes, strict=True))
    return packed / weights


def check_packable(checkpoint: Checkpoint, tier_map: TierMap, map_path: Path | str) -> None:
    """Raises `UserError` when the map is of another checkpoint, or of blocks that the format has not."""
    check_same_model(tier_map, map_path, checkpoint)
    if tier_map.block_size != BLOCK_SIZE or not 1 <= tier_map.k <= BLOCK_SIZE**2:
        raise UserError(
            f"{map_path}: blocks of {tier_map.block_size} with k {tier_map.k}; the packed format is for blocks of"
            f" {BLOCK_SIZE} with k from 1 to {BLOCK_SIZE**2}"
        )


def check_finite_in_bf16(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Raises `UserError` if a value of a checkpoint is NaN, or infinite in what a packed model runs in."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            check_finite(folder, f"{name} in bf16", torch.stack(tensor.aminmax()).bfloat16())


def is_packed(folder: Path | str) -> bool:
    return (Path(folder) / INDEX_NAME).is_file()


def read_index(folder: Path) -> dict:
    """What packed.json says; raises `UserError` unless it is there, of this version, and names files that are there."""
    path = folder / INDEX_NAME
    if not is_packed(folder):
        found = f"no {INDEX_NAME}" if folder.is_dir() else "no such folder"
        inside = [*folder.glob(f"*/{INDEX_NAME}"), *folder.glob(f"packed/*/{INDEX_NAME}")]
        such_as = f", such as {', '.join(sorted(str(path.parent) for path in inside))}" if inside else ""
        raise UserError(f"{folder}: {found}; give a folder that pack.py wrote{such_as}")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        found, files = index["format"], list(index["sha256"].items())
        index.setdefault("values", "bf16")
        whole = (
            index["values"] in VALUES
            and index["block_size"] == BLOCK_SIZE
            and 1 <= index["k"] <= BLOCK_SIZE**2
            and files
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found, whole = FORMAT, False
    if found not in FORMATS:
        raise UserError(
            f"{path}: format {found!r}, this version reads {' and '.join(map(repr, FORMATS))}; use the version that"
            " wrote it"
        )
    if not whole:
        raise UserError(f"{path}: not readable as the index of a packed model; pack it again")
    for file, _ in files:
        if Path(file).name != file or not os.path.isfile(folder / file):
            raise UserError(f"{folder}: {file}, named in {INDEX_NAME}, is missing; pack it again")
    return index


def read_shard(path: Path, index: dict) -> tuple[dict[str, Tensor], dict[str, PackedMatrix | IntegerMatrix]]:
    """The ordinary tensors and the packed matrices of one file by stored name, each checked; raises `UserError`."""
    safetensors_header(path)
    if sha256(path) != index["sha256"][path.name]:
        raise UserError(f"{path}: not as it was when it was packed (its sha256 differs); copy it again or pack again")
    tensors, metadata = load_tensors(path)
    matrices: dict[str, PackedMatrix | IntegerMatrix] = {}
    for name, shape in _shapes(path, metadata, index).items():
        is_head = name == metadata.get("head") and path.stem == REST
        bits = HEAD_BITS if is_head else VALUES[index["values"]]
        kind, parts = (IntegerMatrix, INTEGER_PARTS[bits]) if bits else (PackedMatrix, PARTS)
        try:
            matrices[name] = kind(shape, **{part: tensors.pop(f"{name}.{part}") for part in parts})
            matrices[name].check(index["k"])
        except KeyError as part:
            raise UserError(f"{path}: {part.args[0]} is missing; pack it again") from None
        except UserError as error:
            raise UserError(f"{path}: {name}: {error}; pack it again") from None
    for name in sorted(tensors):
        linear, _, part = name.rpartition(".")
        if f"{shard_of(name)}.safetensors" != path.name or (linear in matrices and part != "bias"):
            raise UserError(f"{path}: holds {name}, which has no place in this file; pack it again")
    return tensors, matrices


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shapes_in(folder: Path, index: dict) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Name -> shape of the ordinary tensors and of the packed matrices, without reading any."""
    ordinary, matrices = {}, {}
    for file in index["sha256"]:
        header, _ = safetensors_header(folder / file)
        shapes = _shapes(folder / file, header.pop("__metadata__", {}), index)
        matrices |= shapes
        for name, entry in header.items():
            linear, _, part = name.rpartition(".")
            if linear not in shapes or part == "bias":
                ordinary[name] = tuple(entry["shape"])
    return ordinary, matrices


def _pack_shard(
    checkpoint: Checkpoint,
    names: list[str],
    tier_map: TierMap,
    bits: int | None,
    rounding: Rounding | None,
    sizes: list[tuple[int, int]],
) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    """What is stored of one decoder layer, and [out, in] of its matrices; notes bytes and weights of each."""
    tensors = checkpoint.tensors(names)
    check_finite_in_bf16(checkpoint.folder, tensors)
    linears = [name for name in (key.removesuffix(".weight") for key in names) if name in tier_map.tiers]
    shapes = {}
    for name in linears:
        weight, tiers = tensors.pop(f"{name}.weight"), tier_map.tiers[name]
        check_zeros(tier_map, name, weight, checkpoint.folder)
        if bits:
            matrix = pack_integers(weight, rounding(name, weight, tiers), tiers, tier_map.k, bits)
        else:
            matrix = pack(weight.bfloat16(), tiers, tier_map.k)
        tensors |= {f"{name}.{part}": tensor for part, tensor in matrix.tensors.items()}
        shapes[name] = matrix.shape
        sizes.append((matrix.nbytes, weight.numel()))
    return tensors, shapes


def _pack_head(head: Head, k: int, tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Put the head's parts where its weight was, if that had its name; its [out, in]."""
    codes, weight = head.rounded.codes, tensors.pop(f"{head.name}.weight", None)
    if weight is not None and head.shared_as:
        tensors[head.shared_as] = weight
    tiers = torch.zeros(grid_shape(tuple(codes.shape), BLOCK_SIZE), dtype=torch.uint8)
    matrix = pack_integers(codes, head.rounded, tiers, k, HEAD_BITS)
    tensors |= {f"{head.name}.{part}": tensor for part, tensor in matrix.tensors.items()}
    return matrix.shape


def _to_nearest(_: str, weight: Tensor, tiers: Tensor, bits: int) -> Rounded:
    return round_in_blocks(weight, tiers, bits)


def _shapes(path: Path, metadata: dict[str, str], index: dict) -> dict[str, tuple[int, int]]:
    """Name -> [out, in] of the packed matrices in a file, by its metadata; raises `UserError` if they are no such, or
    of another kind of folder than the index says."""
    if not isinstance(metadata, dict):
        metadata = {}
    for key in ("format", "values"):
        if (found := metadata.get(key, "bf16" if key == "values" else None)) != index[key]:
            raise UserError(f"{path}: {key} {found!r}, but {INDEX_NAME} says {index[key]!r}; pack it again")
    try:
        shapes = {name: (rows, columns) for name, (rows, columns) in json.loads(metadata["shapes"]).items()}
        if all(type(size) is int and size > 0 for shape in shapes.values() for size in shape):
            return shapes
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{path}: its metadata do not say which matrices it holds; pack it again")
