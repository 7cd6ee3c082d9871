"""The schedule file: one row per iteration, its shares of the three tiers and its epochs; every rule it must obey."""

import difflib
import io
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import check_not_pointer

SHARES = ["dense", "mid_2_4", "topk"]
STEP_COLUMNS = ["dense_to_2_4", "mid_2_4_to_topk"]
REQUIRED = ["iteration", *SHARES, "epochs"]
KNOWN = [*REQUIRED, *STEP_COLUMNS, "distill"]
DISTILL = {"yes": True, "no": False, "-": True, "": True}
TOLERANCE = Decimal("1e-6")


@dataclass(frozen=True)
class Row:
    """One iteration. Shares and steps are decimals as text ("0.35"): no float comes between the file and the blocks."""

    iteration: int
    dense: str
    mid_2_4: str
    topk: str
    epochs: int
    dense_to_2_4: str
    mid_2_4_to_topk: str
    distill: bool = True


def read_schedule(path: str | Path) -> list[Row]:
    """The rows in order; `UserError` names file, row, column, what was found and what to do."""
    cells, check = _read_cells(path), partial(_check, path)
    cells["distill"] = cells.distill.str.lower()
    for column in ("iteration", "epochs"):
        check(cells[column].str.fullmatch("[0-9]{1,9}"), cells[column].map(repr), "write a whole number such as 2")
        cells[column] = cells[column].map(int)
    check(cells.iteration == cells.index, cells.iteration, "number the rows 1, 2, 3 ... without gaps")
    check(cells.distill.isin(DISTILL), cells.distill.map(repr), "write yes or no")

    shares = cells[SHARES].apply(partial(_decimals, check))
    total = shares.sum(axis="columns").rename(", ".join(SHARES))
    check((total - 1).abs() <= TOLERANCE, "a sum of " + total.map(_as_text), "the three shares must sum to 1")
    before = shares.shift(fill_value=Decimal(0))
    before.loc[1, "dense"] = Decimal(1)
    pairs = shares.map(_as_text) + " after " + before.map(_as_text)
    check(shares.dense <= before.dense, pairs.dense, "a block never goes up, lower it")
    check(shares.topk >= before.topk, pairs.topk, "a block never goes up, raise it")

    # A step follows from the shares of this row and the one before; where it is written down it must agree.
    exact = shares.assign(dense_to_2_4=before.dense - shares.dense, mid_2_4_to_topk=shares.topk - before.topk)
    text = exact.map(_as_text)
    for column in STEP_COLUMNS:
        written = cells[column].mask(cells[column].isin(["", "-"]), text[column])
        agrees = (_decimals(check, written) - exact[column]).abs() <= TOLERANCE
        check(agrees, written + "; the shares make it " + text[column], "write that, or - to have it derived")
    cells = cells.assign(**text, distill=cells.distill.map(DISTILL))
    return [Row(**row) for row in cells.to_dict("records")]


def one_shot(rows: list[Row]) -> Row:
    """The last row's shares in one step from the dense model, with as many epochs as all rows together."""
    steps = {"dense_to_2_4": _as_text(1 - Decimal(rows[-1].dense)), "mid_2_4_to_topk": rows[-1].topk}
    return replace(rows[-1], iteration=1, epochs=sum(row.epochs for row in rows), **steps)


def _read_cells(path: str | Path) -> Any:
    """A frame of stripped text, the rows numbered from 1, with every known column; blank lines are skipped."""
    import pandas as pd  # costs half a second, which those who only plan names need not spend

    try:
        check_not_pointer(Path(path))
        # utf-8-sig: spreadsheets put a byte order mark before the first column's name.
        text = Path(path).read_text(encoding="utf-8-sig")
        # As many columns as the longest line has cells: what a line lacks is NaN then, and none is too long to be read.
        columns = range(1 + max((line.count(",") for line in text.splitlines()), default=0))
        how = {"dtype": str, "keep_default_na": False, "engine": "python"}
        lines = pd.read_csv(io.StringIO(text), header=None, names=columns, **how)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"schedule {path}: {reason}; name a CSV file with the columns {', '.join(REQUIRED)}") from None
    lines = lines.apply(lambda column: column.str.strip())
    lines = lines[lines.fillna("").any(axis="columns")].reset_index(drop=True)
    header = lines.loc[0].dropna().tolist() if len(lines) else []
    _check_header(path, header)
    cells, widths = lines[1:], lines[1:].notna().sum(axis="columns")
    for row in cells.index[widths != len(header)][:1]:
        raise UserError(f"{path}, row {row}: found {widths[row]} cells under {len(header)} columns; give one each")
    if cells.empty:
        raise UserError(f"{path}: no rows below the header; write one row per iteration")
    return cells[range(len(header))].set_axis(header, axis="columns").reindex(columns=KNOWN, fill_value="-")


def _check_header(path: str | Path, header: list[str]) -> None:
    for column in header:
        if column not in KNOWN:
            near = difflib.get_close_matches(column, KNOWN, 1)
            hint = f"did you mean {near[0]}?" if near else f"the columns are {', '.join(KNOWN)}"
            raise UserError(f"{path}: unknown column {column!r}; {hint}")
        if header.count(column) > 1:
            raise UserError(f"{path}: column {column} stands twice; keep one")
    for column in REQUIRED:
        if column not in header:
            raise UserError(f"{path}: column {column} is missing; the header needs {', '.join(REQUIRED)}")


def _check(path: str | Path, good: Any, found: Any, todo: str) -> None:
    """The first row that is not good becomes one line; both are columns, `found` under the name of what is checked."""
    for row in good.index[~good][:1]:
        columns = f"column{'s' * (', ' in found.name)} {found.name}"
        raise UserError(f"{path}, row {row}, {columns}: found {found[row]}; {todo}")


def _decimals(check: Any, texts: Any) -> Any:
    """A column of shares as exact numbers."""
    good = texts.str.fullmatch(r"0*1(\.0*)?|0*\.[0-9]+|0+\.?")
    check(good, texts.map(repr), "write a share from 0 to 1 such as 0.35")
    return texts.map(Decimal)


def _as_text(share: Decimal) -> str:
    """0.90 and 0.9 are one share: rewriting the file in another style must not rerun anything."""
    return format(share.normalize(), "f")
