"""The report's figures, each a function from the steps of a run (see `summary.py`) to a matplotlib figure.

Drawn without pyplot, so that no screen, user style or backend setting has a say in the bytes.
"""

import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from .summary import BASE, TIERS, iteration_of, iterations, one_shots

# Colours that differ in lightness as well as in hue: dark to light is dense to sparse, in print and to every eye.
TIER_COLOURS = {"dense": "#1f3b57", "mid_2_4": "#5fa8c8", "topk": "#f3c969"}
TIER_LABELS = {"dense": "Dense", "mid_2_4": "2:4", "topk": "TopK"}
CHAIN_COLOUR = "#0072b2"
# Okabe and Ito's; the one-shot runs take them in turn.
ONE_SHOT_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00")
GREY = "#666666"
HALO = [withStroke(linewidth=3, foreground="white")]
WIDTH = 8.0  # inches, of every figure

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same everywhere
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
    "text.parse_math": False,  # a name with a $ in it is a name
    # Letters as outlines: the report shows a figure as an image, where the reader's fonts would shift every label.
    "svg.fonttype": "path",
    "svg.hashsalt": "stepdown",
}


@contextmanager
def style() -> Iterator[None]:
    """Our style on top of matplotlib's defaults, whatever the user's own settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def as_svg(figure: Figure) -> str:
    """The figure as SVG, without the date and the version that would make equal figures differ."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


# --- perplexity ------------------------------------------------------------------------------------------------------


def perplexity(steps: Sequence[dict]) -> Figure:
    """Perplexity against sparsity: up with every prune, down with every finetuning; a panel per text."""
    if not iterations(steps) and not one_shots(steps):
        return _empty("Nothing pruned, so no perplexities to compare")
    texts = list(steps[0]["perplexity"])
    figure = Figure(figsize=(WIDTH, 0.5 + 4.3 * len(texts)), layout="constrained")
    panels = figure.subplots(len(texts), squeeze=False, sharex=True)[:, 0]
    for axes, text in zip(panels, texts, strict=True):
        _perplexity_panel(axes, steps, text)
    panels[-1].set_xlabel("sparsity: zeros in the pruned matrices (%)")
    return figure


def _perplexity_panel(axes: Axes, steps: Sequence[dict], text: str) -> None:
    base = steps[0]["perplexity"][text]["base"]
    axes.axhline(base, color=GREY, linestyle=(0, (5, 4)), linewidth=1)
    # A one-shot run often has the last iteration's sparsity: each stands a little to the right of the one before.
    paths = [(_one_shot_colour(index), 7 * (index + 1), [step]) for index, step in enumerate(one_shots(steps))]
    if chain := iterations(steps):
        paths.append((CHAIN_COLOUR, 0, chain))  # last, on top
    for colour, shift, members in paths:
        _perplexity_path(axes, members, text, base, colour, shift)
    _perplexity_axis(axes, steps, text)
    _name_iterations(axes, chain, text)
    ends = [_perplexity_end(members[-1], text, colour) for colour, _, members in paths]
    _end_labels(axes, ends, gap=7 * len(paths) + 3)
    place = {"xytext": (4, -4), "textcoords": "offset points", "va": "top"}
    axes.annotate(f"base model {base:.2f}", (0, base), color=GREY, fontsize=9, **place)
    axes.set_title(f"Perplexity on {text} as the model gets sparser")
    refitted = any("refitted" in step["perplexity"][text] for step in steps)
    axes.legend(handles=_marker_key(refitted, any(step["epochs"] for step in steps)), loc="upper left", fontsize=9)


def _perplexity_path(axes: Axes, steps: Sequence[dict], text: str, base: float, colour: str, shift: float) -> None:
    """Base -> pruned -> finetuned -> pruned -> ..., moved `shift` points to the right."""
    values = [step["perplexity"][text] for step in steps]
    sparsity = [100 * step["sparsity"] for step in steps]
    tuned = [step["epochs"] > 0 for step in steps]
    shifted = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    moved = {"transform": shifted, "clip_on": False}  # a few points may lead past the axes' end
    xs = [0.0] + [x for x in sparsity for _ in range(2)]
    ys = [base] + [value[when] for value in values for when in ("pruned", "finetuned")]
    refitted = [(x, value["refitted"]) for x, value in zip(sparsity, values, strict=True) if "refitted" in value]
    axes.plot(xs, ys, color=colour, linewidth=1.2, alpha=0.7, **moved)
    size = 6 if len(steps) <= 30 else 3
    hollow = {"color": colour, "markerfacecolor": "white", "linestyle": "", "marker": "o", "markersize": size}
    axes.plot(sparsity, [value["pruned"] for value in values], **moved, **hollow)
    if refitted:
        axes.plot(*zip(*refitted, strict=True), **moved, **hollow | {"marker": "D", "markersize": size - 1})
    filled = [(x, value["finetuned"]) for x, value, is_tuned in zip(sparsity, values, tuned, strict=True) if is_tuned]
    if filled:
        axes.plot(*zip(*filled, strict=True), "o", color=colour, markersize=size, **moved)
    # Nothing moved by points counts for matplotlib's choice of limits, so the points themselves are put forward.
    axes.update_datalim([point for point in zip(xs, ys, strict=True) if math.isfinite(point[1])])


def _name_iterations(axes: Axes, chain: Sequence[dict], text: str) -> None:
    """Names above the pruned points, where no line of the chain runs; the last one's stands at its end."""
    for step in _some(chain, 8)[:-1]:
        point = (100 * step["sparsity"], step["perplexity"][text]["pruned"])
        if not math.isfinite(point[1]):
            continue
        place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate(step["step"], point, color=CHAIN_COLOUR, path_effects=HALO, **place)


def _perplexity_end(step: dict, text: str, colour: str) -> tuple[float, float, str, str]:
    value = step["perplexity"][text]["finetuned"]
    return 100 * step["sparsity"], value, f"{step['step']}: {value:.2f}", colour


def _perplexity_axis(axes: Axes, steps: Sequence[dict], text: str) -> None:
    values = [value for step in steps for value in step["perplexity"][text].values() if math.isfinite(value)]
    axes.set_ylabel("perplexity")
    axes.margins(x=0.03, y=0.12)
    axes.autoscale_view()
    if max(values) > 8 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", left=False)


def _marker_key(refitted: bool, finetuned: bool) -> list[Line2D]:
    kind = {"color": GREY, "marker": "o", "linestyle": ""}
    key = [Line2D([], [], markerfacecolor="white", label="after pruning", **kind)]
    if refitted:
        key.append(Line2D([], [], markerfacecolor="white", label="after refitting", **kind | {"marker": "D"}))
    return [*key, Line2D([], [], label="after finetuning", **kind)] if finetuned else key


# --- comparison ------------------------------------------------------------------------------------------------------


def comparison(steps: Sequence[dict]) -> Figure:
    """Perplexity of every finished model against its sparsity: a colour per method, a marker per pattern."""
    groups = _methods(steps)
    if not groups:
        return _empty("Nothing pruned, so nothing to compare")
    texts = list(steps[0]["perplexity"])
    figure = Figure(figsize=(WIDTH, 0.5 + 4.8 * len(texts)), layout="constrained")
    panels = figure.subplots(len(texts), squeeze=False, sharex=True)[:, 0]
    colours = _looks((method for method, _ in groups), (CHAIN_COLOUR, *ONE_SHOT_COLOURS, "#56b4e9", "#000000"))
    markers = _looks((pattern for _, pattern in groups), "osD^vP*Xh")
    for axes, text in zip(panels, texts, strict=True):
        base = steps[0]["perplexity"][text]["base"]
        axes.axhline(base, color=GREY, linestyle=(0, (5, 4)), linewidth=1)
        for (method, pattern), members in groups.items():
            _comparison_line(axes, members, text, colours[method], markers[pattern])
        _perplexity_axis(axes, steps, text)
        place = {"xytext": (4, -4), "textcoords": "offset points", "va": "top", "xycoords": ("axes fraction", "data")}
        axes.annotate(f"dense {base:.2f}", (0, base), color=GREY, fontsize=9, **place)
        axes.set_title(f"Perplexity on {text}, every run")
    panels[-1].set_xlabel("sparsity: zeros in the pruned matrices (%)")
    tuned = {step["tokens"] > 0 for step in steps[1:]}
    figure.legend(handles=_comparison_key(colours, markers, tuned), loc="outside right upper", fontsize=9)
    return figure


def _methods(steps: Sequence[dict]) -> dict[tuple[str, str], list[dict]]:
    """Steps by method and pattern, each group in the order of sparsity; the iterations are a method of their own."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for step in steps[1:]:
        method = "progressive" if iteration_of(step["step"]) else step["pruning"]["method"]
        layers = step["pruning"]["layers"]
        pattern = step["pruning"]["pattern"] + ("" if layers == "uniform" else f" {layers}")
        groups.setdefault((method, pattern), []).append(step)
    return {group: sorted(members, key=lambda step: step["sparsity"]) for group, members in groups.items()}


def _looks(names: Iterable[str], looks: Sequence[str]) -> dict[str, str]:
    """A look for each name, in turn."""
    return {name: looks[index % len(looks)] for index, name in enumerate(dict.fromkeys(names))}


def _comparison_line(axes: Axes, members: Sequence[dict], text: str, colour: str, marker: str) -> None:
    points = [(100 * step["sparsity"], step["perplexity"][text]["finetuned"]) for step in members]
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=1, alpha=0.5)
    for (x, y), step in zip(points, members, strict=True):
        axes.plot(x, y, marker, color=colour, markerfacecolor=colour if step["tokens"] else "white")


def _comparison_key(colours: dict[str, str], markers: dict[str, str], tuned: set[bool]) -> list[Line2D]:
    key = [Line2D([], [], color=colour, linewidth=3, label=method) for method, colour in colours.items()]
    kind = {"color": GREY, "linestyle": ""}
    key += [Line2D([], [], marker=marker, label=pattern, **kind) for pattern, marker in markers.items()]
    if len(tuned) == 2:
        key.append(Line2D([], [], marker="o", markerfacecolor="white", label="hollow: not finetuned", **kind))
    return key


# --- tier shares -----------------------------------------------------------------------------------------------------


def tier_shares(steps: Sequence[dict]) -> Figure:
    """How many of the blocks stand in which tier after each step, a stacked bar per step, read from the top down."""
    shown, note = _shown(steps, 24)
    figure = Figure(figsize=(WIDTH, 1.1 + 0.36 * len(shown)), layout="constrained")
    axes = figure.subplots()
    # Half a bar of white sets the one-shot runs apart from the chain.
    places = [row + (0.5 if iteration_of(step["step"]) is None else 0) for row, step in enumerate(shown)]
    left = np.zeros(len(shown))
    for tier in TIERS:
        shares = np.array([100 * step["shares"][tier] for step in shown])
        axes.barh(places, shares, left=left, height=0.84, color=TIER_COLOURS[tier])
        _write_shares(axes, places, shares, left, "white" if tier == "dense" else "black")
        left += shares
    names = [f"{BASE} (base)" if step["step"] == BASE else step["step"] for step in shown]
    axes.set_yticks(places, names)
    axes.set_ylim(places[-1] + 0.6, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, 100)
    axes.set_xlabel("weight blocks (%)")
    axes.set_title(f"Share of the weight blocks in each tier{note}", pad=24)
    # In the order of the bars, right above them.
    axes.legend(handles=_tier_patches(), loc="lower left", bbox_to_anchor=(0, 1), ncols=len(TIERS), borderpad=0.2)
    return figure


def _write_shares(axes: Axes, places: Sequence[float], shares: np.ndarray, left: np.ndarray, colour: str) -> None:
    for place, share, start in zip(places, shares, left, strict=True):
        if share >= 3:  # a thinner slice has no room for a number
            axes.text(start + share / 2, place, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=9)


# --- tier maps -------------------------------------------------------------------------------------------------------


def read_tier_maps(paths: Sequence[Path], steps: Sequence[dict]) -> tuple[str, dict[str, np.ndarray]]:
    """The map of one matrix after each step, uint8 [block rows, block cols], in the order of the steps.

    The matrix is the largest of the middle layer: wide enough to show a pattern, and neither the first nor the last
    layer, which are the odd ones. Only it is read. Raises `UserError` for a file that is no tier map of these steps.
    """
    maps: dict[str, np.ndarray] = {}
    matrix = ""
    for path in paths:
        matrix, maps[_step_of(path, steps)] = _read_tier_map(path, matrix)
    order = [step["step"] for step in steps if step["step"] in maps]
    return matrix, {name: maps[name] for name in order}


def _read_tier_map(path: Path, matrix: str) -> tuple[str, np.ndarray]:
    """The tiers of one matrix, and its name, chosen here if it is empty."""
    try:
        with safe_open(path, framework="numpy") as file:
            matrix = matrix or middle_matrix({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
            tier_map = file.get_tensor(matrix)
    except (SafetensorError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: no tier map to draw ({reason}); delete it and run again") from None
    if tier_map.ndim != 2 or tier_map.size == 0 or tier_map.dtype != np.uint8 or tier_map.max() >= len(TIERS):
        raise UserError(f"{path}: not a tier map (2-D, uint8, values 0 to {len(TIERS) - 1}); delete it and run again")
    return matrix, tier_map


def middle_matrix(shapes: dict[str, Sequence[int]]) -> str:
    """The name of the matrix with most blocks in the middle decoder layer; of equals, the first by name.

    Raises `IndexError` if there is none.
    """
    layers: dict[int, list[str]] = {}
    for name in sorted(shapes):
        number = re.search(r"\.(\d+)\.", name)
        layers.setdefault(int(number[1]) if number else -1, []).append(name)
    middle = sorted(layers)[len(layers) // 2]
    return max(layers[middle], key=lambda name: math.prod(shapes[name]))


def _step_of(path: Path, steps: Sequence[dict]) -> str:
    """The step in whose folder a map lies: results/oneshot/three-tier/tier_map.safetensors is of oneshot/three-tier."""
    folder = path.absolute().parent.parts
    for step in steps:
        parts = tuple(step["step"].split("/"))
        if folder[-len(parts) :] == parts:
            return step["step"]
    raise UserError(f"{path}: lies in the folder of no step that has an eval.json here; give that too")


def tier_maps(matrix: str, maps: dict[str, np.ndarray]) -> Figure:
    """One matrix's blocks coloured by tier, a small picture per step."""
    pruned = [{"step": step} for step in maps if step != BASE]  # the base model's map is all Dense
    if not pruned:
        return _empty("Nothing pruned, so no tier maps")
    steps, note = _shown(pruned, 12)
    shown = {step["step"]: maps[step["step"]] for step in steps}
    block_rows, block_columns = next(iter(shown.values())).shape
    columns, rows, height = _grid(len(shown), block_rows / block_columns)
    figure = Figure(figsize=(WIDTH, height + 1.0), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, (step, tier_map) in zip(panels.flat, shown.items(), strict=False):
        _tier_map_panel(axes, step, tier_map)
    panels[0, 0].set_axis_on()
    panels[0, 0].set_xlabel(f"inputs: {block_columns} blocks", fontsize=9)
    panels[0, 0].set_ylabel(f"outputs: {block_rows} blocks", fontsize=9)
    figure.suptitle(f"Tier of every block of {matrix}{note}", x=0.01, ha="left", fontsize=11)
    figure.legend(handles=_tier_patches(), loc="outside lower left", ncols=len(TIERS), fontsize=9)
    return figure


def _tier_map_panel(axes: Axes, step: str, tier_map: np.ndarray) -> None:
    colours = ListedColormap([TIER_COLOURS[tier] for tier in TIERS])
    # "none" keeps a pixel per block; any other choice would resample 688 blocks to the dots of a small picture.
    axes.imshow(tier_map, cmap=colours, vmin=0, vmax=len(TIERS) - 1, interpolation="none")
    axes.set_title(step, fontsize=10, pad=4)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    rows, columns = tier_map.shape
    if max(rows, columns) <= 64:  # white seams while a block is larger than they are
        seams = {"color": "white", "linewidth": 0.8 if max(rows, columns) <= 16 else 0.3}
        axes.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, **seams)
        axes.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, **seams)


def _grid(count: int, aspect: float) -> tuple[int, int, float]:
    """Columns, rows and height in inches of the grid that shows `count` panels of height/width `aspect` largest."""
    best = (0.0, 1, count, 0.0)
    for columns in range(1, count + 1):
        rows = math.ceil(count / columns)
        # What fits the figure's width, and a page's height of 8 inches.
        width = min((WIDTH - 0.4) / columns - 0.15, (8 / rows - 0.35) / aspect, 4.0, 3.0 / aspect)
        best = max(best, (width, columns, rows, rows * (width * aspect + 0.35)))
    return best[1:]


# --- training --------------------------------------------------------------------------------------------------------


def training(steps: Sequence[dict]) -> Figure:
    """Loss over all finetuning tokens since the base model: the iterations in a row, the one-shot runs across them."""
    if not any(step["train_loss"] or step["eval_loss"] for step in steps):
        return _empty("No finetuning, so no training curves")
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    # What is trained on, a distance to another model perhaps, is no size to compare the validation loss with.
    axes, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    divisor, unit = _token_unit(max(step["total_tokens"] for step in steps))
    chain = [step for step in iterations(steps) if step["tokens"]]
    lines = [("iterations", chain, CHAIN_COLOUR)] if chain else []
    lines += [(step["step"], [step], _one_shot_colour(index)) for index, step in enumerate(one_shots(steps))]
    for _, members, colour in reversed(lines):  # the chain last, on top
        _loss_curves(axes, below, members, divisor, colour)
    _mark_starts(axes, chain, divisor)
    below.set_xlabel(f"finetuning tokens since the base model{unit}")
    axes.set_ylabel("validation loss\n(nats per token)")
    below.set_ylabel("training loss")
    axes.set_title("Loss while finetuning: each iteration starts from the model just pruned")
    for each in (axes, below):
        each.grid(axis="x", visible=False)
    _end_labels(axes, [_loss_end(members[-1], name, colour, divisor) for name, members, colour in lines], gap=8)
    return figure


def _loss_curves(axes: Axes, below: Axes, members: Sequence[dict], divisor: float, colour: str) -> None:
    """Validation loss, training loss below. A line per step, none joined: the model was pruned in between."""
    dots = "o" if sum(len(step["eval_loss"]) for step in members) <= 60 else ""
    for step in members:
        start = step["total_tokens"] - step["tokens"]
        for panel, curve, look in (
            (below, "train_loss", {"linewidth": 1, "alpha": 0.6}),
            (axes, "eval_loss", {"linewidth": 1.8, "marker": dots, "markersize": 4}),
        ):
            points = [((start + tokens) / divisor, loss) for tokens, loss in step[curve]]
            if points:
                panel.plot(*zip(*points, strict=True), color=colour, **look)


def _mark_starts(axes: Axes, chain: Sequence[dict], divisor: float) -> None:
    for step in _some(chain, 10):
        start = (step["total_tokens"] - step["tokens"]) / divisor
        axes.axvline(start, color="#c8c8c8", linewidth=0.8, zorder=0)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(step["step"], (start, 0), (3, 3), color=GREY, **place)


def _loss_end(step: dict, name: str, colour: str, divisor: float) -> tuple[float, float, str, str]:
    curve = step["eval_loss"] or [(0, math.nan)]
    return step["total_tokens"] / divisor, curve[-1][1], name, colour


def _token_unit(largest: float) -> tuple[float, str]:
    for divisor, name in ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)")):
        if largest >= divisor:
            return divisor, name
    return 1, ""


# --- shared ----------------------------------------------------------------------------------------------------------


def _some(items: Sequence, most: int) -> list:
    """At most `most` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _shown(steps: Sequence[dict], most: int) -> tuple[list[dict], str]:
    """The steps there is room for, all one-shot runs among them, and what a title says when that is not all."""
    beside = one_shots(steps)
    chain = [step for step in steps if iteration_of(step["step"]) is not None]
    shown = _some(chain, max(most - len(beside), 2)) + beside
    return shown, "" if len(shown) == len(steps) else f" ({len(shown)} of {len(steps)} steps)"


def _end_labels(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float) -> None:
    """The name of each line (x, y of its end, name, colour) `gap` points to the right of it.

    Where two would overlap, the higher one is pushed up.
    """
    lowest = -math.inf
    to_fraction = axes.transScale + axes.transLimits
    for x, y, name, colour in sorted((end for end in ends if math.isfinite(end[1])), key=lambda end: end[1]):
        height = max(to_fraction.transform((x, y))[1], lowest + 0.06)
        lowest = height
        look = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "center", "color": colour}
        axes.annotate(name, (x, height), (gap, 0), **look)


def _one_shot_colour(index: int) -> str:
    return ONE_SHOT_COLOURS[index % len(ONE_SHOT_COLOURS)]


def _tier_patches() -> list[Patch]:
    return [Patch(color=TIER_COLOURS[tier], label=TIER_LABELS[tier]) for tier in TIERS]


def _empty(reason: str) -> Figure:
    """A figure that says why there is nothing to see: the report's links stay whole."""
    figure = Figure(figsize=(WIDTH, 1.5))
    figure.text(0.5, 0.5, reason, ha="center", va="center", color=GREY)
    return figure
