"""Time of scoring and degrading one matrix against one pass of reading and writing it, in the same process.

    python benchmarks/degrade.py

A 4096 x 11008 float32 matrix goes from row 1 to row 2 of the default schedule: its scores, Dense -> 2:4, 2:4 -> TopK.
The floor is one read and one write of the matrix: `W2.copy_(W)`. Bar: at most 10 times that.
Beside it, in bfloat16: what it costs each block to become 2:4, against the published score (bar: at most 1.5 times
that), and what it costs each to become TopK.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow/scripts"))

from stepdown.tensors.blocks import grid_shape
from stepdown.tensors.costs import top_k_costs, two_four_costs
from stepdown.tensors.saliency import block_scores
from stepdown.tensors.tiers import (
    Tier,
    degrade_dense_to_two_four,
    degrade_two_four_to_top_k,
    prune_top_k_,
    prune_two_four_,
)

ROWS = [("0.90", "0.10", "0.00"), ("0.80", "0.10", "0.10")]
BLOCK_SIZE, K = 16, 10


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def degrade(weight: torch.Tensor, norms: torch.Tensor, tiers: torch.Tensor, row: tuple[str, str, str]) -> torch.Tensor:
    """Score and both stages; returns the new tier map, prunes `weight` in place."""
    dense = block_scores(weight, norms, BLOCK_SIZE)[tiers == Tier.DENSE]
    stage_1 = degrade_dense_to_two_four({"": tiers}, {"": dense}, row)[""]
    prune_two_four_(weight, norms, stage_1 != tiers, BLOCK_SIZE)
    left = block_scores(weight, norms, BLOCK_SIZE)[stage_1 == Tier.TWO_FOUR]
    stage_2 = degrade_two_four_to_top_k({"": stage_1}, {"": left}, row)[""]
    prune_top_k_(weight, norms, stage_2 != stage_1, BLOCK_SIZE, K)
    return stage_2


def compare_costs(weight: torch.Tensor, norms: torch.Tensor, repeats: int) -> None:
    """Print the times of costs beside that of the published score; weight: [out, in], pruned in place to 2:4."""
    gradients = torch.rand(len(weight), generator=torch.Generator().manual_seed(1))
    every = torch.ones(grid_shape(weight.shape, BLOCK_SIZE), dtype=torch.bool)
    pairs = [
        (
            seconds(lambda: block_scores(weight, norms, BLOCK_SIZE)),
            seconds(lambda: two_four_costs(weight, norms, gradients, BLOCK_SIZE)),
        )
        for _ in range(repeats + 1)  # the first one is not counted
    ]
    score, cost = (statistics.median(times) for times in zip(*pairs[1:], strict=True))
    prune_two_four_(weight, norms, every, BLOCK_SIZE)
    top_k = [
        seconds(lambda: top_k_costs(weight, norms, gradients, every, BLOCK_SIZE, K)) for _ in range(repeats // 2 + 1)
    ]
    print(f"published score  {1000 * score:.1f} ms")
    print(f"costs of 2:4     {1000 * cost:.1f} ms, {cost / score:.2f} times that (bar: 1.5)")
    print(f"costs of TopK    {1000 * statistics.median(top_k):.1f} ms, of all blocks")


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(arguments.rows, arguments.columns, generator=generator)
    norms = torch.rand(arguments.columns, generator=generator)
    tiers = degrade(original, norms, torch.zeros(grid_shape(original.shape, BLOCK_SIZE), dtype=torch.uint8), ROWS[0])
    weight = original.clone()
    passes, runs = [], []
    for _ in range(arguments.repeats):
        passes.append(seconds(lambda: weight.copy_(original)))
        runs.append(seconds(lambda: degrade(weight, norms, tiers, ROWS[1])))
    ratio = statistics.median(run / once for run, once in zip(runs, passes, strict=True))
    megabytes = 2 * original.nbytes / 1e6
    print(f"matrix           {arguments.rows} x {arguments.columns} float32, {arguments.threads} thread(s), row 2")
    print(f"floor            {1000 * statistics.median(passes):.1f} ms: one read and write of it, {megabytes:.0f} MB")
    print(f"score + degrade  {1000 * statistics.median(runs):.1f} ms")
    print(f"ratio            {ratio:.1f} (bar: 10; median of {arguments.repeats} pairs)")
    compare_costs(original.bfloat16(), norms, arguments.repeats)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    main(parser.parse_args())
