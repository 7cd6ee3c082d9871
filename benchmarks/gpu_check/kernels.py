"""The packed kernels at 35/45/20 against cuBLAS and torch's 2:4: milliseconds, and what moving the bytes takes."""

import time

import torch
from three_tiers import prune_blocks_, tiers_by_shares
from timing import Work, gigabytes_per_second, milliseconds
from torch import Tensor
from torch.nn.functional import linear

from stepdown.packed.format import PackedMatrix, pack
from stepdown.packed.linear import ThreeTierLinear
from stepdown.tensors.masks import keep_n_of_m

SHAPES, ROWS = [(4096, 4096), (11008, 4096), (4096, 11008)], [1, 2, 4, 8, 16, 128]
SHARES, K = ("0.35", "0.45", "0.2"), 10
# Copies of a matrix together exceed this, several times a GPU's cache.
CACHE = 256 << 20


def run(device: torch.device, tiny: bool) -> dict:
    bandwidth = gigabytes_per_second(device, tiny)
    found = {"gigabytes_per_second": bandwidth, "times": []}
    for shape in [(64, 96)] if tiny else SHAPES:
        found["times"] += time_shape(shape, device, bandwidth, tiny)
    return found


def time_shape(shape: tuple[int, int], device: torch.device, bandwidth: float, tiny: bool) -> list[dict]:
    """For each number of rows: milliseconds by way to the product, the floors of dense and packed bytes among them."""
    generator = torch.Generator(device).manual_seed(0)
    weight = (torch.randn(shape, generator=generator, device=device) / shape[1] ** 0.5).bfloat16()
    tiers = tiers_by_shares(shape, SHARES).to(device)
    pruned = weight.clone()
    prune_blocks_(pruned, tiers, K)
    matrix = pack(pruned, tiers, K)
    floors = {f"{name} bytes": size / bandwidth / 1e6 for name, size in
              (("dense", weight.nbytes), ("packed", matrix.nbytes))}  # fmt: skip
    rows_of_x = [1, 20] if tiny else ROWS
    found = []
    for rows in rows_of_x:
        x = torch.randn(rows, shape[1], generator=generator, device=device).bfloat16()
        ways = {
            "cuBLAS": lambda x=x: [lambda w=w: linear(x, w) for w in copies(weight)],
            "three-tier": lambda x=x: three_tier(matrix, pruned, x),
        }
        if device.type == "cuda":
            ways["torch 2:4"] = lambda x=x: two_four(weight, x)
        times = {name: attempt(works, device) for name, works in ways.items()}
        found.append({"shape": "x".join(map(str, shape)), "rows": rows, **floors, **times})
    found[0]["host, cuBLAS"], found[0]["host, three-tier"] = host_milliseconds(weight, matrix, tiny)
    return found


def attempt(works, device: torch.device) -> float | str:
    """Milliseconds, or why there are none."""
    try:
        return milliseconds(works(), device)
    except (RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"


def three_tier(matrix: PackedMatrix, pruned: Tensor, x: Tensor) -> list[Work]:
    """Calls of the packed kernel, whose result is checked first; raises ValueError."""
    layers = []
    for _ in range(_count(matrix.nbytes, x.device)):
        parts = {name: tensor.clone() for name, tensor in matrix.tensors.items()}
        layers.append(ThreeTierLinear(PackedMatrix(matrix.shape, **parts), None, "triton"))
    exact = x.double() @ pruned.double().T
    error = ((layers[0](x).double() - exact).norm() / exact.norm()).item()
    if not error < 1e-2:
        raise ValueError(f"relative error {error}")
    return [lambda layer=layer: layer(x) for layer in layers]


def two_four(weight: Tensor, x: Tensor) -> list[Work]:
    """torch's own 2:4 product (cuSPARSELt or CUTLASS)."""
    half = weight * keep_n_of_m(weight.float().abs(), 2, 4)
    sparse = [torch.sparse.to_sparse_semi_structured(half) for _ in range(_count(half.nbytes // 2, half.device))]
    return [lambda w=w: linear(x, w) for w in sparse]


def copies(weight: Tensor) -> list[Tensor]:
    return [weight.clone() for _ in range(_count(weight.nbytes, weight.device))]


def _count(size: int, device: torch.device) -> int:
    return -(-CACHE // size) if device.type == "cuda" else 1


def host_milliseconds(weight: Tensor, matrix: PackedMatrix, tiny: bool) -> list[float]:
    """What the host takes to launch each at one row: a decoder cannot go faster without a graph."""
    layer, x = ThreeTierLinear(matrix, None, "triton"), weight[:1].clone()
    found = []
    for work in (lambda: linear(x, weight), lambda: layer(x)):
        work()
        start, calls = time.perf_counter(), 1 if tiny else 300
        for _ in range(calls):
            work()
        found.append((time.perf_counter() - start) / calls * 1e3)
    return found


def table(found: dict) -> list[str]:
    lines = [f"copy {found['gigabytes_per_second']:.0f} GB/s; microseconds, and how many times as fast as cuBLAS"]
    for times in found["times"]:
        base = times["cuBLAS"]
        cells = [
            f"{name} {1000 * value:.1f} ({base / value:.2f})" if isinstance(value, float) else f"{name} {value}"
            for name, value in times.items()
        ]
        lines.append(", ".join(cells))
    return lines
