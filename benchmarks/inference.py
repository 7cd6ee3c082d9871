"""Time of three-tier linears against every dense way to the same product, in the same process on the same machine.

    python benchmarks/inference.py --values int8

Matrices in three tiers at 35/45/20 and 90/10/0, their kept weights stored as `--values` says, and a whole 1 B-shaped
decoder, against torch's products with dense weights of these values and this project's own kernel with every block
Dense. In bf16 torch's are `F.linear`, also in float32, and oneDNN with weights prepacked as torch.compile's freezing
does it; in int8 those of dynamic quantisation and of weights alone; in int4 that of weights alone, in groups of 32.

Copies of each matrix take turns, so that none is in a cache. `bound` is what moving fewer bytes than our own dense
kernel can gain at most, GB/s counts the bytes stored. Bars at 35/45/20: 1 row, bf16 at least 1.3 times as fast as the
fastest dense, all values at least 85 % of the GB/s of our own dense kernel; 128 rows at least 0.9 times as fast as the
fastest dense of the same values. At 90/10/0, 1 row at least as fast.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow/scripts"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from three_tiers import random_three_tier, tiers_by_shares

from stepdown.models.linears import linear_of, replace_module
from stepdown.packed.decoding import quicken_decoding
from stepdown.packed.folder import VALUES
from stepdown.packed.format import PackedMatrix, pack
from stepdown.packed.integers import IntegerMatrix, pack_integers
from stepdown.packed.linear import ThreeTierLinear, choose_kernel
from stepdown.tensors.block_rounding import round_in_blocks

SIZES = [(4096, 4096), (11008, 4096), (4096, 11008)]
ALL_DENSE, OWN = "100/0/0", "own dense kernel"
MIXES = {"35/45/20": ("0.35", "0.45", "0.20"), "90/10/0": ("0.90", "0.10", "0.00"), ALL_DENSE: ("1", "0", "0")}
K, VOCABULARY = 10, 32000
Product = Callable[[torch.Tensor], torch.Tensor]


def matrix_of(shape: tuple[int, int], mix: str, values: str) -> PackedMatrix | IntegerMatrix:
    weight, tiers = random_three_tier(shape, K, tiers=tiers_by_shares(shape, MIXES[mix]))
    if bits := VALUES[values]:
        return pack_integers(weight, round_in_blocks(weight, tiers, bits), tiers, K, bits)
    return pack(weight, tiers, K)


def copied(matrix: PackedMatrix | IntegerMatrix) -> PackedMatrix | IntegerMatrix:
    return replace(matrix, **{part: tensor.clone() for part, tensor in matrix.tensors.items()})


def torch_bf16(weight: torch.Tensor, rows: int) -> dict[str, tuple[Product, int]]:
    """What torch has for dense weights in bf16, each with its own copy of them, and its bytes."""
    own, wide = weight.clone(), weight.float()
    # In the layout that oneDNN likes best for so many rows.
    prepacked = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return {
        "F.linear bf16": (lambda x: linear(x, own), own.nbytes),
        "F.linear float32": (lambda x: linear(x.float(), wide), wide.nbytes),
        "oneDNN prepacked bf16": (
            lambda x: torch.ops.mkldnn._linear_pointwise(x, prepacked, None, "none", [], ""),
            own.nbytes,
        ),
    }


def torch_int8(weight: torch.Tensor, rows: int) -> dict[str, tuple[Product, int]]:
    scales = weight.float().abs().amax(1) / 127
    codes = (weight.float() / scales[:, None]).round().to(torch.int8)
    quantised = torch._make_per_channel_quantized_tensor(codes, scales, torch.zeros(len(scales), dtype=torch.long), 0)
    packed, scales = torch.ops.quantized.linear_prepack(quantised, None), scales.bfloat16()
    return {
        "torch dynamic int8": (lambda x: torch.ops.quantized.linear_dynamic(x.float(), packed, True), codes.nbytes),
        "torch weights int8": (lambda x: torch._weight_int8pack_mm(x, codes, scales), codes.nbytes),
    }


def torch_int4(weight: torch.Tensor, rows: int) -> dict[str, tuple[Product, int]]:
    outputs, inputs = weight.shape
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.ones(inputs // 32, outputs, 2).bfloat16()
    size = codes.numel() // 2 + scales.nbytes
    return {"torch weights int4": (lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, 32, scales), size)}


TORCH_PRODUCTS = {"bf16": torch_bf16, "int8": torch_int8, "int4": torch_int4}


def milliseconds(products: dict[str, list[Product]], x: torch.Tensor, seconds: float) -> dict[str, tuple[float, float]]:
    """Median and best time of each over rounds in which all take turns, in a different order each time."""
    times: dict[str, list[float]] = {name: [] for name in products}
    names, end, turn = list(products), time.perf_counter() + seconds, 0
    # Of one thread its processor time, which other processes disturb less.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    while turn < 5 or time.perf_counter() < end:
        random.shuffle(names)
        for name in names:
            product = products[name][turn % len(products[name])]
            start = clock()
            product(x)
            times[name].append(1000 * (clock() - start))
        turn += 1
    return {name: (statistics.median(found[1:]), min(found)) for name, found in times.items()}


def report(title: str, found: dict[str, tuple[float, float]], sizes: dict[str, int]) -> None:
    """A line for each; three-tier ones against the fastest dense one, by median and by best, and what bytes allow.

    On a machine that others use as well the best times say more.
    """
    dense = [times for name, times in found.items() if not name.startswith("three-tier")]
    median, best = (min(times[place] for times in dense) for place in (0, 1))
    speeds = {name: sizes[name] / times[0] / 1e6 for name, times in found.items()}
    print(f"\n{title}{'median':>20}{'best, ms':>12}{'GB/s':>8}{'MB':>8}")
    for name, times in found.items():
        line = f"  {name:24}{times[0]:9.3f}{times[1]:10.3f}{speeds[name]:8.1f}{sizes[name] / 1e6:8.1f}"
        if name.startswith("three-tier"):
            line += f"   {median / times[0]:.2f} ({best / times[1]:.2f}) times the fastest dense;"
            line += (
                f" bound {sizes[OWN] / sizes[name]:.2f}; {100 * speeds[name] / speeds[OWN]:.0f} % of our dense's GB/s"
            )
        print(line, flush=True)


def compare_matrices(shape: tuple[int, int], values: str, arguments: argparse.Namespace, kernel: str) -> None:
    matrices = {f"three-tier {mix}": matrix_of(shape, mix, values) for mix in arguments.mixes}
    matrices[OWN] = matrix_of(shape, ALL_DENSE, values)
    dense = torch.randn(shape).bfloat16() / shape[1] ** 0.5
    copies = max(2, -(-arguments.cache * 2**20 // min(matrix.nbytes for matrix in matrices.values())))
    own = {name: [ThreeTierLinear(copied(m), None, kernel) for _ in range(copies)] for name, m in matrices.items()}
    sizes = {name: matrix.nbytes for name, matrix in matrices.items()}
    for rows in arguments.rows:
        x = torch.randn(rows, shape[1]).bfloat16()
        others = [TORCH_PRODUCTS[values](dense, rows) for _ in range(copies)]
        products = own | {name: [copy[name][0] for copy in others] for name in others[0]}
        found = milliseconds(products, x, arguments.seconds)
        title = f"{values}, {shape[0]} x {shape[1]}, rows {rows:3}"
        report(title, found, sizes | {name: size for name, (_, size) in others[0].items()})


def decoder_of(make: Callable[[tuple[int, int]], torch.nn.Module], layers: int) -> torch.nn.Module:
    """A Llama of 1.1 B parameters in 22 layers (hidden 2048, FFN 5632, vocabulary 32000) with linears from `make`."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    config = LlamaConfig(num_hidden_layers=layers, vocab_size=VOCABULARY, dtype="bfloat16", **sizes)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            replace_module(model, name, make(tuple(module.weight.shape)))
    rest = {name: torch.ones(p.shape, dtype=p.dtype) for name, p in model.named_parameters() if p.is_meta}
    model.load_state_dict(rest, strict=False, assign=True)
    return model.requires_grad_(False)


def compare_decoders(values: str, arguments: argparse.Namespace, kernel: str) -> None:
    """Tokens one at a time after a prompt of 16, and a prompt of 128, through the whole decoder."""
    matrix = cache(matrix_of)

    def packed(mix: str) -> Callable:
        def make(shape: tuple[int, int]) -> torch.nn.Module:
            of_head = ALL_DENSE, "bf16" if values == "bf16" else "int8"
            return ThreeTierLinear(
                copied(matrix(shape, *(of_head if shape[0] == VOCABULARY else (mix, values)))), None, kernel
            )

        return make

    makers = {f"three-tier {mix}": packed(mix) for mix in arguments.mixes} | {OWN: packed(ALL_DENSE)}
    makers["F.linear bf16"] = lambda shape: linear_of(torch.randn(shape).bfloat16())
    models = {name: decoder_of(make, arguments.layers) for name, make in makers.items()}
    for model in models.values():
        quicken_decoding(model)
    token, prompt = torch.ones(1, 1, dtype=torch.long), torch.arange(128)[None]
    for title, x, steps in (
        ("a token", token, {name: [one_token_more(model)] for name, model in models.items()}),
        ("a prompt of 128", prompt, {name: [torch.no_grad()(model)] for name, model in models.items()}),
    ):
        found = milliseconds(steps, x, 4 * arguments.seconds)
        fastest = min(times[0] for name, times in found.items() if not name.startswith("three-tier"))
        print(f"\n{values}, decoder of {arguments.layers} layers, {title}{'median':>14}{'best, ms':>12}")
        for name, (median, best) in found.items():
            print(f"  {name:24}{median:9.2f}{best:10.2f}   {fastest / median:.2f} times the fastest dense")


@torch.no_grad()
def one_token_more(model: torch.nn.Module) -> Product:
    """A token through the decoder, after a prompt of 16."""
    cache = model(torch.arange(16)[None]).past_key_values
    return torch.no_grad()(lambda token: model(token, past_key_values=cache))


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    kernel = choose_kernel(arguments.kernel, torch.device("cpu"))
    print(f"kernel {kernel}, {arguments.threads} thread(s), torch {torch.__version__}")
    for values in arguments.values:
        for shape in arguments.sizes:
            compare_matrices(shape, values, arguments, kernel)
        if arguments.layers:
            compare_decoders(values, arguments, kernel)


def size(text: str) -> tuple[int, int]:
    outputs, inputs = text.split("x")
    return int(outputs), int(inputs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=size, nargs="*", default=SIZES, help="out x in, such as 4096x4096")
    parser.add_argument("--values", nargs="+", choices=VALUES, default=["bf16"], help="what kept weights are stored as")
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES)[:2], help="shares of the tiers in %%")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 128], help="rows of x")
    parser.add_argument("--layers", type=int, default=22, help="of the decoder; 0 for none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="for each comparison")
    parser.add_argument("--cache", type=int, default=128, help="MiB that the copies of a matrix exceed together")
    parser.add_argument("--kernel", default="auto", help="auto, avx512 or avx2")
    main(parser.parse_args())
