"""Peak memory of each process of a finetuning in shards, on a random Llama of about 1 B parameters, 2:4 by magnitude.

    python benchmarks/sharded_memory.py

Bar: 0.6 of the training's state (weights, gradients, moments, masks; the teacher if there is one) plus one layer.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

BENCHMARKS = Path(__file__).parent
SCRIPTS = BENCHMARKS.parent / "workflow/scripts"
sys.path.insert(0, str(SCRIPTS))


def peak() -> float:
    """Of this process, in MB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000


def train(words: list[str], found: Path) -> None:
    """What `finetune.py` does in each of its processes, and its peak into a folder."""
    import os

    import finetune
    from stepdown.recover.settings import RecoverySettings

    arguments = finetune._parser().parse_args(words)
    settings = RecoverySettings(**{field.name: getattr(arguments, field.name) for field in fields(RecoverySettings)})
    windows, evaluation = finetune._read_text(arguments, 1)
    state = found / "state"
    state.mkdir(exist_ok=True)
    finetune._finetune(arguments, settings, windows, evaluation[: settings.processes], state, "cpu")
    (found / f"peak-{os.environ['RANK']}").write_text(str(peak()))


def main(arguments: argparse.Namespace) -> None:
    from stepdown.plan.training_memory import GRADIENT, MASK, MOMENTS, TEACHER, WEIGHT, read_model_size
    from stepdown.recover.processes import run_in_processes

    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        root = Path(temporary)
        source, model, report = root / "source", root / "model", root / "pruning.json"
        script(BENCHMARKS / "random_llama.py", source, "--layers", arguments.layers)
        words = ("--run", "magnitude-2of4", "--model", source, "--device", "cpu", "--text", "pydoc", "--samples", 1)
        script(SCRIPTS / "prune_oneshot.py", *words, "--output-model", model, "--output-report", report)
        if not arguments.distil:
            shutil.rmtree(source)
        size = read_model_size(model)
        held = sum(bytes_of[arguments.memory] for bytes_of in (WEIGHT, GRADIENT, MOMENTS))
        state = size.parameters * (held + TEACHER * arguments.distil) + size.matrices * MASK[arguments.memory]
        bar = 0.6 * state + size.matrices / size.layers * WEIGHT[arguments.memory]
        print(
            f"{size.parameters / 1e6:.0f} M parameters, state {state / 1e6:.0f} MB, bar {bar / 1e6:.0f} MB", flush=True
        )
        # One step of one window in each process.
        tokens = arguments.sequence_length * arguments.processes
        words = ["--model", model, "--masks", report, "--step", "x", "--text", "pydoc", "--epochs", 1]
        words += ["--sequence-length", arguments.sequence_length, "--tokens-per-epoch", tokens, "--batch-size", 1]
        words += ["--gradient-accumulation", 1, "--processes", arguments.processes, "--sharded"]
        words += ["--memory", arguments.memory, "--gradient-checkpointing", "--device", "cpu", "--state", root / "x"]
        words += ["--teacher", source, "--distill-weight", 0.9] if arguments.distil else []
        words += ["--output-model", root / "finetuned", "--output-log", root / "training.json"]
        run_in_processes(train, arguments.processes, [str(word) for word in words], root)
        for file in sorted(root.glob("peak-*")):
            megabytes = float(file.read_text())
            print(f"process {file.name[5:]}: {megabytes:6.0f} MB, {megabytes * 1e6 / state:.2f} of the state")


def script(path: Path, *words: object) -> None:
    """Run in a process of its own: what it held would count as ours."""
    subprocess.run([sys.executable, path, *map(str, words)], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--memory", default="low")
    parser.add_argument("--sequence-length", type=int, default=16)
    parser.add_argument("--distil", action="store_true")
    parser.add_argument("--folder", type=Path, help="where 12 GB can be written for a while")
    main(parser.parse_args())
