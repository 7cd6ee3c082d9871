"""Loss while finetuning: read from the training logs, and drawn."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import UserError
from ..files import NUMBER, read_result
from .drawing import CHAIN_COLOUR, GREY, WIDTH, empty, end_labels, one_shot_colour, some
from .steps import iterations, one_shots

# What is read of a training.json.
LOG = {"step": str, "epochs": NUMBER, "tokens": int, "steps": int, "log": [{str: NUMBER}]}


def read_curves(trainings: Iterable[Path], steps: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Step -> its `loss` and `eval_loss` over the tokens since the base model.

    Raises `UserError` for a file that is no training log, or not one of these steps.
    """
    curves = {}
    for path in trainings:
        record = read_result(path, "a training log", LOG)
        curve = pd.DataFrame(record["log"], columns=["step", "loss", "eval_loss"], dtype=float)
        # The log counts optimizer steps, and each of them sees as many tokens as the others.
        tokens = curve.pop("step") * (record["tokens"] / max(record["steps"], 1))
        if record["step"] not in steps.index:
            raise UserError(f"{path}: a log of {record['step']}, which has no eval.json here; give that too")
        step = steps.loc[record["step"]]
        for key in ("epochs", "tokens"):
            if record[key] != step[key]:
                found = f"{record[key]} and {step[key]}"
                raise UserError(f"{path} and {step.path} differ in {key}, {found}; evaluate again")
        curves[step.name] = curve.set_index(step.total_tokens - step.tokens + tokens)
    return curves


def training(steps: pd.DataFrame, curves: dict[str, pd.DataFrame]) -> Figure:
    """Loss over all finetuning tokens since the base model: the iterations in a row, the one-shot runs across them."""
    if not any(len(curve) for curve in curves.values()):
        return empty("No finetuning, so no training curves")
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    # What is trained on, a distance to another model perhaps, is no size to compare the validation loss with.
    axes, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    divisor, unit = _token_unit(steps.total_tokens.max())
    chain = iterations(steps)[lambda chain: chain.tokens > 0]
    lines = [("iterations", chain, CHAIN_COLOUR)] if len(chain) else []
    beside = one_shots(steps)
    lines += [(name, beside.loc[[name]], one_shot_colour(index)) for index, name in enumerate(beside.index)]
    for _, members, colour in reversed(lines):  # the chain last, on top
        _loss_curves(axes, below, [curves[name] for name in members.index if name in curves], divisor, colour)
    _mark_starts(axes, chain, divisor)
    below.set_xlabel(f"finetuning tokens since the base model{unit}")
    axes.set_ylabel("validation loss\n(nats per token)")
    below.set_ylabel("training loss")
    axes.set_title("Loss while finetuning: each iteration starts from the model just pruned")
    for each in (axes, below):
        each.grid(axis="x", visible=False)
    ends = []
    for name, members, colour in lines:
        last = members.iloc[-1]
        ends.append((last.total_tokens / divisor, _last_loss(curves.get(last.name)), name, colour))
    end_labels(axes, ends, gap=8)
    return figure


def _loss_curves(axes: Axes, below: Axes, curves: Sequence[pd.DataFrame], divisor: float, colour: str) -> None:
    """Validation loss, training loss below. A line per step, none joined: the model was pruned in between."""
    dots = "o" if sum(curve.eval_loss.count() for curve in curves) <= 60 else ""
    for curve in curves:
        for panel, losses, look in (
            (below, curve.loss.dropna(), {"linewidth": 1, "alpha": 0.6}),
            (axes, curve.eval_loss.dropna(), {"linewidth": 1.8, "marker": dots, "markersize": 4}),
        ):
            if len(losses):
                panel.plot(losses.index / divisor, losses, color=colour, **look)


def _mark_starts(axes: Axes, chain: pd.DataFrame, divisor: float) -> None:
    starts = (chain.total_tokens - chain.tokens) / divisor
    for step in some(chain.index, 10):
        axes.axvline(starts[step], color="#c8c8c8", linewidth=0.8, zorder=0)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(step, (starts[step], 0), (3, 3), color=GREY, **place)


def _last_loss(curve: pd.DataFrame | None) -> float:
    """The last validation loss of a curve, NaN without one."""
    return math.nan if curve is None or curve.eval_loss.isna().all() else curve.eval_loss.dropna().iloc[-1]


def _token_unit(largest: float) -> tuple[float, str]:
    for divisor, name in ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)")):
        if largest >= divisor:
            return divisor, name
    return 1, ""
