"""One matrix's tier map after each step: read, and drawn."""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from .drawing import TIER_COLOURS, WIDTH, empty, tier_patches, with_room
from .steps import BASE, TIERS


def read_tier_maps(paths: Iterable[Path], steps: Sequence[str]) -> tuple[str, dict[str, np.ndarray]]:
    """The map of one matrix after each step, uint8 [block rows, block cols], in the order of the steps.

    The matrix is the largest of the middle layer: wide enough to show a pattern, and neither the first nor the last
    layer, which are the odd ones. Only it is read. Raises `UserError` for a file that is no tier map of these steps.
    """
    maps: dict[str, np.ndarray] = {}
    matrix = ""
    for path in paths:
        matrix, maps[_step_of(path, steps)] = _read_tier_map(path, matrix)
    return matrix, {step: maps[step] for step in steps if step in maps}


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


def _step_of(path: Path, steps: Sequence[str]) -> str:
    """The step in whose folder a map lies: results/oneshot/three-tier/tier_map.safetensors is of oneshot/three-tier."""
    folder = path.absolute().parent.parts
    for step in steps:
        parts = tuple(step.split("/"))
        if folder[-len(parts) :] == parts:
            return step
    raise UserError(f"{path}: lies in the folder of no step that has an eval.json here; give that too")


def tier_maps(matrix: str, maps: dict[str, np.ndarray]) -> Figure:
    """One matrix's blocks coloured by tier, a small picture per step."""
    pruned = [step for step in maps if step != BASE]  # the base model's map is all Dense
    if not pruned:
        return empty("Nothing pruned, so no tier maps")
    steps, note = with_room(pruned, 12)
    block_rows, block_columns = maps[steps[0]].shape
    columns, rows, height = _grid(len(steps), block_rows / block_columns)
    figure = Figure(figsize=(WIDTH, height + 1.0), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, step in zip(panels.flat, steps, strict=False):
        _tier_map_panel(axes, step, maps[step])
    panels[0, 0].set_axis_on()
    panels[0, 0].set_xlabel(f"inputs: {block_columns} blocks", fontsize=9)
    panels[0, 0].set_ylabel(f"outputs: {block_rows} blocks", fontsize=9)
    figure.suptitle(f"Tier of every block of {matrix}{note}", x=0.01, ha="left", fontsize=11)
    figure.legend(handles=tier_patches(), loc="outside lower left", ncols=len(TIERS), fontsize=9)
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
