"""Where a text in one file is cut into train, valid and test; standard library only, since that is checked before the
first job too."""

import itertools

SPLITS = ("train", "valid", "test")
# Shares of a file's characters at which valid and test begin.
FILE_BOUNDS = (0.8, 0.9)


def part_of(pieces: list[str], split: str) -> list[str]:
    """The pieces, lines or rows, that begin inside the split's share of all characters."""
    total = max(1, sum(map(len, pieces)))
    starts = itertools.accumulate(map(len, pieces), initial=0)
    # One start more than pieces: the end of the last.
    return [piece for piece, start in zip(pieces, starts, strict=False) if split_at(start / total) == split]


def split_at(place: float, bounds: tuple[float, float] = FILE_BOUNDS) -> str:
    """The split at a place in [0, 1]."""
    return SPLITS[sum(place >= bound for bound in bounds)]
