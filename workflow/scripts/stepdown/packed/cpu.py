"""The C++ kernels: built on first use with this machine's compiler, kept in the user's cache, called through ctypes."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ..cli import log
from ..errors import UserError
from ..files import cache_folder
from .format import BLOCK_SIZE, PackedMatrix, strip_layout
from .huge_pages import in_huge_pages
from .integers import IntegerMatrix, top_k_before_scales
from .quads import top_k_quads

SOURCES = sorted((Path(__file__).parent / "kernels").glob("*.*"))
SOURCE = next(path for path in SOURCES if path.name == "three_tier.cpp")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp")
# With AMX torch's product of so many rows of x is faster by more than unpacking takes; how much is unpacked at once.
UNPACK_FROM, UNPACKED_BYTES = 32, 2**21
# Where a block stands is told in 16 bits.
MOST_BLOCK_COLUMNS = 2**16
INSTRUCTIONS = {"avx2": 1, "avx512": 2}


class NoKernel(Exception):
    """Why this machine has no C++ kernels, in a line."""


class _Matrix(ctypes.Structure):
    """`Matrix` of kernels/matrix.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("strips", "block_columns", "outputs", "k", "bits")] + [
        (name, ctypes.c_void_p)
        for name in (
            *("dense", "two_four", "positions", "top_k", "top_k_positions", "columns", "starts", "bias"),
            *("quads", "quads_before", "dense_codes", "two_four_codes", "code_positions"),
            *("dense_multiples", "two_four_multiples", "scales"),
        )
    ]


class CpuMultiply:
    """x -> x W^T + b, bf16 [rows, in] -> [rows, out], for a checked matrix of bf16 or of whole numbers; instructions:
    `avx512` or `avx2`."""

    def __init__(self, matrix: PackedMatrix | IntegerMatrix, bias: Tensor | None, instructions: str):
        self._library = compiled_kernels()
        self.avx512 = int(instructions == "avx512")
        self._bias = bias
        self.unpack_from = UNPACK_FROM if torch.cpu._is_amx_tile_supported() else sys.maxsize
        strips, block_columns = matrix.tiers.shape
        if block_columns > MOST_BLOCK_COLUMNS:
            raise UserError(f"a matrix of {matrix.shape[1]} inputs is too wide for a CPU kernel: use kernel 'torch'")
        self._padding = block_columns * BLOCK_SIZE - matrix.shape[1]
        blocks, bits, codes, top_k = (matrix.dense, matrix.two_four, matrix.positions), 0, (), matrix.top_k
        if isinstance(matrix, IntegerMatrix):
            scales = pad(matrix.scales, (0, strips * BLOCK_SIZE - matrix.shape[0]))
            codes = *blocks, matrix.dense_multiples, matrix.two_four_multiples, scales
            blocks, bits, top_k = (None, None, None), matrix.bits, top_k_before_scales(matrix)
        positions = matrix.top_k_positions
        quads = top_k_quads(matrix.tiers, top_k, positions) if self.avx512 else (None, None)
        columns, starts = strip_layout(matrix.tiers)
        parts = (*blocks, top_k, positions, columns.to(torch.uint16), starts, bias, *quads)
        # Held, since the kernel knows addresses only.
        self._tensors = [None if tensor is None else in_huge_pages(tensor) for tensor in (*parts, *codes)]
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in self._tensors]
        self.matrix = _Matrix(strips, block_columns, matrix.shape[0], matrix.top_k.shape[1], bits, *addresses)

    def __deepcopy__(self, memo: dict) -> "CpuMultiply":
        # Nothing changes it.
        return self

    def __reduce__(self) -> NoReturn:
        raise UserError("a packed model is not pickled: keep its folder, and load that with stepdown.load_packed")

    @property
    def weight(self) -> Tensor:
        width = self.matrix.block_columns * BLOCK_SIZE
        weight = torch.empty(self.matrix.strips * BLOCK_SIZE, width, dtype=torch.bfloat16)
        self._unpack(0, self.matrix.strips, weight)
        return weight[: self.matrix.outputs, : width - self._padding].contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            raise UserError(f"a linear packed for the CPU was given a tensor on {x.device}: load the model there")
        x = pad(x, (0, self._padding)) if self._padding else x.contiguous()
        y = x.new_empty(len(x), self.matrix.outputs)
        if len(x) >= self.unpack_from:
            self._multiply_unpacked(x, y)
        else:
            matrix, threads = ctypes.byref(self.matrix), torch.get_num_threads()
            self._library.three_tier_linear(matrix, x.data_ptr(), len(x), y.data_ptr(), threads, self.avx512)
        return y

    def _multiply_unpacked(self, x: Tensor, y: Tensor) -> None:
        """By torch's own product, with a few strips at a time that the second-level cache still holds when it comes."""
        strips, width = self.matrix.strips, x.shape[1]
        at_once = max(1, UNPACKED_BYTES // (2 * BLOCK_SIZE * width))
        weight = x.new_empty(min(at_once, strips) * BLOCK_SIZE, width)
        for first in range(0, strips, at_once):
            count = min(at_once, strips - first)
            self._unpack(first, count, weight)
            part = slice(first * BLOCK_SIZE, min((first + count) * BLOCK_SIZE, y.shape[1]))
            bias = None if self._bias is None else self._bias[part]
            y[:, part] = linear(x, weight[: part.stop - part.start], bias)

    def _unpack(self, first: int, strips: int, weight: Tensor) -> None:
        matrix, threads = ctypes.byref(self.matrix), torch.get_num_threads()
        self._library.three_tier_unpack(matrix, first, strips, weight.data_ptr(), threads)


def best_instructions() -> str:
    """The fastest set of instructions this machine has; raises `NoKernel` when it has none or nothing can be built."""
    level = compiled_kernels().three_tier_instructions()
    for name, needed in sorted(INSTRUCTIONS.items(), key=lambda item: -item[1]):
        if level >= needed:
            return name
    raise NoKernel("this processor has neither AVX-512 BF16 nor AVX2")


@cache
def compiled_kernels() -> ctypes.CDLL:
    """The kernels, built if need be; raises `NoKernel` when there is no compiler or it cannot build them."""
    return load_library(build())


def load_library(path: Path) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoKernel(f"{path} could not be loaded ({error}); delete it") from None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.three_tier_linear.argtypes = [pointer, pointer, number, pointer, ctypes.c_int, ctypes.c_int]
    loaded.three_tier_unpack.argtypes = [pointer, number, number, pointer, ctypes.c_int]
    places = pointer, number, number, pointer
    loaded.decode_token.argtypes = [pointer, number, *(pointer,) * 3, *places, ctypes.c_int]
    for function in (loaded.three_tier_linear, loaded.three_tier_unpack, loaded.decode_token):
        function.restype = None
    return loaded


def build(flags: tuple[str, ...] = FLAGS) -> Path:
    """Compile the kernels, unless they are in the cache from the same sources, compiler, flags and torch."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise NoKernel("no C++ compiler found (g++ or clang++)")
    # With torch's own OpenMP library the kernels share torch's threads.
    openmp = sorted(map(str, Path(torch.__file__).parent.glob("lib/libgomp*")))
    command = [*compiler.split(), *flags, str(SOURCE), *openmp]
    version = _run([*compiler.split(), "--version"])
    sources = b"".join(path.read_bytes() for path in SOURCES)
    key = hashlib.sha256("\n".join([version, torch.__version__, *command]).encode() + sources).hexdigest()
    # Where nothing can be kept, they are for this process.
    folder = cache_folder() or Path(tempfile.mkdtemp(prefix="stepdown-"))
    target = folder / f"three_tier-{key[:16]}.so"
    if not target.exists():
        log.info("building the C++ kernels with %s: a few seconds, once", compiler)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            _run([*command, "-o", f"{own}/{target.name}"])
            os.replace(f"{own}/{target.name}", target)
    return target


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as error:
        raise NoKernel(f"{command[0]} could not be run ({error.strerror})") from None
    except subprocess.CalledProcessError as error:
        log.debug("%s\n%s", " ".join(command), error.stderr)
        reason = next((line for line in error.stderr.splitlines() if "error" in line), "no reason given")
        raise NoKernel(f"{command[0]} could not build the kernels ({reason})") from None
