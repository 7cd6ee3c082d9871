"""The figures of perplexity and of tier shares, each a function from the results of a run (see `steps.py`)."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .drawing import (
    CHAIN_COLOUR,
    GREY,
    HALO,
    ONE_SHOT_COLOURS,
    TIER_COLOURS,
    WIDTH,
    empty,
    end_labels,
    one_shot_colour,
    some,
    tier_patches,
    with_room,
)
from .steps import BASE, MOMENTS, TIERS, Results, iterations, one_shots

# --- perplexity ------------------------------------------------------------------------------------------------------

# What may be done between pruning and finetuning: the marker of its points and what the key says of them.
MENDED = {"refitted": ("D", "after refitting"), "reconstructed": ("s", "after reconstruction")}


def perplexity(results: Results) -> Figure:
    """Perplexity against sparsity: up with every prune, down with every finetuning; a panel per text."""
    if all(list(steps.index) == [BASE] for steps in results.values()):
        return empty("Nothing pruned, so no perplexities to compare")
    figure = Figure(figsize=(WIDTH, 0.5 + 4.3 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), squeeze=False, sharex=True)[:, 0]
    for axes, (text, steps) in zip(panels, results.items(), strict=True):
        _perplexity_panel(axes, text, steps.assign(sparsity=100 * steps.sparsity))
    panels[-1].set_xlabel("sparsity: zeros in the pruned matrices (%)")
    return figure


def _perplexity_panel(axes: Axes, text: str, steps: pd.DataFrame) -> None:
    """steps: sparsity in percent."""
    base, chain, beside = steps.base.iloc[0], iterations(steps), one_shots(steps)
    sparsest = steps.sparsity.max()
    axes.plot((0, sparsest), (base, base), color=GREY, linestyle=(0, (5, 4)), linewidth=1)
    paths = [(one_shot_colour(index), beside[index : index + 1]) for index in range(len(beside))]
    if len(chain):
        paths.append((CHAIN_COLOUR, chain))  # last, on top
    for colour, members in paths:
        _perplexity_path(axes, members, colour)
    _perplexity_axis(axes, steps)
    _name_iterations(axes, chain)
    ends = [(members.iloc[-1], colour) for colour, members in paths]
    names = [(end.sparsity, end.finetuned, f"{end.name}: {end.finetuned:.2f}", colour) for end, colour in ends]
    names.append((sparsest, base, f"base model: {base:.2f}", GREY))
    end_labels(axes, names, gap=8)
    axes.set_title(f"Perplexity on {text} as the model gets sparser")
    axes.legend(handles=_marker_key(steps), loc="upper left", fontsize=9)


def _perplexity_path(axes: Axes, steps: pd.DataFrame, colour: str) -> None:
    """Base -> pruned -> finetuned -> pruned -> ..."""
    xs = [0.0, *np.repeat(steps.sparsity, 2)]
    ys = [steps.base.iloc[0], *steps[["pruned", "finetuned"]].to_numpy().ravel()]
    axes.plot(xs, ys, color=colour, linewidth=1.2, alpha=0.7)
    size = 6 if len(steps) <= 30 else 3
    hollow = {"color": colour, "markerfacecolor": "white", "linestyle": "", "marker": "o", "markersize": size}
    axes.plot(steps.sparsity, steps.pruned, **hollow)
    for when, (marker, _) in MENDED.items():
        if len(mended := steps.dropna(subset=when)):
            axes.plot(mended.sparsity, mended[when], **hollow | {"marker": marker, "markersize": size - 1})
    if len(tuned := steps[steps.epochs > 0]):
        axes.plot(tuned.sparsity, tuned.finetuned, "o", color=colour, markersize=size)


def _name_iterations(axes: Axes, chain: pd.DataFrame) -> None:
    """Names above the pruned points, where no line of the chain runs; the last one's stands at its end."""
    for name in some(chain.index, 8)[:-1]:
        point = chain.sparsity[name], chain.pruned[name]
        if math.isfinite(point[1]):
            place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "va": "bottom"}
            axes.annotate(name, point, color=CHAIN_COLOUR, path_effects=HALO, **place)


def _perplexity_axis(axes: Axes, steps: pd.DataFrame) -> None:
    values = steps[["base", *MOMENTS]].to_numpy()
    values = values[np.isfinite(values)]
    axes.set_ylabel("perplexity")
    axes.margins(x=0.03, y=0.12)
    axes.autoscale_view()
    if values.max() > 8 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", left=False)


def _marker_key(steps: pd.DataFrame) -> list[Line2D]:
    kind = {"color": GREY, "linestyle": ""}
    key = [Line2D([], [], marker="o", markerfacecolor="white", label="after pruning", **kind)]
    for when, (marker, label) in MENDED.items():
        if steps[when].any():
            key.append(Line2D([], [], marker=marker, markerfacecolor="white", label=label, **kind))
    return [*key, Line2D([], [], marker="o", label="after finetuning", **kind)] if steps.epochs.any() else key


# --- comparison ------------------------------------------------------------------------------------------------------

# Okabe and Ito's are eight, and every method has one of its own.
MORE_COLOURS = ("#56b4e9", "#000000", "#8c564b", "#7f7f7f", "#bcbd22", "#9467bd", "#17becf", "#800000", "#808000")


def comparison(results: Results) -> Figure:
    """Perplexity of every finished model against its sparsity: a colour per method, a marker per pattern."""
    steps = next(iter(results.values()))[1:]
    if steps.empty:
        return empty("Nothing pruned, so nothing to compare")
    methods, patterns = _methods(steps), _patterns(steps)
    colours, markers = (
        _looks(methods, (CHAIN_COLOUR, *ONE_SHOT_COLOURS, *MORE_COLOURS)),
        _looks(patterns, "osD^vP*Xh<>pd8H"),
    )
    figure = Figure(figsize=(WIDTH, 0.5 + 4.8 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), squeeze=False, sharex=True)[:, 0]
    for axes, (text, found) in zip(panels, results.items(), strict=True):
        base = found.base.iloc[0]
        axes.axhline(base, color=GREY, linestyle=(0, (5, 4)), linewidth=1)
        for (method, pattern), members in found[1:].groupby([methods, patterns], sort=False):
            _comparison_line(axes, members.sort_values("sparsity", kind="stable"), colours[method], markers[pattern])
        _perplexity_axis(axes, found)
        # Below its line at the sparse end: there a model is worse.
        place = {"xytext": (-4, -4), "textcoords": "offset points", "ha": "right", "va": "top"}
        axes.annotate(
            f"dense {base:.2f}", (1, base), xycoords=("axes fraction", "data"), color=GREY, fontsize=9, **place
        )
        axes.set_title(f"Perplexity on {text}, every run")
    panels[-1].set_xlabel("sparsity: zeros in the pruned matrices (%)")
    handles = _comparison_key(colours, markers, set(steps.tokens > 0))
    figure.legend(handles=handles, loc="outside right upper", fontsize=9)
    return figure


def _methods(steps: pd.DataFrame) -> pd.Series:
    """Of each step the method: the iterations are one of their own, and so is to prune while training."""
    gradual = steps.index.str.startswith("gradual/")
    return steps.method.where(steps.iteration.isna(), "progressive").mask(gradual, "gradual " + steps.method)


def _patterns(steps: pd.DataFrame) -> pd.Series:
    """Of each step the pattern, and what else may differ in one: how sparsity is spread over the layers, and the run
    whose model was quantised or made sparse in its activations."""
    spread = (" " + steps.layers).where(steps.layers != "uniform", "")
    done_to = steps.index.str.extract(r"^(?:quantised|dynamic)/[^/]+/(.+/.+)$", expand=False)
    return (steps.pattern + spread + (" of " + pd.Series(done_to, steps.index)).fillna("")).str.strip()


def _looks(names: Iterable[str], looks: Sequence[str]) -> dict[str, str]:
    """A look for each name, in turn."""
    return {name: looks[index % len(looks)] for index, name in enumerate(dict.fromkeys(names))}


def _comparison_line(axes: Axes, members: pd.DataFrame, colour: str, marker: str) -> None:
    axes.plot(100 * members.sparsity, members.finetuned, color=colour, linewidth=1, alpha=0.5)
    for step in members.itertuples():
        face = colour if step.tokens else "white"
        axes.plot(100 * step.sparsity, step.finetuned, marker, color=colour, markerfacecolor=face)


def _comparison_key(colours: dict[str, str], markers: dict[str, str], tuned: set[bool]) -> list[Line2D]:
    key = [Line2D([], [], color=colour, linewidth=3, label=method) for method, colour in colours.items()]
    kind = {"color": GREY, "linestyle": ""}
    key += [Line2D([], [], marker=marker, label=pattern, **kind) for pattern, marker in markers.items()]
    if len(tuned) == 2:
        key.append(Line2D([], [], marker="o", markerfacecolor="white", label="hollow: not finetuned", **kind))
    return key


# --- tier shares -----------------------------------------------------------------------------------------------------


def tier_shares(steps: pd.DataFrame) -> Figure:
    """How many of the blocks stand in which tier after each step, a stacked bar per step, read from the top down."""
    names, note = with_room(steps.index, 24)
    steps = steps.loc[names]
    figure = Figure(figsize=(WIDTH, 1.1 + 0.36 * len(steps)), layout="constrained")
    axes = figure.subplots()
    # Half a bar of white sets the one-shot runs apart from the chain.
    places = np.arange(len(steps)) + 0.5 * steps.iteration.isna().to_numpy()
    left = np.zeros(len(steps))
    for tier in TIERS:
        shares = 100 * steps[tier].to_numpy()
        axes.barh(places, shares, left=left, height=0.84, color=TIER_COLOURS[tier])
        _write_shares(axes, places, shares, left, "white" if tier == "dense" else "black")
        left += shares
    axes.set_yticks(places, [f"{BASE} (base)" if name == BASE else name for name in names])
    axes.set_ylim(places[-1] + 0.6, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, 100)
    axes.set_xlabel("weight blocks (%)")
    axes.set_title(f"Share of the weight blocks in each tier{note}", pad=24)
    # In the order of the bars, right above them.
    axes.legend(handles=tier_patches(), loc="lower left", bbox_to_anchor=(0, 1), ncols=len(TIERS), borderpad=0.2)
    return figure


def _write_shares(axes: Axes, places: Sequence[float], shares: np.ndarray, left: np.ndarray, colour: str) -> None:
    for place, share, start in zip(places, shares, left, strict=True):
        if share >= 3:  # a thinner slice has no room for a number
            axes.text(start + share / 2, place, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=9)
