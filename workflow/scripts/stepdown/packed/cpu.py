"""The C++ kernels: built on first use with this machine's compiler, kept in the user's cache, called through ctypes."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..cli import log
from ..files import cache_folder
from .format import BLOCK_SIZE, PackedMatrix, strip_layout, unpack
from .integers import IntegerMatrix, as_floats
from .quads import top_k_quads

SOURCE = Path(__file__).with_name("three_tier.cpp")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp")
INSTRUCTIONS = {"avx2": 1, "avx512": 2}


class NoKernel(Exception):
    """Why this machine has no C++ kernels, in a line."""


class _Matrix(ctypes.Structure):
    """`Matrix` of three_tier.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("strips", "block_columns", "outputs", "k", "bits")] + [
        (name, ctypes.c_void_p)
        for name in (
            *("dense", "two_four", "positions", "top_k", "top_k_positions", "columns", "starts", "bias"),
            *("quad_values", "quad_columns", "quad_blocks", "vectors_before", "quads_before"),
            *("dense_codes", "two_four_codes", "code_positions"),
            *("dense_multiples", "two_four_multiples", "scales"),
        )
    ]


class CpuMultiply:
    """x -> x W^T + b, bf16 [rows, in] -> [rows, out], for a checked matrix of bf16 or, with AVX-512, of whole numbers;
    instructions: `avx512` or `avx2`."""

    def __init__(self, matrix: PackedMatrix | IntegerMatrix, bias: Tensor | None, instructions: str):
        self._library = library()
        self._avx512 = int(instructions == "avx512")
        self._packed = matrix
        strips, block_columns = matrix.tiers.shape
        self._padding = block_columns * BLOCK_SIZE - matrix.shape[1]
        floats, bits, codes = matrix, 0, ()
        if isinstance(matrix, IntegerMatrix):
            # Of them only the TopK blocks are computed with.
            floats, bits = as_floats(matrix), matrix.bits
            multiples = matrix.dense_multiples, matrix.two_four_multiples
            scales = pad(matrix.scales, (0, strips * BLOCK_SIZE - matrix.shape[0]))
            codes = matrix.dense, matrix.two_four, matrix.positions, *multiples, scales
        blocks = (None, None, None) if bits else (floats.dense, floats.two_four, floats.positions)
        quads = top_k_quads(floats) if self._avx512 else (None,) * 5
        parts = (*blocks, floats.top_k, floats.top_k_positions, *strip_layout(matrix.tiers), bias, *quads)
        # Held, since the kernel knows addresses only.
        self._tensors = [None if tensor is None else tensor.contiguous() for tensor in (*parts, *codes)]
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in self._tensors]
        self._matrix = _Matrix(strips, block_columns, matrix.shape[0], matrix.top_k.shape[1], bits, *addresses)

    @property
    def weight(self) -> Tensor:
        return unpack(as_floats(self._packed) if isinstance(self._packed, IntegerMatrix) else self._packed)

    def __call__(self, x: Tensor) -> Tensor:
        x = pad(x, (0, self._padding)) if self._padding else x.contiguous()
        y = x.new_empty(len(x), self._matrix.outputs)
        matrix, threads = ctypes.byref(self._matrix), torch.get_num_threads()
        self._library.three_tier_linear(matrix, x.data_ptr(), len(x), y.data_ptr(), threads, self._avx512)
        return y


def best_instructions() -> str:
    """The fastest set of instructions this machine has; raises `NoKernel` when it has none or nothing can be built."""
    level = library().three_tier_instructions()
    for name, needed in sorted(INSTRUCTIONS.items(), key=lambda item: -item[1]):
        if level >= needed:
            return name
    raise NoKernel("this processor has neither AVX-512 BF16 nor AVX2")


@cache
def library() -> ctypes.CDLL:
    """The kernels, built if need be; raises `NoKernel` when there is no compiler or it cannot build them."""
    return load_library(build())


def load_library(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.three_tier_linear.argtypes = [pointer, pointer, number, pointer, ctypes.c_int, ctypes.c_int]
    loaded.three_tier_linear.restype = None
    return loaded


def build(flags: tuple[str, ...] = FLAGS) -> Path:
    """Compile three_tier.cpp, unless that is in the cache from the same source, compiler, flags and torch."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise NoKernel("no C++ compiler found (g++ or clang++)")
    # With torch's own OpenMP library the kernels share torch's threads.
    openmp = sorted(map(str, Path(torch.__file__).parent.glob("lib/libgomp*")))
    command = [*compiler.split(), *flags, str(SOURCE), *openmp]
    version = _run([*compiler.split(), "--version"])
    key = hashlib.sha256("\n".join([version, torch.__version__, *command]).encode() + SOURCE.read_bytes()).hexdigest()
    # Where nothing can be kept, they are for this process.
    folder = cache_folder() or Path(tempfile.mkdtemp(prefix="stepdown-"))
    target = folder / f"three_tier-{key[:16]}.so"
    if not target.exists():
        log.info("building the C++ kernels with %s: a few seconds, once", compiler)
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        try:
            _run([*command, "-o", str(partial)])
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
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
