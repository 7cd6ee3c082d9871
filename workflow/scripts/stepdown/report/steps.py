"""What the steps of a run came to: the chain iter0, iter1, ... and the runs beside it.

Results are one frame for each text the steps were evaluated on, in it a row per step, under the step's name: `path` (of
its eval.json), `iteration` (NaN beside the chain), `model`, `method`, `pattern`, `layers`, the shares of the tiers,
`sparsity`, `epochs`, `tokens`, `total_tokens` (since the base model), and perplexity: of the `base` model, `pruned`,
`refitted` and `reconstructed` (NaN where that was not done), `finetuned`.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import UserError
from ..files import NUMBER, check_form, read_result
from ..plan.steps import BASE, iteration_of

TIERS = ["dense", "mid_2_4", "topk"]
MOMENTS = ["pruned", "refitted", "reconstructed", "finetuned"]

# What an eval.json is like: of every step, of the base model what stands for pruning it, and of the others.
KIND = "an evaluation"
EVALUATION = {"step": str, "model": str, "perplexity": {str: {"base": NUMBER}}, "sparsity": {"overall": NUMBER}}
DENSE = {"pruning": {"method": "dense", "pattern": "", "layers": ""}, "finetuning": {"epochs": 0, "tokens": 0}}
STEP = {
    "perplexity": {str: {"pruned": NUMBER, str: NUMBER}},
    "pruning": {"method": str, "pattern": str, "layers": str},
    "finetuning": {"epochs": NUMBER, "tokens": int},
}

Results = dict[str, pd.DataFrame]


def read_results(evals: Iterable[Path], tiers: bool = True) -> Results:
    """The steps of one run in the order they are told in: base, iterations, runs beside them by name.

    tiers: whether every step has shares of tiers, as the iterations have; without, nobody's are read.
    Raises `UserError` for a file that is not what it should be, and for files that cannot be of one run.
    """
    steps = pd.DataFrame([_read_eval(path, tiers) for path in evals])
    steps["iteration"] = steps.step.map(iteration_of).astype(float)
    steps = steps.sort_values(["iteration", "step"]).set_index("step")
    _check_one_run(steps)
    steps["total_tokens"] = steps.tokens.where(steps.iteration.isna(), steps.tokens.cumsum())
    perplexity = pd.DataFrame(steps.pop("perplexity").tolist(), steps.index)
    columns = ["base", *MOMENTS]
    return {text: steps.join(pd.DataFrame(perplexity[text].tolist(), steps.index, columns)) for text in perplexity}


def iterations(steps: pd.DataFrame) -> pd.DataFrame:
    """The pruned steps of the chain, in order."""
    return steps[steps.iteration > 0]


def one_shots(steps: pd.DataFrame) -> pd.DataFrame:
    """The runs beside the chain, each straight from the base model."""
    return steps[steps.iteration.isna()]


def difference_percent(perplexity: Any, base: Any) -> Any:
    """How far perplexities lie above, or, negative, below the base model's, in percent of it."""
    return 100 * (perplexity / base - 1)


def _read_eval(path: Path, tiers: bool) -> dict:
    record = read_result(path, KIND, EVALUATION)
    perplexity = record["perplexity"]
    if record["step"] == BASE:
        record |= DENSE
        for values in perplexity.values():
            values["pruned"] = values["base"]
    check_form(record, path, KIND, STEP | ({"tier_shares": dict.fromkeys(TIERS, NUMBER)} if tiers else {}))
    if record["finetuning"]["epochs"] == 0:  # a model that was not finetuned is the one before
        for values in perplexity.values():
            values.setdefault("finetuned", next(values[when] for when in reversed(MOMENTS) if when in values))
    check_form(record, path, KIND, {"perplexity": {str: {"finetuned": NUMBER}}})
    for text, values in perplexity.items():
        if not 0 < values["base"] < math.inf:
            raise UserError(f"{path}: a perplexity of {values['base']} on {text} cannot be; delete it and run again")
    return {
        **{"path": path, "step": record["step"], "model": record["model"]},
        **{key: record["pruning"][key] for key in ("method", "pattern", "layers")},
        **{key: record["finetuning"][key] for key in ("epochs", "tokens")},
        **{tier: float(record["tier_shares"][tier]) for tier in TIERS if tiers},
        "sparsity": float(record["sparsity"]["overall"]),
        "perplexity": {text: {when: float(value) for when, value in of.items()} for text, of in perplexity.items()},
    }


def _check_one_run(steps: pd.DataFrame) -> None:
    """Side by side only what belongs together: one model, one set of texts, no gap in the chain."""
    first = steps.iloc[0]
    for step in steps[steps.index.duplicated()].itertuples():
        raise UserError(f"{step.path}: a second evaluation of {step.Index}; give each step once")
    for step in steps.itertuples():
        pair = f"{step.path} and {first.path}"
        if step.model != first.model:
            raise UserError(f"{pair} are of different models, {step.model} and {first.model}; evaluate again")
        if set(step.perplexity) != set(first.perplexity):
            raise UserError(f"{pair} were evaluated on different texts; evaluate both again")
        for text, perplexity in step.perplexity.items():
            if not math.isclose(perplexity["base"], first.perplexity[text]["base"], rel_tol=1e-6):
                raise UserError(f"{pair} disagree on the base model's perplexity of {text}; evaluate both again")
    for expected, step in enumerate(iterations(steps).itertuples(), start=1):
        if step.iteration != expected:
            raise UserError(f"the evaluation of iter{expected} is missing, but {step.path} is there; give both")
