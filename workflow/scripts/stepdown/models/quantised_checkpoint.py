"""Checkpoints whose matrices are packed whole numbers, in the format `pack-quantized` of compressed-tensors.

`from_pretrained` reads it, and so does vLLM. Here a packed matrix is read as the weight it stands for: whoever walks a
model sees no difference.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files import read_json_object
from ..plan.compressions import BITS, Quantisation
from ..tensors.quantisation import Quantised
from .checkpoint import Checkpoint

FORMAT = "pack-quantized"


def pack(quantised: Quantised, asked: Quantisation) -> dict[str, Tensor]:
    """The tensors that stand for a weight, by what is added to the name of its linear."""
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    tensors = {
        "weight_packed": pack_to_int32(quantised.codes, asked.bits),
        "weight_scale": quantised.scales,
        "weight_shape": torch.tensor(quantised.codes.shape),
    }
    if not asked.symmetric:
        tensors["weight_zero_point"] = pack_to_int32(quantised.zeros, asked.bits, packed_dim=0)
    # Of one element, any strides count as contiguous, and not all are written.
    return {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def unpack(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """The weight [out, in] that the tensors of `pack` stand for."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    scales, shape = tensors["weight_scale"], torch.Size(tensors["weight_shape"].tolist())
    zeros = torch.zeros_like(scales, dtype=torch.int8)
    if "weight_zero_point" in tensors:
        # Transposed here, as compressed-tensors trips over matrices of few rows.
        packed = tensors["weight_zero_point"].T.clone(memory_format=torch.contiguous_format)
        zeros = unpack_from_int32(packed, bits, scales.T.shape).T
    return Quantised(unpack_from_int32(tensors["weight_packed"], bits, shape), scales, zeros).weight


class QuantisedCheckpoint(Checkpoint):
    """A checkpoint that answers with weights where its files have packed ones."""

    def __init__(self, folder: Path | str, bits: int):
        super().__init__(folder)
        self._bits = bits
        stems = [name.removesuffix("_packed") for name in self._file_of if name.endswith(".weight_packed")]
        self._parts = {
            stem: [
                f"{stem}_{part}"
                for part in ("packed", "scale", "shape", "zero_point")
                if f"{stem}_{part}" in self._file_of
            ]
            for stem in stems
        }

    @property
    def names(self) -> list[str]:
        hidden = {part for parts in self._parts.values() for part in parts}
        return sorted((self._file_of.keys() - hidden) | self._parts.keys())

    def __contains__(self, name: str) -> bool:
        return name in self._parts or super().__contains__(name)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._parts:
            return super().shape(name)
        return tuple(super().tensors([f"{name}_shape"])[f"{name}_shape"].tolist())

    def dtype(self, name: str) -> torch.dtype:
        return super().dtype(f"{name}_scale" if name in self._parts else name)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of the named tensors, packed ones as the weights they stand for."""
        names = set(names)
        packed = names & self._parts.keys()
        found = super().tensors((names - packed) | {part for name in packed for part in self._parts[name]})
        for name in packed:
            parts = {part.removeprefix(name.removesuffix("weight")): found.pop(part) for part in self._parts[name]}
            found[name] = unpack(parts, self._bits)
        return found

    def rows(self, name: str, rows: slice) -> Tensor:
        return self.tensors([name])[name][rows] if name in self._parts else super().rows(name, rows)


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """The checkpoint of a folder; raises `UserError` for a quantised one in a format that is not ours."""
    config = Path(folder) / "config.json"
    quantisation = read_json_object(config).get("quantization_config") if config.is_file() else None
    if not quantisation:
        return Checkpoint(folder)
    try:
        (group,) = quantisation["config_groups"].values()
        bits = group["weights"]["num_bits"]
        assert quantisation["format"] == FORMAT and bits in BITS and not group.get("input_activations")
        checkpoint = QuantisedCheckpoint(folder, bits)
        # Inputs in another order, which whoever is given weights would not know of.
        assert not any(name.endswith("_g_idx") for name in checkpoint.stored)
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError):
        raise UserError(
            f"{folder}: quantised in another format than {FORMAT}; give the model before quantisation"
        ) from None
    return checkpoint
