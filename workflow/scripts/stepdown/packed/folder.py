"""A packed model on disk, written from a checkpoint and its tier map, and read and checked file by file.

docs/packed-format.md has it byte for byte: one safetensors file per decoder layer, and `packed.json`, written last.
"""

import hashlib
import json
import shutil
from pathlib import Path

from torch import Tensor

from ..cli import progress
from ..errors import UserError
from ..files import read_json_object, safetensors_header, write_json
from ..models.checkpoint import Checkpoint, load_tensors, new_folder, save_tensors, side_files
from ..models.tier_maps import TierMap, check_same_model, check_zeros
from .format import BLOCK_SIZE, PARTS, PackedMatrix, check, pack

FORMAT = "stepdown packed 1"
INDEX_NAME = "packed.json"
# By which transformers knows such a folder: `auto_model`.
QUANT_METHOD = "stepdown"


def write_packed(checkpoint: Checkpoint, tier_map: TierMap, map_path: Path | str, target: Path | str) -> float:
    """Write the folder `target` from a checkpoint, one decoder layer in memory at a time.

    Returns the bytes of the packed matrices as a share of what they take in the checkpoint. Raises `UserError` when the
    map is of another checkpoint or block size, and leaves nothing half-written.
    """
    check_same_model(tier_map, map_path, checkpoint)
    if tier_map.block_size != BLOCK_SIZE or not 1 <= tier_map.k <= BLOCK_SIZE**2:
        raise UserError(
            f"{map_path}: blocks of {tier_map.block_size} with k {tier_map.k}; the packed format is for blocks of"
            f" {BLOCK_SIZE} with k from 1 to {BLOCK_SIZE**2}"
        )
    sizes = []
    with new_folder(target) as folder:
        for file in side_files(checkpoint.folder):
            shutil.copyfile(file, folder / file.name)
        config = read_json_object(checkpoint.folder / "config.json")
        config["quantization_config"] = {"quant_method": QUANT_METHOD, "format": FORMAT}
        write_json(folder / "config.json", config)
        hashes = {}
        for shard, names in progress(checkpoint.shards().items(), "pack"):
            file = folder / f"{shard}.safetensors"
            tensors, metadata = _pack_shard(checkpoint, names, tier_map, sizes)
            save_tensors(tensors, file, metadata)
            hashes[file.name] = sha256(file)
        index = {"format": FORMAT, "block_size": BLOCK_SIZE, "k": tier_map.k, **tier_map.identity, "sha256": hashes}
        write_json(folder / INDEX_NAME, index)
    packed, dense = map(sum, zip(*sizes, strict=True))
    return packed / dense


def read_index(folder: Path) -> dict:
    """What packed.json says; raises `UserError` unless it is there, of this version, and names files that are there."""
    path = folder / INDEX_NAME
    if not path.is_file():
        raise UserError(f"{folder}: no {INDEX_NAME}; give a folder that pack.py wrote")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        found, files = index["format"], list(index["sha256"].items())
        whole = index["block_size"] == BLOCK_SIZE and 1 <= index["k"] <= BLOCK_SIZE**2 and files
    except (ValueError, KeyError, TypeError, AttributeError):
        found, whole = FORMAT, False
    if found != FORMAT:
        raise UserError(f"{path}: format {found!r}, this version reads {FORMAT!r}; use the version that wrote it")
    if not whole:
        raise UserError(f"{path}: not readable as the index of a packed model; pack it again")
    for file, _ in files:
        if Path(file).name != file or not (folder / file).is_file():
            raise UserError(f"{folder}: {file}, named in {INDEX_NAME}, is missing; pack it again")
    return index


def read_shard(path: Path, index: dict) -> tuple[dict[str, Tensor], dict[str, PackedMatrix]]:
    """The ordinary tensors and the packed matrices of one file by stored name, each checked; raises `UserError`."""
    safetensors_header(path)
    if sha256(path) != index["sha256"][path.name]:
        raise UserError(f"{path}: not as it was when it was packed (its sha256 differs); copy it again or pack again")
    tensors, metadata = load_tensors(path)
    matrices = {}
    for name, shape in _shapes(path, metadata).items():
        try:
            matrices[name] = PackedMatrix(shape, **{part: tensors.pop(f"{name}.{part}") for part in PARTS})
            check(matrices[name], index["k"])
        except KeyError as part:
            raise UserError(f"{path}: {part.args[0]} is missing; pack it again") from None
        except UserError as error:
            raise UserError(f"{path}: {name}: {error}; pack it again") from None
    return tensors, matrices


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shapes_in(folder: Path, index: dict) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Name -> shape of the ordinary tensors and of the packed matrices, without reading any."""
    ordinary, matrices = {}, {}
    for file in index["sha256"]:
        header, _ = safetensors_header(folder / file)
        shapes = _shapes(folder / file, header.pop("__metadata__", {}))
        matrices |= shapes
        for name, entry in header.items():
            linear, _, part = name.rpartition(".")
            if linear not in shapes or part == "bias":
                ordinary[name] = tuple(entry["shape"])
    return ordinary, matrices


def _pack_shard(
    checkpoint: Checkpoint, names: list[str], tier_map: TierMap, sizes: list[tuple[int, int]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What is stored of one decoder layer, and the file's metadata; notes packed and dense bytes of each matrix."""
    tensors = checkpoint.tensors(names)
    linears = [name for name in (key.removesuffix(".weight") for key in names) if name in tier_map.tiers]
    shapes = {}
    for name in linears:
        weight = tensors.pop(f"{name}.weight")
        check_zeros(tier_map, name, weight, checkpoint.folder)
        matrix = pack(weight, tier_map.tiers[name], tier_map.k)
        tensors |= {f"{name}.{part}": tensor for part, tensor in matrix.tensors.items()}
        shapes[name] = matrix.shape
        sizes.append((matrix.nbytes, weight.nbytes))
    return tensors, {"format": FORMAT, "k": str(tier_map.k), "shapes": json.dumps(shapes, sort_keys=True)}


def _shapes(path: Path, metadata: dict[str, str]) -> dict[str, tuple[int, int]]:
    """Name -> [out, in] of the packed matrices in a file, by its metadata; raises `UserError` if they are no such."""
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: format {metadata.get('format')!r}, this version reads {FORMAT!r}")
    try:
        shapes = {name: (rows, columns) for name, (rows, columns) in json.loads(metadata["shapes"]).items()}
        if all(type(size) is int and size > 0 for shape in shapes.values() for size in shape):
            return shapes
    except (KeyError, ValueError, TypeError, AttributeError):
        pass
    raise UserError(f"{path}: its metadata do not say which matrices it holds; pack it again")
