"""Time of calibration against the bare layer-by-layer forward, in the same process.

    python benchmarks/calibration.py

A random Llama with the layer shapes of a 1 B model is carried through the same text without and with its squared input
norms being summed, and with the loss carried back for the squared gradients, in turn. The floor is the forward itself.
Bars: at most 1.15 and 3.5 times that.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow/scripts"))

from random_llama import write_random_llama

from stepdown.models.decoder import open_decoder
from stepdown.models.layer_walk import LayerWalk
from stepdown.prune.calibration import calibrate


def forward(folder: Path, windows: torch.Tensor) -> None:
    walk = LayerWalk(open_decoder(folder, "cpu"), list(windows.split(1)))
    for _, _, replay in walk.layers("forward"):
        replay()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    windows = torch.randint(0, 1000, (arguments.samples, arguments.sequence_length))
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_random_llama(Path(temporary) / "model", layers=arguments.layers)
        runs = {
            "the bare layer-by-layer forward": lambda: forward(folder, windows),
            "norms": lambda: calibrate(open_decoder(folder, "cpu"), windows, 1, with_gradients=False),
            "norms and gradients": lambda: calibrate(open_decoder(folder, "cpu"), windows, 1, with_gradients=True),
        }
        times = [[seconds(run) for run in runs.values()] for _ in range(arguments.repeats)]
    print(f"model        {arguments.layers} layers of hidden 2048, FFN 5632, bf16, {arguments.threads} thread(s)")
    print(f"text         {arguments.samples} samples x {arguments.sequence_length} tokens")
    print(f"medians of {arguments.repeats}")
    for place, (name, bar) in enumerate(zip(runs, (1, 1.15, 3.5), strict=True)):
        ratio = statistics.median(row[place] / row[0] for row in times)
        print(f"{statistics.median(row[place] for row in times):6.2f} s     {name}: {ratio:.3f} (bar: {bar})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    main(parser.parse_args())
