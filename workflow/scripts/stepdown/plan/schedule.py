"""The schedule file: one row per iteration, its shares of the three tiers and its epochs; every rule it must obey."""

import csv
import difflib
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from ..errors import UserError

SHARES = ("dense", "mid_2_4", "topk")
STEP_COLUMNS = ("dense_to_2_4", "mid_2_4_to_topk")
REQUIRED = ("iteration", *SHARES, "epochs")
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
    rows: list[Row] = []
    for number, cells in enumerate(_read_cells(path), start=1):
        rows.append(_read_row(f"{path}, row {number}", number, cells, rows[-1] if rows else None))
    if not rows:
        raise UserError(f"{path}: no rows below the header; write one row per iteration")
    return rows


def one_shot(rows: list[Row]) -> Row:
    """The last row's shares in one step from the dense model, with as many epochs as all rows together."""
    last = rows[-1]
    return Row(
        iteration=1,
        dense=last.dense,
        mid_2_4=last.mid_2_4,
        topk=last.topk,
        epochs=sum(row.epochs for row in rows),
        dense_to_2_4=_as_text(1 - Decimal(last.dense)),
        mid_2_4_to_topk=last.topk,
        distill=last.distill,
    )


def _read_cells(path: str | Path) -> list[dict[str, str]]:
    """Each row as column -> stripped text; blank lines are skipped."""
    try:
        # utf-8-sig: spreadsheets put a byte order mark before the first column's name.
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [[cell.strip() for cell in line] for line in csv.reader(file) if any(map(str.strip, line))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"schedule {path}: {reason}; name a CSV file with the columns {', '.join(REQUIRED)}") from None
    header = lines[0] if lines else []
    _check_header(path, header)
    for number, line in enumerate(lines[1:], start=1):
        if len(line) != len(header):
            raise UserError(f"{path}, row {number}: found {len(line)} cells under {len(header)} columns; give one each")
    return [dict(zip(header, line, strict=True)) for line in lines[1:]]


def _check_header(path: str | Path, header: list[str]) -> None:
    known = (*REQUIRED, *STEP_COLUMNS, "distill")
    for column in header:
        if column not in known:
            near = difflib.get_close_matches(column, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"the columns are {', '.join(known)}"
            raise UserError(f"{path}: unknown column {column!r}; {hint}")
        if header.count(column) > 1:
            raise UserError(f"{path}: column {column} stands twice; keep one")
    for column in REQUIRED:
        if column not in header:
            raise UserError(f"{path}: column {column} is missing; the header needs {', '.join(REQUIRED)}")


def _read_row(where: str, number: int, cells: dict[str, str], before: Row | None) -> Row:
    iteration = _whole_number(where, "iteration", cells)
    if iteration != number:
        raise UserError(f"{where}, column iteration: found {iteration}; number the rows 1, 2, 3 ... without gaps")
    dense, mid_2_4, topk = (_share(where, column, cells) for column in SHARES)
    if abs(dense + mid_2_4 + topk - 1) > TOLERANCE:
        total = _as_text(dense + mid_2_4 + topk)
        raise UserError(f"{where}, columns {', '.join(SHARES)}: found a sum of {total}; the three shares must sum to 1")
    dense_before = Decimal(before.dense) if before else Decimal(1)
    topk_before = Decimal(before.topk) if before else Decimal(0)
    if dense > dense_before:
        raise UserError(f"{where}, column dense: found {dense} after {dense_before}; a block never goes up, lower it")
    if topk < topk_before:
        raise UserError(f"{where}, column topk: found {topk} after {topk_before}; a block never goes up, raise it")
    steps = dict(zip(STEP_COLUMNS, (dense_before - dense, topk - topk_before), strict=True))
    for column, step in steps.items():
        _check_step(where, column, cells, step)
    return Row(
        iteration=iteration,
        dense=_as_text(dense),
        mid_2_4=_as_text(mid_2_4),
        topk=_as_text(topk),
        epochs=_whole_number(where, "epochs", cells),
        distill=_distill(where, cells),
        **{column: _as_text(step) for column, step in steps.items()},
    )


def _whole_number(where: str, column: str, cells: dict[str, str]) -> int:
    if not re.fullmatch(r"[0-9]+", cells[column]):
        raise UserError(f"{where}, column {column}: found {cells[column]!r}; write a whole number such as 2")
    return int(cells[column])


def _distill(where: str, cells: dict[str, str]) -> bool:
    found = cells.get("distill", "-").lower()
    if found not in DISTILL:
        raise UserError(f"{where}, column distill: found {found!r}; write yes or no")
    return DISTILL[found]


def _share(where: str, column: str, cells: dict[str, str]) -> Decimal:
    found = cells[column]
    if not re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", found) or Decimal(found) > 1:
        raise UserError(f"{where}, column {column}: found {found!r}; write a share from 0 to 1 such as 0.35")
    return Decimal(found)


def _check_step(where: str, column: str, cells: dict[str, str], derived: Decimal) -> None:
    """A step follows from the shares of this row and the one before; where it is written down it must agree."""
    if cells.get(column, "-") in ("", "-"):
        return
    if abs(_share(where, column, cells) - derived) > TOLERANCE:
        hint = f"the shares make it {_as_text(derived)}: write that, or - to have it derived"
        raise UserError(f"{where}, column {column}: found {cells[column]}; {hint}")


def _as_text(share: Decimal) -> str:
    """0.90 and 0.9 are one share: rewriting the file in another style must not rerun anything."""
    return format(share.normalize(), "f")
