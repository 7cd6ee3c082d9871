"""What the things a rule uses hold, as a hash each: code, models, texts, tasks. Dates never count. Standard library
only."""

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from .preflight import local_files, text_files


def code_hash(folder: Path, script: str) -> str:
    """Hash of a script in `folder` and of the modules beside it that it imports, as parsed: comments do not count."""
    dumps = [f"{path.relative_to(folder)} {_parsed(path)[0]}" for path in code_files(folder, script)]
    return hashlib.sha256("\n".join(dumps).encode()).hexdigest()[:16]


def code_files(folder: Path, script: str) -> list[Path]:
    """A script in `folder` and the files beside it or below that it imports, directly or not, in order."""
    found, waiting = set(), [folder / script]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += imported_files(folder, path)
    return sorted(found)


@cache
def imported_files(folder: Path, path: Path) -> list[Path]:
    """The files below `folder` that the import statements of one of them name, packages on the way included."""
    names = imported_names(folder, path)
    modules = {folder.joinpath(*name[:end]) for name in names for end in range(1, len(name) + 1)}
    candidates = {file for module in modules for file in (module.with_suffix(".py"), module / "__init__.py")}
    return [file for file in candidates if file.is_file()]


def imported_names(folder: Path, path: Path) -> set[tuple[str, ...]]:
    """What the import statements of a file below `folder` name, in parts from the top: ("stepdown", "files")."""
    package = path.parent.relative_to(folder).parts
    names = set()
    for node in ast.walk(_parsed(path)[1]):
        if isinstance(node, ast.Import):
            names.update(tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            start += tuple(node.module.split(".")) if node.module else ()
            names.update({start, *((*start, alias.name) for alias in node.names)})
    return names


@cache
def _parsed(path: Path) -> tuple[str, ast.Module]:
    """The syntax tree of a file, and its hash."""
    tree = ast.parse(path.read_bytes())
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), tree


@cache
def fingerprint(path: Path) -> str:
    """Size and hash of a file: of a large one, the hash of 256 pieces of 64 KiB spread evenly over it."""
    piece, pieces = 1 << 16, 256
    size = path.stat().st_size
    step = max(piece, size // pieces)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(piece))
    return f"{size} {digest.hexdigest()[:16]}"


def model_fingerprint(model: str) -> list[str]:
    """What the files of a local model hold; a hub id and its revision say it themselves."""
    return [f"{path.name} {fingerprint(path)}" for path in local_files(model)]


def text_fingerprint(texts: Iterable[str | dict], splits: tuple[str, ...]) -> list[str]:
    """What the local files hold that these splits of the texts are read from."""
    return [fingerprint(path) for text in texts for path in text_files(text, splits)]


def folder_fingerprint(folder: str | None) -> list[str]:
    """What the files in a folder hold, at any depth; of no folder, nothing."""
    return [fingerprint(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()] if folder else []
