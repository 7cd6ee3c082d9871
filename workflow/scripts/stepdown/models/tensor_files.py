"""Safetensors files: any part of a tensor read by itself, tensors written one at a time, whole files or none."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from ..files import safetensors_header, written_whole

CHUNK_BYTES = 1 << 24
# What safetensors calls the types, in the order in which it lays them out: no tensor then starts at an odd place.
TYPES = {"U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64}
TYPES |= {"F32": torch.float32, "U32": torch.uint32, "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16}
TYPES |= {"U16": torch.uint16, "I16": torch.int16, "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3": torch.float8_e4m3fn}
TYPES |= {"F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in TYPES.items()}


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: Path | str,
    metadata: dict[str, str],
    ready: Callable[[Tensor], Tensor] = Tensor.detach,
) -> None:
    """Write one safetensors file elsewhere and move it; nothing is left of it on an error.

    ready: makes of a tensor what is written, of the same shape and type, when its turn comes: see `in_file_order`.
    """
    with written_whole(path) as partial, partial.open("wb") as file:
        file.write(_header(tensors, metadata))
        for name in in_file_order(tensors):
            file.write(_bytes(ready(tensors[name])))


def in_file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors as a file has them: by type, and then by name."""
    kinds = list(TYPES.values())
    return sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))


def _header(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """What a file begins with. The library's own has the metadata in a different order every time."""
    header: dict[str, dict] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for name in in_file_order(tensors):
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def load_tensors(
    path: Path | str, rows: Callable[[int], slice] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of one safetensors file, and its metadata; raises `UserError` when it cannot be read.

    rows: which rows are wanted of a tensor that has so many; default all of them.
    """
    path = Path(path)
    try:
        # It checks the file, too.
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); delete it and run again") from None
    header, _ = safetensors_header(path)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            whole = as_stored(entry)
            tensors[name] = read_part(path, entry, whole[rows(len(whole))] if rows and whole.dim() else whole)
    return tensors, metadata


def as_stored(entry: dict) -> Tensor:
    """A tensor like the one a file's header tells of, on the meta device."""
    return torch.empty(entry["shape"], device="meta")


def read_part(file: Path, entry: dict, part: Tensor) -> Tensor:
    """What a view of `as_stored(entry)` shows of the tensor, contiguous; of the file no more than it spans is read.

    Read and not mapped: what is copied from a map is in memory twice.
    """
    dtype = dtype_of(file, entry)
    if part.numel() == 0:
        return torch.empty(part.shape, dtype=dtype)
    span = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
    held = torch.empty(span, dtype=dtype)
    begin, end = entry["data_offsets"]
    with _at(file, begin + part.storage_offset() * dtype.itemsize) as opened:
        read = opened.readinto(held.view(torch.uint8).numpy())
    if read != held.nbytes or end - begin != as_stored(entry).numel() * dtype.itemsize:
        raise UserError(f"{file}: not a readable safetensors file ({entry}); copy or download it again")
    return held.as_strided(part.shape, part.stride()).contiguous()


def dtype_of(file: Path, entry: dict) -> torch.dtype:
    """The type of a tensor by a file's header; raises `UserError` for one that is not known here."""
    if entry["dtype"] not in TYPES:
        raise UserError(f"{file}: a tensor of the unknown type {entry['dtype']}; give the model in bfloat16")
    return TYPES[entry["dtype"]]


def stored_bytes(file: Path, begin: int, end: int) -> Iterator[bytes]:
    """The bytes of one tensor, a few at a time."""
    with _at(file, begin) as opened:
        left = end - begin
        while left:
            chunk = opened.read(min(left, CHUNK_BYTES))
            left -= len(chunk)
            yield chunk


def _at(file: Path, begin: int) -> BinaryIO:
    """A safetensors file opened where its data have come to `begin`."""
    opened = file.open("rb")
    length = int.from_bytes(opened.read(8), "little")
    opened.seek(8 + length + begin)
    return opened
