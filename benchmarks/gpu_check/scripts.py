"""The scripts of a small run in the order of its rules, on the CPU and on the GPU: do they come to the same?

In this process, one after the other, since each would take seconds to start; the text is this project's own.
"""

import json
import runpy
import sys
import tempfile
from pathlib import Path

import torch

from stepdown.models.tier_maps import read_tier_map

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "workflow/scripts"
ITERATIONS = [("0.70", "0.20", "0.10"), ("0.35", "0.45", "0.20")]
RUNS = ["magnitude-2of4", "wanda-2of4", "sparsegpt-2of4"]
# How far the two may be apart: blocks on another tier, and perplexity.
BLOCKS, PERPLEXITY = 0.01, 0.02


def run(device: torch.device, tiny: bool) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        text = root / "text.txt"
        files = [*sorted(ROOT.glob("docs/*.md")), *sorted(SCRIPTS.rglob("*.py")), *sorted(ROOT.glob("tests/**/*.py"))]
        text.write_text("\n".join(file.read_text() for file in files))
        found = {place: run_all(root / place, place, text, tiny) for place in ("cpu", device.type)}
        found["apart"] = compare(root / "cpu", root / device.type)
    far = {name: value for name, value in found["apart"].items() if not value <= (BLOCKS, PERPLEXITY)["/" in name]}
    if far:
        print(json.dumps(found, indent=1))
        raise ValueError(f"too far from the CPU's: {far}")
    return found


def run_all(root: Path, device: str, text: Path, tiny: bool) -> dict:
    """Every script into a folder of its own; returns perplexities by step."""
    length, samples, tokens = (32, 4, 256) if tiny else (256, 64, 16384)
    place = ["--device", device]
    calibration = ["--text", text, "--samples", samples, "--sequence-length", length, "--batch-size", 4]
    protocol = ["--text", text, "--sequence-length", length, "--batch-size", 4, "--tokens", 4 * tokens]
    base = root / "iter0"
    model = ["--model", ROOT / "resources/pydoc-llama"]
    script("base_model", *model, "--output-model", base / "model", "--output-tier-map", base / "tier_map.safetensors")
    masks = ["--masks", base / "tier_map.safetensors", "--model-name", "check"]
    script("evaluate_base", "--model", base / "model", *masks, *place, *protocol, "--output", base / "eval.json")
    for number, shares in enumerate(ITERATIONS[: 1 if tiny else None], 1):
        iteration(root, number, shares, place, calibration, protocol, text, length, tokens)
    for name in RUNS[:1] if tiny else RUNS:
        outputs = ["--output-model", root / name, "--output-report", root / f"{name}.json"]
        script("prune_oneshot", "--run", name, "--model", base / "model", *place, *calibration, *outputs)
    last = max(root.glob("iter*"))
    script("pack", "--model", last / "model", "--tier-map", last / "tier_map.safetensors", "--output", last / "packed")
    words = ["--tokens", 2, "--kernel", "torch"] if tiny else ["--tokens", 64]
    script("generate", "--model", last / "packed", "--prompt", "def main(", *words, *place)
    evals = {step.parent.name: json.loads(step.read_text())["perplexity"] for step in sorted(root.glob("*/eval.json"))}
    return {step: next(iter(values.values())) for step, values in evals.items()}


def iteration(root, number, shares, place, calibration, protocol, text, length, tokens) -> None:
    """One row of a schedule: calibrate, score, step down twice, refit, reconstruct, finetune (distilled), evaluate."""
    before, step, base = root / f"iter{number - 1}", root / f"iter{number}", root / "iter0"
    norms, scores, stage_1, tiers = (
        step / f"{name}.safetensors" for name in ("calibration", "scores", "tier_map_2_4", "tier_map")
    )
    model = ["--model", before / "model"]
    inputs = [*model, "--calibration", norms]
    script("calibrate", *model, *place, *calibration, "--output", norms)
    script("score", *inputs, "--tier-map", before / tiers.name, *place, "--output", scores)
    options = zip(("--dense", "--mid-2-4", "--topk"), shares, strict=True)
    script("degrade_dense_to_2_4", "--scores", scores, "--tier-map", before / tiers.name, "--iteration", number,
           *(word for pair in options for word in pair), "--output", stage_1)  # fmt: skip
    script("degrade_2_4_to_topk", *inputs, *place, "--tier-map-before", before / tiers.name, "--tier-map", stage_1,
           "--output-tier-map", tiers, "--output-model", step / "pruned")  # fmt: skip
    script("refit", "--dense-model", before / "model", "--model", step / "pruned", "--masks", tiers, *place,
           *calibration, "--output-model", step / "refitted")  # fmt: skip
    script("reconstruct", "--dense-model", before / "model", "--model", step / "refitted", "--masks", tiers, *place,
           *calibration, "--steps", 8, "--output-model", step / "reconstructed")  # fmt: skip
    script("finetune", "--model", step / "reconstructed", "--masks", tiers, "--step", step.name, "--epochs", 1,
           "--text", text, "--sequence-length", length, "--tokens-per-epoch", tokens, *place, "--state", root / "state",
           "--teacher", base / "model", "--distill-weight", 0.9, "--learning-rate", 2e-4, "--batch-size", 4,
           "--gradient-accumulation", 1, "--evaluation-steps", 8, "--output-optimizer", step / "optimizer.safetensors",
           "--output-model", step / "model", "--output-log", step / "training.json")  # fmt: skip
    script("evaluate", "--pruned-model", step / "pruned", "--refitted-model", step / "refitted",
           "--reconstructed-model", step / "reconstructed", "--finetuned-model", step / "model",
           "--training", step / "training.json", "--base-eval", base / "eval.json", "--masks", tiers,
           "--step", step.name, "--model-name", "check", *place, *protocol, "--output", step / "eval.json")  # fmt: skip


def script(name: str, *words: object) -> None:
    """Run a script as by hand; raises what it exits with."""
    before = sys.argv
    sys.argv = [f"{name}.py", *map(str, words)]
    try:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before


def compare(one: Path, other: Path) -> dict[str, float]:
    """Share of blocks on another tier by iteration, and relative difference of perplexities by step/model."""
    apart = {}
    for path in sorted(one.glob("iter*/tier_map.safetensors")):
        maps = [read_tier_map(file).tiers for file in (path, other / path.parent.name / path.name)]
        moved = sum(int((maps[0][name] != maps[1][name]).sum()) for name in maps[0])
        apart[f"blocks of {path.parent.name}"] = moved / sum(tiers.numel() for tiers in maps[0].values())
    for path in sorted(one.glob("*/eval.json")):
        ours, theirs = (
            next(iter(json.loads(file.read_text())["perplexity"].values()))
            for file in (path, other / path.parent.name / path.name)
        )
        apart |= {f"{path.parent.name}/{when}": abs(theirs[when] / ours[when] - 1) for when in ours}
    return apart


def table(found: dict) -> list[str]:
    lines = [f"{place}: {values}" for place, values in found.items() if place not in ("apart", "seconds")]
    return [*lines, "apart: " + ", ".join(f"{name} {value:.5f}" for name, value in found["apart"].items())]
