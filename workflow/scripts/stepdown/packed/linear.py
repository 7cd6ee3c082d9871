"""The linear that computes with a packed matrix, and the choice of what computes it."""

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..cli import log
from ..errors import UserError
from ..tensors.block_rounding import round_dense
from ..tensors.blocks import grid_shape
from .cpu import INSTRUCTIONS, CpuMultiply, NoKernel, best_instructions, compiled_kernels
from .format import BLOCK_SIZE, PackedMatrix, pack, unpack
from .integers import IntegerMatrix, as_floats, pack_integers


class Multiply(Protocol):
    """What a kernel makes of a matrix W and a bias b: x W^T + b, bf16 [rows, in] -> [rows, out]; `weight` is W."""

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor: ...


class ThreeTierLinear(nn.Module):
    """y = x W^T + b for a W [out, in] in three tiers, in bf16; for running a model, not for training it.

    bias: [out]; the kernels of a CPU copy it, and follow no change in place; kernel: one of `KERNELS`. x may be of any
    floating type and any shape [..., in]; y is of x's type.
    Raises `UserError` when the parts of the matrix do not fit each other.
    """

    def __init__(self, matrix: PackedMatrix | IntegerMatrix, bias: Tensor | None, kernel: str):
        super().__init__()
        # The kernels read where the parts say, and look no more.
        matrix.check(k=matrix.top_k.shape[-1])
        self.out_features, self.in_features = matrix.shape
        self.kernel = kernel
        if not isinstance(matrix, IntegerMatrix):
            matrix = matrix.to(torch.bfloat16)
        elif kernel not in INTEGER_KERNELS:
            matrix = as_floats(matrix)
        # Some families read weight and bias, and do not call.
        self.register_buffer("bias", None if bias is None else bias.bfloat16(), persistent=False)
        self.multiply = KERNELS[kernel](matrix, self.bias)
        # Until somebody sets out to train it.
        self.eval()

    @property
    def weight(self) -> Tensor:
        """The whole W, bf16 [out, in], unpacked anew."""
        return self.multiply.weight

    def forward(self, x: Tensor) -> Tensor:
        if (x.requires_grad or self.training) and self.kernel != "torch" and torch.is_grad_enabled():
            raise UserError("a packed model is for running, not for training: use torch.no_grad(), or kernel 'torch'")
        y = self.multiply(x.reshape(-1, self.in_features).bfloat16())
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kernel={self.kernel}"


def dense_linear(weight: Tensor, bias: Tensor | None, kernel: str, bits: int | None = None) -> ThreeTierLinear:
    """What the kernels make of an ordinary matrix [out, in]: every block Dense; bits: of whole numbers, the nearest."""
    tiers = torch.zeros(grid_shape(tuple(weight.shape), BLOCK_SIZE), dtype=torch.uint8, device=weight.device)
    if bits is None:
        return ThreeTierLinear(pack(weight, tiers, k=1), bias, kernel)
    return ThreeTierLinear(pack_integers(weight, round_dense(weight, bits), tiers, 1, bits), bias, kernel)


class TorchMultiply:
    """torch's own product with the unpacked matrix, which stays in memory."""

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None):
        self.weight, self._bias = unpack(matrix), bias

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self._bias)


def _triton(matrix: PackedMatrix, bias: Tensor | None) -> Multiply:
    # Imported here: Triton is where a GPU is.
    from .triton_kernel import TritonMultiply

    return TritonMultiply(matrix, bias)


KERNELS: dict[str, Callable[[PackedMatrix, Tensor | None], Multiply]] = {
    "avx512": partial(CpuMultiply, instructions="avx512"),
    "avx2": partial(CpuMultiply, instructions="avx2"),
    "triton": _triton,
    "torch": TorchMultiply,
}

# Those that compute with whole numbers; the others are given what these stand for.
INTEGER_KERNELS = tuple(INSTRUCTIONS)


def choose_kernel(kernel: str, device: torch.device) -> str:
    """`auto` is the fastest there is for a device, and the log says which; raises `UserError` for one not to be had."""
    if kernel != "auto":
        return _available(kernel, device)
    on_gpu = device.type == "cuda"
    try:
        chosen = _with_triton() if on_gpu else best_instructions()
    except NoKernel as reason:
        log.warning("three-tier linears run in torch on unpacked weights, as large and as slow as dense: %s", reason)
        return "torch"
    log.info("three-tier linears run on the %s's %s kernel", "GPU" if on_gpu else "CPU", chosen)
    return chosen


def _with_triton() -> str:
    if not find_spec("triton"):
        raise NoKernel("Triton is not installed")
    return "triton"


def _available(kernel: str, device: torch.device) -> str:
    if kernel not in KERNELS:
        raise UserError(f"kernel {kernel!r}: not one of auto, {', '.join(KERNELS)}")
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
    needed = {"triton": device.type if interpreted else "cuda", "torch": device.type}
    if device.type != (kind := needed.get(kernel, "cpu")):
        raise UserError(f"kernel {kernel!r}: runs on {kind}, and the model is to be on {device.type}; use 'auto'")
    try:
        if kernel == "triton":
            _with_triton()
        level = compiled_kernels().three_tier_instructions() if kernel in INSTRUCTIONS else None
    except NoKernel as reason:
        raise UserError(f"kernel {kernel!r}: {reason}; use 'torch'") from None
    if level is not None and level < INSTRUCTIONS[kernel]:
        raise UserError(f"kernel {kernel!r}: this processor lacks its instructions; use 'auto'")
    return kernel
