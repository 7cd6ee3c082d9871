"""What each ingredient brings, in perplexity: a table of variants, each of them a run of the workflow.

    python benchmarks/quality.py                                            the bundled model, without training
    python benchmarks/quality.py steps --configfile mine.yaml --learning-rates 2.0e-4 5.0e-4 1.0e-3
    python benchmarks/quality.py steps --configfile mine.yaml --learning-rates 5.0e-4 --seeds 0 1 2

Tables: `ingredients`, one shot without training, by what chooses the blocks; `two-of-four`, every matrix 2:4, by us and
by SparseGPT; `steps`, iterations against one shot at as many tokens, and the dense model finetuned on the same. What
stands in --configfile (model, texts, sizes, schedule; name files by absolute paths) is the same for all; to choose by
one text and report another, let `evaluation.texts` name both. A variant is an overlay over it, and a folder for each
seed in which an interrupted table goes on; folders of one seed start as copies of the first, so that what variants
share is made once. The table has means, and half of the range where there are several seeds; quality.csv every figure.
"""

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow/scripts"))

from stepdown import cli
from stepdown.errors import UserError
from stepdown.files import NUMBER, read_result
from stepdown.plan.schedule import Row, read_schedule
from stepdown.report.steps import MOMENTS

ROOT = Path(__file__).resolve().parents[1]
ONE_SHOT = "oneshot/three-tier"
UNTOUCHED = {"sort_channels": False, "swaps": False, "refit": False, "reconstruction": {"enabled": False}}
PUBLISHED_CHOICE = {"sort_channels": False, "swaps": False, "pruning": {"cost": "wanda", "shared_over": "matrix"}}


@dataclass(frozen=True)
class Variant:
    """A run of the workflow. overlay: what it has of its own; steps: those that are evaluated; rows: shares and epochs
    of a schedule of its own, in place of the one configured."""

    name: str
    overlay: dict
    steps: tuple[str, ...] = (ONE_SHOT,)
    rows: tuple[tuple[str, str, str, int], ...] = ()


def ingredients(rows: list[Row]) -> list[Variant]:
    """One shot to the last row without training: pruned, refitted and reconstructed are columns of the table."""
    last = ((rows[-1].dense, rows[-1].mid_2_4, rows[-1].topk, 0),)
    off = {"sort_channels": False, "swaps": False}
    return [
        Variant("as published", PUBLISHED_CHOICE, rows=last),
        Variant("fisher, in every matrix", off | {"pruning": {"shared_over": "matrix"}}, rows=last),
        Variant("fisher, over the model", off, rows=last),
        Variant("and channels sorted", {"sort_channels": True, "swaps": False}, rows=last),
        Variant("and swapped", {"sort_channels": True, "swaps": True}, rows=last),
    ]


def two_of_four(rows: list[Row]) -> list[Variant]:
    """Every matrix 2:4 without training. What SparseGPT makes by itself stands under `pruned`."""
    runs, every_block = ("oneshot/wanda-2of4", "oneshot/sparsegpt-2of4"), (("0", "1", "0", 0),)
    return [
        Variant("by method", {"oneshot_refit": True, "sort_channels": False}, runs),
        Variant("channels sorted", {"sort_channels": True}, rows=every_block),
    ]


def steps(rows: list[Row]) -> list[Variant]:
    """The last row in one shot and by all rows."""
    both, epochs = (ONE_SHOT, f"iter{len(rows)}"), sum(row.epochs for row in rows)
    dense = UNTOUCHED | {"recovery": {"distill": {"weight": 0.0}}}
    return [
        Variant("as configured", {}, both),
        Variant("dense, finetuned", dense, ("iter1",), (("1", "0", "0", epochs),)),
    ]


TABLES = {"ingredients": ingredients, "two-of-four": two_of_four, "steps": steps}


def at_rates(variants: list[Variant], rates: list[float]) -> list[Variant]:
    """Every variant at every learning rate of the finetuning; as they are where none is given."""
    if not rates:
        return variants
    return [
        replace(
            each, name=f"{each.name}, {rate:g}", overlay=merged(each.overlay, {"recovery": {"learning_rate": rate}})
        )
        for each in variants
        for rate in rates
    ]


def merged(overlay: dict, over: dict) -> dict:
    """Two overlays in one; where both name a section, section by section."""
    sections = {key: merged(overlay[key], value) for key, value in over.items() if isinstance(overlay.get(key), dict)}
    return overlay | over | sections


def run(variant: Variant, seed: int, folder: Path, configfiles: list[Path], cores: int) -> pd.DataFrame:
    """Run the workflow in a folder up to what the variant is judged by; perplexities by step, text and moment."""
    overlay = variant.overlay | {"seed": seed, "oneshot": [], "speed": {"measured": False}}
    if variant.rows:
        lines = [f"{number},{','.join(map(str, row))}" for number, row in enumerate(variant.rows, start=1)]
        (folder / "schedule.csv").write_text("\n".join(["iteration,dense,mid_2_4,topk,epochs", *lines, ""]))
        overlay["schedule"] = str((folder / "schedule.csv").resolve())
    (folder / "variant.yaml").write_text(yaml.safe_dump(overlay))
    evaluations = {step: f"results/{step}/eval.json" for step in variant.steps}
    command = [sys.executable, "-m", "snakemake", *evaluations.values(), "--snakefile", ROOT / "Snakefile"]
    command += ["--directory", folder, "--cores", str(cores)]
    command += ["--configfile", *(path.resolve() for path in configfiles), folder / "variant.yaml"]
    with (folder / "run.log").open("w") as log:
        if subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode:
            raise UserError(f"{folder}/run.log: the workflow did not come to its end; see there")
    return pd.DataFrame(
        [
            {"variant": variant.name, "step": step, "seed": seed, "text": text, "moment": moment, "perplexity": value}
            for step, path in evaluations.items()
            for text, moment, value in perplexities(folder / path)
        ]
    )


def perplexities(path: Path) -> list[tuple[str, str, float]]:
    """Text, moment and perplexity of an evaluation."""
    record = read_result(path, "an evaluation", {"perplexity": {str: {str: NUMBER}}})
    return [
        (text, moment, float(value)) for text, found in record["perplexity"].items() for moment, value in found.items()
    ]


def table(figures: pd.DataFrame) -> pd.DataFrame:
    """A row per variant and step, a column per text and moment: means, and half of the range over several seeds."""
    over_seeds = figures.groupby(["variant", "step", "text", "moment"], sort=False).perplexity
    texts = over_seeds.mean().map("{:.2f}".format)
    half_range = (over_seeds.max() - over_seeds.min()) / 2
    texts = texts.where(over_seeds.count() == 1, texts + half_range.map(" ± {:.2f}".format))
    columns = pd.MultiIndex.from_product([figures.text.unique(), ["base", *MOMENTS]])
    wide = texts.unstack(["text", "moment"], sort=False)
    return wide.reindex(columns=columns).dropna(axis="columns", how="all").fillna("")


def main(arguments: argparse.Namespace) -> None:
    chosen = tuple(arguments.only or [""])
    variants = at_rates(TABLES[arguments.table](configured_rows(arguments.configfile)), arguments.learning_rates)
    variants = [variant for variant in variants if variant.name.startswith(chosen)]
    results, figures = arguments.folder.resolve() / arguments.table, []
    for seed in arguments.seeds:
        for variant in variants:
            folder = results / variant.name.replace(", ", "-").replace(" ", "-") / f"seed-{seed}"
            if variant is variants[0]:
                first = folder
            elif not folder.exists():
                shutil.copytree(first, folder, symlinks=True)
            folder.mkdir(parents=True, exist_ok=True)
            figures.append(run(variant, seed, folder, arguments.configfile, arguments.cores))
            cli.log.info("%s, seed %d: done", variant.name, seed)
    everything = pd.concat(figures)
    everything.to_csv(results / "quality.csv", index=False)
    print(table(everything).to_string())


def configured_rows(configfiles: list[Path]) -> list[Row]:
    """The schedule that the configuration names."""
    names = [yaml.safe_load(path.read_text()).get("schedule") for path in configfiles]
    name = next(filter(None, reversed(names)), "config/progressive_schedule.csv")
    return read_schedule(name if Path(name).exists() else ROOT / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=TABLES, default="ingredients")
    parser.add_argument("--configfile", type=Path, nargs="+", default=[], help="what all variants have in common")
    parser.add_argument(
        "--folder", type=Path, default=Path("results/quality"), help="of the runs (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[], help="default: the one configured")
    parser.add_argument("--only", nargs="+", help="variants whose names begin so")
    parser.add_argument("--cores", type=int, default=2)
    cli.run(main, parser)
