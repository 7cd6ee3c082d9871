"""Schedules written for a target: how the shares of the tiers get there in n iterations.

`linear`: the same step every time. `cubic`: large steps first, small ones towards the end (Zhu & Gupta 2017):
share(t) = target + (start - target) (1 - t)^3 with t = iteration / n. `published`: five rows as they were published.
Exact decimals; standard library only.
"""

import re
from collections.abc import Callable
from decimal import ROUND_HALF_EVEN, Decimal

from ..errors import UserError
from .schedule import REQUIRED, SHARES, STEP_COLUMNS

STEP = Decimal("0.0001")
SHAPES: dict[str, Callable[[Decimal], Decimal]] = {
    "linear": lambda time: time,
    "cubic": lambda time: 1 - (1 - time) ** 3,
}
# Dense, 2:4 and TopK after each iteration, and the epochs after it.
PUBLISHED = (
    ("0.90", "0.10", "0.00", 2),
    ("0.80", "0.10", "0.10", 2),
    ("0.65", "0.20", "0.15", 2),
    ("0.50", "0.30", "0.20", 2),
    ("0.35", "0.45", "0.20", 3),
)


def published_rows() -> list[dict[str, str]]:
    """The published schedule."""
    return _with_steps([tuple(map(Decimal, shares)) for *shares, _ in PUBLISHED], [epochs for *_, epochs in PUBLISHED])


def rows_towards(target: tuple[str, str, str], iterations: int, shape: str, epochs: int) -> list[dict[str, str]]:
    """Rows in which dense falls and topk rises from (1, 0, 0) to `target` as `shape` says; 2:4 is what is between.

    Monotone whatever the rounding; the last row is the target as it is written. Raises `UserError` for shares that are
    none or do not sum to 1, and for fewer than one iteration or epochs below 0.
    """
    dense, mid_2_4, topk = (_share(name, text) for name, text in zip(SHARES, target, strict=True))
    if dense + mid_2_4 + topk != 1:
        raise UserError(f"target: found a sum of {dense + mid_2_4 + topk}; the three shares must sum to 1")
    if iterations < 1 or epochs < 0:
        raise UserError(
            f"found {iterations} iterations of {epochs} epochs; give at least 1 iteration, 0 epochs or more"
        )
    shares = []
    for iteration in range(1, iterations):
        progress = SHAPES[shape](Decimal(iteration) / iterations)
        falling = max(dense, _rounded(1 + (dense - 1) * progress))
        rising = min(topk, 1 - falling, _rounded(topk * progress))
        shares.append((falling, 1 - falling - rising, rising))
    return _with_steps([*shares, (dense, mid_2_4, topk)], [epochs] * iterations)


def as_csv(rows: list[dict[str, str]]) -> str:
    """The rows as a schedule file."""
    columns = ("iteration", *SHARES, *STEP_COLUMNS, "epochs")
    assert set(columns) == {*REQUIRED, *STEP_COLUMNS}
    return "\n".join([",".join(columns), *(",".join(row[column] for column in columns) for row in rows)]) + "\n"


def _with_steps(shares: list[tuple[Decimal, Decimal, Decimal]], epochs: list[int]) -> list[dict[str, str]]:
    rows, before = [], (Decimal(1), Decimal(0), Decimal(0))
    for iteration, after in enumerate(shares, start=1):
        steps = (before[0] - after[0], after[2] - before[2])
        cells = dict(zip((*SHARES, *STEP_COLUMNS), map(_as_text, (*after, *steps)), strict=True))
        rows.append({"iteration": str(iteration), **cells, "epochs": str(epochs[iteration - 1])})
        before = after
    return rows


def _share(name: str, text: str) -> Decimal:
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text) or Decimal(text) > 1:
        raise UserError(f"target: {name} is {text!r}; write a share from 0 to 1 such as 0.35")
    return Decimal(text)


def _rounded(share: Decimal) -> Decimal:
    return share.quantize(STEP, ROUND_HALF_EVEN)


def _as_text(share: Decimal) -> str:
    """At least two decimals, as people write shares."""
    text = format(share.normalize(), "f")
    whole, _, rest = text.partition(".")
    return f"{whole}.{rest.ljust(2, '0')}"
