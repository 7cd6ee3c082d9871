"""What the name of a step says of its files: where its model is, when that is complete, what must stay zero in it.
Standard library only."""

import re
from pathlib import Path, PurePath

from ..errors import UserError

INDEX = "model.safetensors.index.json"
# The base model, and where it stands as it came if its channels are sorted first.
BASE, UNSORTED = "iter0", "iter0/unsorted"


def model_ready(step: str) -> str:
    """The file that is written last when a step's finished model is complete.

    The base model may be links to the user's own files, and Snakemake deletes what is declared as output: its tier map
    stands for it. Sparse activations are switched on in the model of another step.
    """
    if step.startswith("dynamic/"):
        return model_ready(source(step))
    if step in (BASE, UNSORTED):
        return tier_map(step)
    return f"results/{step}/{'finetuned_model' if is_finetuned(step) else 'model'}/{INDEX}"


def model_of(ready: str) -> str:
    """The folder of the model that such a file stands for: where an index is, or beside the base model's tier map."""
    path = PurePath(ready)
    return str(path.parent if path.name == INDEX else path.parent / "model")


def is_finetuned(step: str) -> bool:
    """Whether a step ends in finetuning, as iterations and the runs by method and pattern do."""
    return step not in (BASE, UNSORTED) and step.startswith(("iter", "oneshot/", "gradual/"))


def is_run(step: str) -> bool:
    """Whether a step is pruned by what its name says; the iterations and oneshot/three-tier go by the schedule."""
    return step.startswith(("oneshot/", "gradual/")) and step != "oneshot/three-tier"


def iteration_of(step: str) -> int | None:
    """The place of a step in the chain, or None for a run beside it."""
    match = re.fullmatch(r"iter(\d+)", step)
    return int(match[1]) if match else None


def check_iteration(masks: Path | str, step: str, iteration: int) -> None:
    """Raise `UserError` where masks are of another iteration than their step: its own number, 1 for a run beside."""
    due = 1 if "/" in step else iteration_of(step)
    if due not in (None, iteration):
        raise UserError(
            f"{masks}: of iteration {iteration}, while {step} is of iteration {due}; give the one of {step}"
        )


def source(step: str) -> str:
    """The step whose model is quantised, or runs on sparse activations: results/quantised/NAME/STEP."""
    return step.split("/", 2)[2]


def tier_map(step: str) -> str:
    return f"results/{step}/tier_map.safetensors"


def masks(step: str) -> str:
    """The file that says what must stay zero in a step's checkpoint: its tier map, or the report of a run."""
    return f"results/{step}/pruning.json" if is_run(step) else tier_map(step)


def compression_report(step: str) -> str:
    """The file that says how a step was made smaller, quantised or made sparse."""
    names = {"structured": "pruning", "quantised": "quantisation", "dynamic": "thresholds"}
    return f"results/{step}/{names[step.split('/')[0]]}.json"
