"""Peak memory of every pruning script on a random Llama of about 1 B parameters, each in a process of its own.

    python benchmarks/memory.py

The floor is one decoder layer (88 MB in bf16) and the calibration activations. Bar: 35 % of the checkpoint's size plus
the calibration activations (the hidden states of all samples).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BENCHMARKS = Path(__file__).parent
SCRIPTS = Path(__file__).parents[1] / "workflow/scripts"


def peak(script: str, *words: object) -> tuple[float, float]:
    """Peak resident memory in MB and seconds of a script."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, SCRIPTS / script, *map(str, words)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{script} failed")
    return usage.ru_maxrss / 1000, time.perf_counter() - start


def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        root = Path(temporary)
        source = root / "source"
        # In a process of its own: on Linux a process counts the peak of the one that started it as its own.
        subprocess.run(
            [sys.executable, BENCHMARKS / "random_llama.py", source, f"--layers={arguments.layers}"], check=True
        )
        checkpoint = sum(file.stat().st_size for file in source.iterdir()) / 1e6
        states = arguments.samples * arguments.sequence_length * 2048 * 2 / 1e6
        model, dense = root / "model", root / "dense.safetensors"
        norms, scores, stage_1 = (root / f"{name}.safetensors" for name in ("norms", "scores", "stage_1"))
        length = ("--samples", arguments.samples, "--sequence-length", arguments.sequence_length)
        runs = {
            "base_model.py": ("--model", source, "--output-model", model, "--output-tier-map", dense),
            "calibrate.py": ("--model", model, *length, "--device", "cpu", "--output", norms),
            "score.py": ("--model", model, "--calibration", norms, "--tier-map", dense, "--output", scores),
            "degrade_dense_to_2_4.py": (
                *("--scores", scores, "--tier-map", dense, "--iteration", 1, "--output", stage_1),
                *("--dense", 0.35, "--mid-2-4", 0.45, "--topk", 0.2),
            ),
            "degrade_2_4_to_topk.py": (
                *("--model", model, "--calibration", norms, "--tier-map-before", dense, "--tier-map", stage_1),
                *("--output-tier-map", root / "tier_map.safetensors", "--output-model", root / "pruned"),
            ),
            "prune_oneshot.py": (
                *("--run", arguments.run, "--model", model, *length, "--device", "cpu"),
                *("--output-model", root / "oneshot", "--output-report", root / "oneshot.json"),
            ),
        }
        allowed = 0.35 * checkpoint + states
        print(f"checkpoint {checkpoint:.0f} MB, calibration activations {states:.0f} MB, bar {allowed:.0f} MB")
        for script, words in runs.items():
            megabytes, seconds = peak(script, *words)
            share = (megabytes - states * (script in ("calibrate.py", "prune_oneshot.py"))) / checkpoint
            print(
                f"{script:26s} {megabytes:6.0f} MB  {100 * share:4.1f} % of the checkpoint  {seconds:5.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--run", default="wanda-unstructured-0.5", help="of prune_oneshot.py (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where 8 GB can be written for a while")
    main(parser.parse_args())
