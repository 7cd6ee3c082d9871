"""Time of one-shot masks and updates against what they replace or cannot do without, in the same process.

    python benchmarks/oneshot.py

One 4096 x 4096 float32 matrix at 50 %, then a layer of a random Llama of 1 B. Bars: Wanda's mask 4 times as fast as
a stable sort of each row, with the same mask; 2:4 5 times as fast as the published loop over groups; SparseGPT within
1.3 times its Cholesky and the matrix products it cannot avoid; pruning a model by Wanda within 1.15 times the two
forward passes per layer that sequential propagation takes; pruning takes the same time however much text there is, so
that ratio is of the text too. What is measured is processor time on one thread, on which other work on the machine
tells least.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow/scripts"))

from random_llama import write_random_llama

from stepdown.models.decoder import open_decoder
from stepdown.models.layer_walk import LayerWalk
from stepdown.prune.oneshot import prune_layers
from stepdown.tensors.patterns import Pattern, n_of_m, unstructured
from stepdown.tensors.saliency import wanda
from stepdown.tensors.sparsegpt import optimal_brain_surgeon

COLUMNS = 128


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(floor: Callable[[], object], ours: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of both, measured in turn."""
    pairs = [(seconds(floor), seconds(ours)) for _ in range(repeats)]
    return tuple(statistics.median(times) for times in zip(*pairs, strict=True))


# --- what the public code does ---------------------------------------------------------------------------------------


def sorted_rows(metric: Tensor) -> Tensor:
    dropped = metric.sort(dim=-1, stable=True).indices[:, : metric.shape[1] // 2]
    return torch.ones_like(metric, dtype=torch.bool).scatter_(1, dropped, False)


def loop_over_groups(metric: Tensor) -> Tensor:
    keep = torch.ones_like(metric, dtype=torch.bool)
    for first in range(0, metric.shape[1], 4):
        dropped = metric[:, first : first + 4].topk(2, dim=1, largest=False).indices
        keep.scatter_(1, first + dropped, False)
    return keep


def published_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse, by way of the factor of the Hessian."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


def products(weight: Tensor, factor: Tensor) -> None:
    """What each block of columns changes in all columns to its right."""
    weight = weight.clone()
    for first in range(0, len(factor) - COLUMNS, COLUMNS):
        last = first + COLUMNS
        weight[:, last:].addmm_(weight[:, first:last], factor[first:last, last:], alpha=-1e-6)


# --- the comparisons -------------------------------------------------------------------------------------------------


def masks(weight: Tensor, norms: Tensor, repeats: int) -> None:
    half, two_four = unstructured(Fraction(1, 2)), n_of_m(2, 4)
    metric = wanda(weight, norms)
    if not torch.equal(half.keep(metric), sorted_rows(metric)):
        raise SystemExit("the masks differ")
    cases = {
        "Wanda 0.5": (lambda: sorted_rows(wanda(weight, norms)), lambda: half.keep(wanda(weight, norms)), 4),
        "2:4": (lambda: loop_over_groups(metric), lambda: two_four.keep(metric), 5),
    }
    for name, (public, ours, bar) in cases.items():
        slow, fast = compare(public, ours, repeats)
        print(f"{name:14s} {1e3 * fast:6.0f} ms, public code {1e3 * slow:.0f} ms: {slow / fast:.1f} times (bar: {bar})")


def surgeon(weight: Tensor, hessian: Tensor, repeats: int) -> None:
    factor = torch.linalg.cholesky(hessian).T.contiguous()
    floors = {
        "the published factor and products": lambda: (published_factor(hessian), products(weight, factor)),
        "one Cholesky and the products": lambda: (torch.linalg.cholesky(hessian), products(weight, factor)),
    }
    for name, pattern in {"SparseGPT 0.5": unstructured(Fraction(1, 2)), "SparseGPT 2:4": n_of_m(2, 4)}.items():
        for what, floor in floors.items():
            least, ours = compare(
                floor, lambda pattern=pattern: optimal_brain_surgeon(weight, hessian, pattern), repeats
            )
            bar = " (bar: 1.3)" if "published" in what else ""
            print(f"{name:14s} {ours:6.2f} s, {what} {least:.2f} s: ratio {ours / least:.2f}{bar}")


def model(folder: Path, samples: int, tokens: int, repeats: int) -> None:
    windows = torch.randint(0, 1000, (samples, tokens))

    def forward_twice() -> None:
        walk = LayerWalk(open_decoder(folder, "cpu"), list(windows.split(1)))
        for _, _, replay in walk.layers("forward"):
            replay(advance=False)
            replay()

    def prune(pattern: Pattern) -> None:
        decoder = open_decoder(folder, "cpu")
        for layer in prune_layers(decoder, windows, 1, "wanda", lambda name, weight: pattern):
            layer.weights()

    print(f"model          hidden 2048, FFN 5632, bf16; {samples} samples x {tokens} tokens")
    for name, pattern in {"Wanda 0.5": unstructured(Fraction(1, 2)), "Wanda 2:4": n_of_m(2, 4)}.items():
        least, ours = compare(forward_twice, lambda pattern=pattern: prune(pattern), repeats)
        print(f"{name:14s} {ours:6.2f} s, two forward passes {least:.2f} s: ratio {ours / least:.3f} (bar: 1.15)")


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    size, generator = arguments.size, torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(size, size, generator=generator), torch.randn(2 * size, size, generator=generator)
    print(f"matrix         {size} x {size} float32")
    masks(weight, inputs.square().sum(0), arguments.repeats)
    surgeon(weight, inputs.T @ inputs / size, arguments.repeats)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_random_llama(Path(temporary) / "model", layers=arguments.layers)
        model(folder, arguments.samples, arguments.sequence_length, repeats=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    main(parser.parse_args())
