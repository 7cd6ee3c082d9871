"""Numbers and words in columns, as people read them."""

import pandas as pd


def cells(name: str, values: pd.Series, form: str = "{:.2f}", limit: float = 100_000) -> pd.Series:
    """Numbers as text, nothing where there is none; from `limit` on in three digits."""
    shown = values.astype(object).dropna().map(lambda value: (form if abs(value) < limit else "{:.3g}").format(value))
    return shown.reindex(values.index, fill_value="").rename(name)


def flush_left(words: pd.Series) -> pd.Series:
    """Words and their name, padded to begin where the column does."""
    width = max(len(words.name), words.str.len().max())
    return words.str.ljust(width).rename(words.name.ljust(width))


def aligned(columns: list[pd.Series], gap: str = "  ") -> pd.Series:
    """The lines of a table: the names of the columns, then the rows; each column flush right."""
    cells = [pd.Series([column.name, *column]) for column in columns]
    first, *others = (column.str.rjust(column.str.len().max()) for column in cells)
    return first.str.cat(others, sep=gap)


def under_headings(blocks: dict[str, list[pd.Series]]) -> pd.Series:
    """The lines of a table whose columns stand in groups, each under its heading; the first group is flush left."""
    first, *others = ((heading, aligned(columns, " ")) for heading, columns in blocks.items())
    groups = [flush_left(first[1].rename(first[0]))]
    for heading, lines in others:
        width = max(len(heading), lines.str.len().max())
        groups.append(lines.str.rjust(width).rename(heading.center(width)))
    return aligned(groups)
