"""Time of three-tier linears against every dense way to the same product, in the same process on the same machine.

    python benchmarks/inference.py

Matrices in three tiers at 35/45/20 and 90/10/0, and a whole 1 B-shaped decoder, against `F.linear` in bf16 and float32,
oneDNN with weights prepacked as torch.compile's freezing does it, and this project's own kernel with every block Dense.
Copies of each matrix take turns, so that none is in a cache. `bound` is what moving fewer bytes can gain at most.
Bars at 35/45/20: 1 row at least 1.3 times as fast as the fastest dense, 128 rows at least 0.9 times; at 90/10/0, 1 row
at least as fast.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow/scripts"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from three_tiers import random_three_tier, tiers_by_shares

from stepdown.models.linears import linear_of, replace_module
from stepdown.packed.format import PackedMatrix, pack
from stepdown.packed.linear import ThreeTierLinear, choose_kernel, dense_linear

SIZES = [(4096, 4096), (11008, 4096), (4096, 11008)]
MIXES = {"35/45/20": ("0.35", "0.45", "0.20"), "90/10/0": ("0.90", "0.10", "0.00")}
K = 10
Product = Callable[[torch.Tensor], torch.Tensor]


def three_tier_matrix(shape: tuple[int, int], mix: str) -> tuple[torch.Tensor, PackedMatrix]:
    weight, tiers = random_three_tier(shape, K, tiers=tiers_by_shares(shape, MIXES[mix]))
    return weight, pack(weight, tiers, K)


def copied(matrix: PackedMatrix) -> PackedMatrix:
    return PackedMatrix(matrix.shape, **{part: tensor.clone() for part, tensor in matrix.tensors.items()})


def prepacked(weight: torch.Tensor, rows: int) -> Product:
    """oneDNN's product with weights in the layout it likes best for so many rows."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def torch_products(weight: torch.Tensor, rows: int, copies: int) -> dict[str, list[Product]]:
    """The dense opponents that torch has, each with its own copies of the weight."""
    weights = [weight.clone() for _ in range(copies)]
    wide = [weight.float() for _ in range(copies)]
    return {
        "F.linear bf16": [lambda x, w=w: linear(x, w) for w in weights],
        "F.linear float32": [lambda x, w=w: linear(x.float(), w) for w in wide],
        "oneDNN prepacked bf16": [prepacked(w, rows) for w in weights],
    }


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


def report(title: str, found: dict[str, tuple[float, float]], sizes: dict[str, int], dense_bytes: int) -> None:
    """A line for each; three-tier ones against the fastest dense one, by median and by best, and what bytes allow.

    On a machine that others use as well the best times say more.
    """
    median, best = (min(times[place] for name, times in found.items() if name not in sizes) for place in (0, 1))
    print(f"\n{title}{'median':>20}{'best, ms':>12}")
    for name, times in found.items():
        line = f"  {name:24}{times[0]:9.2f}{times[1]:10.2f}"
        if name in sizes:
            bound, gain, best_gain = dense_bytes / sizes[name], median / times[0], best / times[1]
            line += f"   {gain:.2f} ({best_gain:.2f}) times the fastest dense; bound {bound:.2f},"
            line += f" {100 * gain / bound:.0f} ({100 * best_gain / bound:.0f}) % of it;"
            line += f" {sizes[name] / times[1] / 1e6:.0f} GB/s"
        print(line, flush=True)


def compare_matrices(shape: tuple[int, int], arguments: argparse.Namespace, kernel: str) -> None:
    dense_bytes = 2 * shape[0] * shape[1]
    copies = max(2, -(-arguments.cache * 2**20 // dense_bytes))
    packed, sizes = {}, {}
    for mix in MIXES:
        weight, matrix = three_tier_matrix(shape, mix)
        packed[f"three-tier {mix}"] = [ThreeTierLinear(copied(matrix), None, kernel) for _ in range(copies)]
        sizes[f"three-tier {mix}"] = matrix.nbytes
    packed["own dense kernel"] = [dense_linear(weight, None, kernel) for _ in range(copies)]
    for rows in arguments.rows:
        x = torch.randn(rows, shape[1]).bfloat16()
        products = packed | torch_products(weight, rows, copies)
        report(
            f"{shape[0]} x {shape[1]}, rows {rows:3}", milliseconds(products, x, arguments.seconds), sizes, dense_bytes
        )


def decoder_of(make: Callable[[tuple[int, int]], torch.nn.Module], layers: int) -> torch.nn.Module:
    """A Llama of 1.1 B parameters in 22 layers (hidden 2048, FFN 5632, vocabulary 32000) with linears from `make`."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    config = LlamaConfig(num_hidden_layers=layers, vocab_size=32000, dtype="bfloat16", **sizes)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            replace_module(model, name, make(tuple(module.weight.shape)))
    rest = {name: torch.ones(p.shape, dtype=p.dtype) for name, p in model.named_parameters() if p.is_meta}
    model.load_state_dict(rest, strict=False, assign=True)
    return model.requires_grad_(False)


def compare_decoders(arguments: argparse.Namespace, kernel: str) -> None:
    """Tokens one at a time after a prompt of 16, and a prompt of 128, through the whole decoder."""
    known: dict[tuple, tuple[torch.Tensor, PackedMatrix]] = {}

    def matrix(shape: tuple[int, int], mix: str) -> tuple[torch.Tensor, PackedMatrix]:
        if (shape, mix) not in known:
            known[shape, mix] = three_tier_matrix(shape, mix)
        return known[shape, mix]

    def packed(mix: str) -> Callable:
        def make(shape: tuple[int, int]) -> torch.nn.Module:
            weight, found = matrix(shape, mix)
            is_head = shape[0] == 32000
            return dense_linear(weight, None, kernel) if is_head else ThreeTierLinear(copied(found), None, kernel)

        return make

    makers = {f"three-tier {mix}": packed(mix) for mix in MIXES} | {
        "own dense kernel": lambda shape: dense_linear(matrix(shape, "90/10/0")[0], None, kernel),
        "F.linear bf16": lambda shape: linear_of(matrix(shape, "90/10/0")[0].clone()),
    }
    models = {name: decoder_of(make, arguments.layers) for name, make in makers.items()}
    token, prompt = torch.ones(1, 1, dtype=torch.long), torch.arange(128)[None]
    for title, x, steps in (
        ("a token", token, {name: [one_token_more(model)] for name, model in models.items()}),
        ("a prompt of 128", prompt, {name: [torch.no_grad()(model)] for name, model in models.items()}),
    ):
        found = milliseconds(steps, x, 4 * arguments.seconds)
        fastest = min(times[0] for name, times in found.items() if not name.startswith("three-tier"))
        print(f"\ndecoder of {arguments.layers} layers, {title}{'median':>14}{'best, ms':>12}")
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
    for shape in arguments.sizes:
        compare_matrices(shape, arguments, kernel)
    if arguments.layers:
        compare_decoders(arguments, kernel)


def size(text: str) -> tuple[int, int]:
    outputs, inputs = text.split("x")
    return int(outputs), int(inputs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=size, nargs="*", default=SIZES, help="out x in, such as 4096x4096")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 128], help="rows of x")
    parser.add_argument("--layers", type=int, default=22, help="of the decoder; 0 for none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="for each comparison")
    parser.add_argument("--cache", type=int, default=128, help="MiB that the copies of a matrix exceed together")
    parser.add_argument("--kernel", default="auto", help="auto, avx512 or avx2")
    main(parser.parse_args())
