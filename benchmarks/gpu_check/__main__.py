"""Everything that only a GPU can tell, in one command of at most eight minutes: `make gpu-check`.

    python benchmarks/gpu_check [--tiny] [--only kernels ...] [--output gpu_check.json]

Tests that need a GPU; the workflow's scripts with `--device cuda` against the same on the CPU; the memory of a training
step and the time of a pruning step of a 7 B model; the packed kernels against cuBLAS and torch's 2:4. A section that
fails does not end the others. `--tiny` runs all of it in small on whatever there is, so that nothing is new on the day.
"""

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(1, str(Path(__file__).parents[2] / "workflow/scripts"))
sys.path.insert(1, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(1, str(Path(__file__).parents[1]))

import gpu_tests
import kernels
import pruning_time
import scripts
import training_memory

# What has most to tell comes first. Each: run(device, tiny) -> found, and table(found) -> lines.
SECTIONS = {
    "kernels": kernels,
    "tests": gpu_tests,
    "scripts": scripts,
    "pruning_time": pruning_time,
    "training_memory": training_memory,
}


def main(arguments: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        print("error: torch sees no GPU here; --tiny runs the same in small without one", file=sys.stderr)
        return 1
    results = {"machine": machine(device), "tiny": arguments.tiny, "sections": {}}
    for name in arguments.only or SECTIONS:
        results["sections"][name] = run_section(name, device, arguments.tiny)
        # After each: what is cut off later loses nothing.
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{'=' * 20} {results['machine']['name']}, torch {torch.__version__}\n")
    for name, found in results["sections"].items():
        print(f"--- {name}: {'FAILED' if 'error' in found else 'ok'}, {found['seconds']:.0f} s")
        lines = [found["error"]] if "error" in found else SECTIONS[name].table(found)
        print("\n".join(lines), flush=True)
    return int(any("error" in found for found in results["sections"].values()))


def run_section(name: str, device: torch.device, tiny: bool) -> dict:
    """What a section found, or its error; and the seconds it took."""
    print(f"[{name}]", flush=True)
    start = time.perf_counter()
    try:
        found = SECTIONS[name].run(device, tiny)
    except (Exception, SystemExit) as error:
        traceback.print_exc(file=sys.stdout)
        found = {"error": f"{type(error).__name__}: {error}"}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found | {"seconds": time.perf_counter() - start}


def machine(device: torch.device) -> dict:
    if device.type == "cpu":
        return {"name": "no GPU"}
    properties = torch.cuda.get_device_properties(device)
    return {"name": properties.name, "bytes": properties.total_memory, "torch": torch.__version__}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes, with or without a GPU")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections (default: all)")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"), help="JSON of all that was found")
    sys.exit(main(parser.parse_args()))
