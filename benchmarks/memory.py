"""Peak memory of every rule that reads the weights of a model, on a random Llama of about 1 B parameters, each in a
process of its own.

    python benchmarks/memory.py

Bar: 35 % of the checkpoint's size plus the calibration activations (the hidden states of all samples); or 1.2 of a
rule's own floor, where what it solves or trains with makes that the higher one: see `floors`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

BENCHMARKS = Path(__file__).parent
SCRIPTS = Path(__file__).parents[1] / "workflow/scripts"
HIDDEN, FFN = 2048, 5632  # of random_llama.py
TABLE = 2 * HIDDEN * 32000 / 1e6  # MB in bf16 of the embedding, and of the head
LAYER = 2 * (HIDDEN**2 * 9 / 4 + 3 * HIDDEN * FFN) / 1e6  # MB in bf16; an eighth of the heads have keys and values
# What the libraries take, and a model without weights.
EMPTY = "import sys; sys.path[0] = sys.argv[1]; from stepdown.models.decoder import *; open_decoder(sys.argv[2], 'cpu')"


def floors(empty: float) -> dict[str, float]:
    """MB that a rule cannot do without, by the beginning of its name; empty: those of a model without weights.

    Refitting holds a layer of two models, X'X and Y'X of the widest input, and the largest matrix in float32;
    SparseGPT and GPTQ a layer, the Hessian of its widest input and that one's factor, and the largest matrix in
    float32 as it came and what it has lost; GPTQ the codes of a layer too, and packing as whole numbers, which refits
    first, a layer of two models and the refitted matrix. Reconstruction holds a layer of two models, what it was
    before, and its gradients in bf16; in float32 its weights, their gradients and two moments; and the masks. Sorting
    writes embedding and head, which are one file, in another order. SliceGPT holds a layer and, in float64, seven
    matrices as wide as the residual: what centres, the bases of the first layer, before one and inside it, a covariance
    and what LAPACK works with, twice as much.
    """
    hessian, matrix = 4 * FFN**2 / 1e6, 4 * FFN * HIDDEN / 1e6
    solver = empty + LAYER + 2 * hessian + 2 * matrix
    return {
        "sort_channels": empty + 2 * TABLE,
        "refit": empty + 2 * LAYER + 2 * hessian + matrix,
        "reconstruct": empty + (4 + 2 * 4 + 1 / 2) * LAYER,
        "prune_oneshot sparsegpt": solver,
        "prune_structured slicegpt": empty + LAYER + 7 * 8 * HIDDEN**2 / 1e6,
        "quantise gptq": solver + LAYER / 2,
        "pack_integers": solver + LAYER + matrix + LAYER / 2,
    }


def peak(*words: object) -> tuple[float, float]:
    """Peak resident memory in MB and processor seconds of a Python that is given these words."""
    process = subprocess.Popen([sys.executable, *map(str, words)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{words[0]} failed")
    return usage.ru_maxrss / 1000, usage.ru_utime + usage.ru_stime


def rules(root: Path, arguments: argparse.Namespace) -> Iterator[tuple[str, str, tuple]]:
    """What is measured, in the order in which each finds what it reads: its name, its script, its words."""
    dense, model = root / "dense.safetensors", root / "model"
    calibration, scores, stage_1, tiers = (
        root / f"{name}.safetensors" for name in ("calibration", "scores", "stage_1", "tier_map")
    )
    pruned, refitted, finetuned = (root / f"{name}_model" for name in ("pruned", "refitted", "finetuned"))
    if "refit" in arguments.leave_out:
        refitted = pruned
    length = ("--sequence-length", arguments.sequence_length, "--device", "cpu")
    text = ("--samples", arguments.samples, *length)
    tested = ("--tokens", arguments.samples * arguments.sequence_length, *length, "--model-name", "random")
    training = ("--step", "iter1", "--epochs", 0, "--text", "pydoc", "--sequence-length", arguments.sequence_length)

    words = ("--model", root / "source", "--output-model", model, "--output-tier-map", dense)
    yield "base_model", "base_model.py", words
    words = ("--model", model, *text, "--tier-map", dense, "--output-model", root / "sorted_model")
    words += ("--output-tier-map", root / "sorted", "--output-permutation", root / "permutation.safetensors")
    yield "sort_channels", "sort_channels.py", words
    yield "calibrate, inputs", "calibrate.py", ("--model", model, *text, "--cost", "wanda", "--output", root / "inputs")
    yield "calibrate", "calibrate.py", ("--model", model, *text, "--output", calibration)
    step = ("--model", model, "--calibration", calibration, "--device", "cpu")
    yield "score", "score.py", (*step, "--tier-map", dense, "--output", scores)
    shares = ("--dense", 0.35, "--mid-2-4", 0.45, "--topk", 0.2, "--iteration", 1)
    words = ("--scores", scores, "--tier-map", dense, *shares, "--output", stage_1)
    yield "degrade_dense_to_2_4", "degrade_dense_to_2_4.py", words
    words = (*step, "--tier-map-before", dense, "--tier-map", stage_1)
    words += ("--output-tier-map", tiers, "--output-model", pruned)
    yield "degrade_2_4_to_topk", "degrade_2_4_to_topk.py", words
    words = ("--dense-model", model, "--model", pruned, "--masks", tiers, *text, "--output-model", refitted)
    yield "refit", "refit.py", words
    words = ("--dense-model", model, "--model", refitted, "--masks", tiers, *text, "--steps", 2)
    yield "reconstruct", "reconstruct.py", (*words, "--output-model", root / "reconstructed_model")
    words = ("--model", refitted, "--masks", tiers, *training, "--state", root / "state")
    words += ("--output-model", finetuned, "--output-log", root / "training.json")
    yield "finetune, 0 epochs", "finetune.py", words
    words = ("--model", model, "--masks", dense, *tested, "--output", root / "base.json")
    yield "evaluate_base", "evaluate_base.py", words
    words = ("--pruned-model", pruned, "--refitted-model", refitted, "--finetuned-model", finetuned, "--masks", tiers)
    words += ("--training", root / "training.json", "--base-eval", root / "base.json", "--step", "iter1", *tested)
    yield "evaluate", "evaluate.py", (*words, "--output", root / "eval.json")
    yield "pack", "pack.py", ("--model", finetuned, "--tier-map", tiers, "--output", root / "packed")
    words = ("--model", finetuned, "--tier-map", tiers, *text, "--values", "int4", "--output", root / "packed_int4")
    yield "pack_integers int4", "pack_integers.py", words
    yield "gguf_file", "gguf_file.py", ("--model", finetuned, "--output", root / "model.gguf")
    for run in arguments.runs:
        yield from compression(run, root, text, tested)


def compression(run: str, root: Path, text: tuple, tested: tuple) -> Iterator[tuple[str, str, tuple]]:
    """The same of a run such as `oneshot/wanda-2of4` of the base model, and of its evaluation where that is another."""
    kind, name = run.split("/")
    script = {"oneshot": "prune_oneshot", "structured": "prune_structured", "quantised": "quantise"}.get(kind)
    folder, report = root / name, root / f"{name}.json"
    words = ("--run", name, "--model", root / "model", *text)
    if kind == "dynamic":
        folder = root / "model"
        yield f"calibrate_thresholds {name}", "calibrate_thresholds.py", (*words, "--output", report)
    else:
        yield f"{script} {name}", f"{script}.py", (*words, "--output-model", folder, "--output-report", report)
    if kind != "oneshot":
        words = ("--model", folder, "--base-model", root / "model", "--masks", report, "--step", run, *tested)
        words += ("--base-eval", root / "base.json", "--output", root / "compressed.json")
        yield f"evaluate_compressed {name}", "evaluate_compressed.py", words


def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        root = Path(temporary)
        source = root / "source"
        # In a process of its own: on Linux a process counts the peak of the one that started it as its own.
        subprocess.run(
            [sys.executable, BENCHMARKS / "random_llama.py", source, f"--layers={arguments.layers}"], check=True
        )
        checkpoint = sum(file.stat().st_size for file in source.iterdir()) / 1e6
        states = arguments.samples * arguments.sequence_length * HIDDEN * 2 / 1e6
        allowed = 0.35 * checkpoint + states
        print(f"checkpoint {checkpoint:.0f} MB, calibration activations {states:.0f} MB, bar {allowed:.0f} MB")
        empty, _ = peak("-c", EMPTY, SCRIPTS, source)
        print(f"{'a model without weights':40s} {empty:6.0f} MB")
        for name, script, words in rules(root, arguments):
            if name.split()[0] in arguments.leave_out:
                continue
            megabytes, seconds = peak(SCRIPTS / script, *words)
            floor = next((of for rule, of in floors(empty).items() if name.startswith(rule)), 0)
            beside = f"{megabytes / max(allowed, 1.2 * floor):.2f} of its bar"
            print(f"{name:40s} {megabytes:6.0f} MB  {beside:20s} {seconds:6.1f} s of the processor", flush=True)


RUNS = (
    "oneshot/magnitude-2of4",
    "oneshot/wanda-unstructured-0.5",
    "oneshot/wanda-three-tier",
    "oneshot/sparsegpt-2of4",
    "structured/slicegpt-0.25",
    "structured/shortgpt-2",
    "quantised/int8",
    "quantised/gptq4-g128",
    "dynamic/uniform-0.5",
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--runs", nargs="*", default=RUNS, help="compressions of the base model (default: one of each)")
    help = "rules not to measure: those that solve and train take hours of 22 layers, and hold no more than of 2"
    parser.add_argument("--leave-out", nargs="*", default=(), help=help)
    parser.add_argument("--folder", type=Path, help="where 8 GB can be written for a while")
    main(parser.parse_args())
