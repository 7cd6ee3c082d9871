"""Compile the Triton kernels for Hopper cards, which takes no GPU."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stepdown.packed import triton_kernel
from stepdown.tensors import column_kernels

NUMBERS = ("outputs", "block_columns", "first", "last", "below", "beside")
ELEMENTS = {
    "y": "bf16", "bias": "bf16", "x": "i16", "x_pairs": "i32", "x_groups": "i64", "weight": "i16",
    "weight_pairs": "i32",
    "positions": "u8", "top_k_positions": "u8", "columns": "i32", "starts": "i64", "lines_before": "i64",
}  # fmt: skip


def compiled(kernel, elements: dict[str, str], warps: int, **constants: object):
    """The kernel for tensors of these elements, every address and size a multiple of 16."""
    elements = ELEMENTS | elements
    signature = {
        name: "constexpr" if name in constants else "i32" if name in NUMBERS else f"*{elements[name]}"
        for name in kernel.arg_names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind != "constexpr"
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def main() -> None:
    by_four = {"dense": "i64", "two_four": "i64", "top_k": "i64"}
    for rows, warps in ((1, 16), (3, 8), (8, 4)):
        constants = {"has_bias": rows == 3, "ROWS": rows, "LINES": 16 * warps}
        kernel = compiled(triton_kernel._few_rows, by_four, warps, **constants)
        print(f"few rows, {rows}: {kernel.metadata.shared} bytes of shared memory")
    by_two = {"dense": "i32", "two_four": "i32", "top_k": "i16"}
    kernel = compiled(triton_kernel._unpack, by_two, 4, k=10, BLOCKS=8, PROGRAMS=8)
    print(f"unpack: {kernel.metadata.shared} bytes of shared memory")
    floats = dict.fromkeys(("weight", "change", "factor", "scale", "step", "low", "high"), "fp32")
    for name, constants in {"2:4": (2, 4, False), "masked": (0, 1, False), "rounded": (0, 1, True)}.items():
        constants = dict(zip(("N", "M", "ROUND"), constants, strict=True)) | {"COLUMNS": 128, "LINES": 16}
        kernel = compiled(column_kernels._settle, floats | {"keep": "i8", "codes": "i16"}, 4, **constants)
        print(f"columns, {name}: {kernel.metadata.shared} bytes of shared memory")


if __name__ == "__main__":
    main()
