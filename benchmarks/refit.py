"""Refitting one matrix by conjugate gradients against its exact solution, a Cholesky factor for every row.

    python benchmarks/refit.py

A float32 matrix of 512 x 512 at 2:4 with correlated inputs. The exact solution goes through rows in batches, each row's
dropped inputs made an identity, so that one batched factorisation serves rows of any mask. Printed: how much of the
error that the exact solution takes away is taken away, processor time on one thread, and what each holds beside the
matrix and H. Bars: 99 % of the error that can be mended, in a twentieth of the time.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow/scripts"))

from stepdown.tensors.least_squares import masked_least_squares
from stepdown.tensors.masks import keep_n_of_m

SIDE, BATCH, DAMPING = 512, 128, 0.01


def exact(weight, keep, hessian, target):
    """The solution of every row by cholesky, BATCH rows at a time."""
    ridge = DAMPING * hessian.diagonal().mean()
    solution = torch.zeros_like(weight)
    for rows in torch.arange(len(weight)).split(BATCH):
        kept = keep[rows].float()
        systems = hessian * kept[:, :, None] * kept[:, None, :] + torch.diag_embed(ridge * kept + 1 - kept)
        right = (target[rows] + ridge * weight[rows]) * kept
        solution[rows] = torch.cholesky_solve(right[..., None], torch.linalg.cholesky(systems))[..., 0]
    return solution


def timed(function, *arguments):
    start = time.process_time()
    return function(*arguments), time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    # A spectrum that falls like that of activations, and a few inputs far larger than the rest.
    scale = torch.logspace(0, -2, SIDE)[:, None] * torch.randn(SIDE, SIDE, generator=draw)
    inputs = torch.randn(8192, SIDE, generator=draw) @ scale
    inputs[:, :4] *= 20
    dense = torch.randn(SIDE, SIDE, generator=draw)
    hessian = inputs.T @ inputs
    keep = keep_n_of_m(dense.abs() * hessian.diagonal().sqrt(), 2, 4)
    pruned, target = dense * keep, dense @ hessian

    def error(weight):
        return ((weight - dense) @ hessian * (weight - dense)).sum().item()

    solved, slow = timed(exact, pruned, keep, hessian, target)
    masked_least_squares(pruned, keep, hessian, target, DAMPING)
    found, fast = timed(masked_least_squares, pruned, keep, hessian, target, DAMPING)
    mended = (error(pruned) - error(found)) / (error(pruned) - error(solved))
    print(f"error of the outputs, share left: exact {error(solved) / error(pruned):.4f}, here {1 - mended:.4f} more")
    print(f"mended {mended:.2%} of what can be mended (bar 99 %)")
    print(f"processor time: exact {slow:.2f} s, here {fast:.3f} s, {slow / fast:.0f} times as fast (bar 20)")
    print(f"held: exact {BATCH} x {SIDE} x {SIDE} floats thrice, here {SIDE} x {SIDE} floats five times")
    sys.exit(mended < 0.99 or slow < 20 * fast)


if __name__ == "__main__":
    main()
