"""What the figures share: style, colours, names at the ends of lines.

Drawn without pyplot, so that no screen, user style or backend setting has a say in the bytes.
"""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from ..plan.steps import iteration_of
from .steps import TIERS

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


def some(items: Sequence, most: int) -> list:
    """At most `most` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def with_room(steps: Sequence[str], most: int) -> tuple[list[str], str]:
    """The steps there is room for, all one-shot runs among them, and what a title says when that is not all."""
    chain = [step for step in steps if iteration_of(step) is not None]
    beside = [step for step in steps if iteration_of(step) is None]
    shown = some(chain, max(most - len(beside), 2)) + beside
    return shown, "" if len(shown) == len(steps) else f" ({len(shown)} of {len(steps)} steps)"


def end_labels(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float) -> None:
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


def one_shot_colour(index: int) -> str:
    return ONE_SHOT_COLOURS[index % len(ONE_SHOT_COLOURS)]


def tier_patches() -> list[Patch]:
    return [Patch(color=TIER_COLOURS[tier], label=TIER_LABELS[tier]) for tier in TIERS]


def empty(reason: str) -> Figure:
    """A figure that says why there is nothing to see: the report's links stay whole."""
    figure = Figure(figsize=(WIDTH, 1.5))
    figure.text(0.5, 0.5, reason, ha="center", va="center", color=GREY)
    return figure
