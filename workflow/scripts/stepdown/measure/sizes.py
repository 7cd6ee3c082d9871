"""What a checkpoint takes: parameters, those not zero, bytes; and how much of the dense model's weights is left."""

from pathlib import Path

from ..files import weight_files
from ..models.decoder import open_decoder
from ..models.quantised_checkpoint import open_checkpoint
from ..models.tier_maps import TierMap
from ..packed.folder import is_packed, read_index, read_shard
from ..packed.format import BLOCK_SIZE, packed_bytes, unpack
from ..packed.integers import IntegerMatrix, as_floats
from ..tensors.masks import count_zeros


def size_of(folder: Path | str, tier_map: TierMap | None = None) -> dict[str, int | None]:
    """`parameters`, `nonzeros` (both of weights, quantised and packed ones as what they stand for), `bytes` of the
    weight files, and `packed_bytes`, what those would be with the matrices of a tier map packed; None without.

    One tensor is in memory at a time, of a packed folder one layer; tied weights count once.
    """
    if is_packed(folder):
        return _packed_size(Path(folder))
    checkpoint = open_checkpoint(folder)
    packable = tier_map.tiers if tier_map and tier_map.block_size == BLOCK_SIZE else {}
    parameters = zeros = saved = 0
    for name in checkpoint.names:
        tensor = checkpoint.tensors([name])[name]
        parameters, zeros = parameters + tensor.numel(), zeros + count_zeros(tensor)
        if (tiers := packable.get(name.removesuffix(".weight"))) is not None:
            saved += tensor.nbytes - packed_bytes(tiers, tier_map.k, tensor.itemsize)
    size = sum(file.stat().st_size for file in weight_files(folder))
    packed = size - saved if packable else None
    return {"parameters": parameters, "nonzeros": parameters - zeros, "bytes": size, "packed_bytes": packed}


def _packed_size(folder: Path) -> dict[str, int | None]:
    index = read_index(folder)
    parameters = zeros = size = 0
    for file in index["sha256"]:
        tensors, matrices = read_shard(folder / file, index)
        for matrix in matrices.values():
            weight = unpack(as_floats(matrix) if isinstance(matrix, IntegerMatrix) else matrix)
            parameters, zeros = parameters + weight.numel(), zeros + count_zeros(weight)
        for tensor in tensors.values():
            parameters, zeros = parameters + tensor.numel(), zeros + count_zeros(tensor)
        size += (folder / file).stat().st_size
    return {"parameters": parameters, "nonzeros": parameters - zeros, "bytes": size, "packed_bytes": None}


def remaining(folder: Path | str, base: Path | str, trust_remote_code: bool = False) -> dict[str, float | int]:
    """`weights`: those in the linears of the dense model's decoder layers; `overall`: the share of them that is gone,
    zero or not there any more. What a smaller model has in addition, such as shortcut matrices, is subtracted from it.
    """
    dense = open_decoder(base, "cpu", trust_remote_code)
    weights = sum(linear.weight.numel() for linear in dense.linears().values())
    left = open_decoder(folder, "cpu", trust_remote_code)
    names = [f"{name}.weight" for name in left.linears()]
    names += [name for name in left.checkpoint.names if name.endswith("_shortcut")]
    nonzeros = 0
    for name in names:
        tensor = left.checkpoint.tensors([name])[name]
        nonzeros += tensor.numel() - count_zeros(tensor)
    return {"overall": max(0.0, 1 - nonzeros / weights), "weights": weights}
