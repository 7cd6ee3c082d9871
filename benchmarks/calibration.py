"""Time of calibration against the bare layer-by-layer forward, in the same process.

    python benchmarks/calibration.py

A random Llama with the layer shapes of a 1 B model is carried through the same text with and without its squared input
norms being summed, in turn. The floor is the forward itself. Bar: at most 1.15 times that.
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
from stepdown.prune.calibration import squared_input_norms


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
        bare, calibrated = [], []
        for _ in range(arguments.repeats):
            bare.append(seconds(lambda: forward(folder, windows)))
            calibrated.append(seconds(lambda: squared_input_norms(open_decoder(folder, "cpu"), windows, 1)))
    ratio = statistics.median(one / other for one, other in zip(calibrated, bare, strict=True))
    print(f"model        {arguments.layers} layers of hidden 2048, FFN 5632, bf16, {arguments.threads} thread(s)")
    print(f"text         {arguments.samples} samples x {arguments.sequence_length} tokens")
    print(f"floor        {statistics.median(bare):.2f} s: the bare layer-by-layer forward")
    print(f"calibration  {statistics.median(calibrated):.2f} s")
    print(f"ratio        {ratio:.3f} (bar: 1.15; median of {arguments.repeats} pairs)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    main(parser.parse_args())
