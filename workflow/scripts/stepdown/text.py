"""Corpora by name or path as windows of tokens, split into train, valid and test; knows nothing of models.

A text is one of the names `pydoc`, `wikitext2`, `c4`; or a path, cut into 80 % train, 10 % valid and 10 % test by
characters (contiguous, between lines of a text file, between rows of `.jsonl` and `.parquet`); or a mapping of splits
to paths, each file used whole.
"""

import ast
import functools
import hashlib
import inspect
import itertools
import json
import os
import platform
import random
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .cli import collecting_no_garbage, log
from .errors import UserError
from .files import SURROGATE, check_is_text, check_not_pointer, distinct_names, kept_in_cache
from .splits import SPLITS, part_of, split_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = str | Mapping[str, str]

PIECE = 100_000
# Shares of pydoc's hashes at which valid and test begin.
_PYDOC_BOUNDS = (0.86, 0.93)


def parse_text(value: str) -> Text:
    """A command line's `--text`: a name or path as it is, or else the JSON of a mapping of splits to paths.

    Raises UserError for broken JSON, for a mapping of anything else and for a name that is not UTF-8.
    """
    check_is_text("text", value)
    if os.path.isfile(value) or not value.lstrip().startswith("{"):
        return value
    try:
        mapping = json.loads(value)
    except json.JSONDecodeError as error:
        raise UserError(f"text {value}: not JSON ({error}); write {_MAPPING_FORM}") from None
    _check_mapping(mapping)
    return mapping


def load_documents(text: Text, split: str) -> list[str]:
    """The documents of one split (train, valid or test), in a fixed order.

    A plain text file, or its part, is one document, unchanged; so is each row of another file, and each topic and each
    module of `pydoc`.
    Raises UserError, one line, for whatever of the text is missing, empty or unreadable.
    """
    documents = _documents(text, split)
    if not any(document.strip() for document in documents):
        raise UserError(f"text {label(text, split)}: its {split} split is empty; give a longer text or {_MAPPING_FORM}")
    return documents


def describe(text: Text, split: str) -> str:
    """What was read, in words for a protocol: never a folder, which would differ from machine to machine."""
    if not isinstance(text, str):
        return f"file {label(text, split)}, whole"
    if text in _ORIGINS:
        return f"{text} ({_ORIGINS[text](split)}), {split} split"
    return f"file {label(text, split)}, {split} part of 80/10/10 % of its characters"


def label(text: Text, split: str) -> str:
    """What to call a text in a figure or a message: its name, or that of the split's file."""
    return Path(_named(text, split)).name


def labels(texts: Sequence[Text], split: str) -> list[str]:
    """What to call each of several texts, no two alike; raises UserError for one that is named twice."""
    return distinct_names([_named(text, split) for text in texts])


def token_stream(documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> torch.Tensor:
    """All documents joined by blank lines and tokenised once, int64 `[tokens]`.

    This is the published WikiText-2 protocol: special tokens are the tokenizer's default, so Llama's `<s>` comes once.
    """
    return _tokenise("\n\n".join(documents), tokenizer)


def stream_in_pieces(documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> torch.Tensor:
    """`token_stream`, about `PIECE` characters at a time, cut at line ends: int64 `[tokens]`.

    At a cut a token or two may differ; calibration and training cannot tell, and a long text takes far less memory.
    """
    text = "\n\n".join(documents)
    streams, start = [], 0
    while start < len(text) or not streams:
        end = text.find("\n", start + PIECE) + 1 or len(text)
        streams.append(_tokenise(text[start:end], tokenizer, special_tokens=start == 0))
        start = end
    return torch.cat(streams)


def consecutive_windows(
    stream: torch.Tensor, length: int, limit: int | None = None, name: str = "the text"
) -> torch.Tensor:
    """The stream `[tokens]` cut into `[windows, length]`, the first `limit` of them; the remainder is dropped.

    Raises UserError, calling the stream by `name`, when it has fewer than `length` tokens.
    """
    count = len(stream) // length
    if count == 0:
        raise UserError(
            f"{name}: has {len(stream)} tokens, less than one window of {length}; use a longer text or shorter windows"
        )
    return stream[: count * length].view(count, length)[:limit]


def random_windows(
    documents: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    count: int,
    length: int,
    seed: int,
    within_document: bool,
    name: str = "the text",
) -> torch.Tensor:
    """A sample for calibration, int64 `[count, length]`, the same for the same seed.

    within_document: the published C4 protocol: documents are drawn until one has more than `length` tokens, then a
    start in it.
    Otherwise the published WikiText-2 protocol: draw starts in the stream of all documents.
    Raises UserError, calling the documents by `name`, when nothing has more than `length` tokens.
    """
    # `Random(seed)` draws what the published code's `random.seed(seed)` draws, and leaves the global state alone.
    draw = random.Random(seed)
    if within_document:
        streams = _long_documents(documents, tokenizer, length, draw, name)
    else:
        streams = itertools.repeat(stream_in_pieces(documents, tokenizer))
    windows = []
    for stream in itertools.islice(streams, count):
        if len(stream) <= length:
            raise UserError(
                f"{name}: has {len(stream)} tokens, windows of {length} need more; use a longer text or shorter windows"
            )
        start = draw.randint(0, len(stream) - length - 1)
        windows.append(stream[start : start + length])
    return torch.stack(windows)


def calibration_windows(
    text: Text, tokenizer: "PreTrainedTokenizerBase", count: int, length: int, seed: int
) -> torch.Tensor:
    """`random_windows` of the train split, `[count, length]`: within documents for `c4`, anywhere for other texts."""
    documents = load_documents(text, "train")
    name = f"text {label(text, 'train')}, train split"
    return random_windows(documents, tokenizer, count, length, seed, within_document=text == "c4", name=name)


def training_windows(
    text: Text, tokenizer: "PreTrainedTokenizerBase", split: str, length: int, count: int | None, seed: int
) -> torch.Tensor:
    """`[n, length]`: consecutive windows of a split in the order of the text.

    With `count`, a choice of so many by `seed`, or all where there are no more; shuffling is the training's business.
    """
    stream = stream_in_pieces(load_documents(text, split), tokenizer)
    windows = consecutive_windows(stream, length, name=f"text {label(text, split)}, {split} split")
    if count is None or count >= len(windows):
        return windows
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:count]
    return windows[chosen.sort().values]


def _long_documents(
    documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase", length: int, draw: random.Random, name: str
) -> Iterator[torch.Tensor]:
    """Streams of drawn documents of more than `length` tokens, without end, but for when there are none."""
    # Remembered, so that the search ends: the published code draws for ever when every document is too short.
    too_short: set[int] = set()
    while len(too_short) < len(documents):
        index = draw.randint(0, len(documents) - 1)
        if index not in too_short:
            stream = _tokenise(documents[index], tokenizer)
            if len(stream) > length:
                yield stream
            else:
                too_short.add(index)
    raise UserError(f"{name}: none of {len(documents)} documents has more than {length} tokens; use shorter windows")


def _tokenise(text: str, tokenizer: "PreTrainedTokenizerBase", special_tokens: bool = True) -> torch.Tensor:
    # Not verbose: that the text is longer than the model's context is the very reason for windows.
    encoded = tokenizer(
        text,
        add_special_tokens=special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    tokens = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    rows = getattr(tokenizer, "embedding_rows", float("inf"))
    if len(tokens) and tokens.max() >= rows:
        token = tokenizer.convert_ids_to_tokens(tokens.max().item())
        raise UserError(f"the text holds the token {token!r}, for which the embedding of {rows} rows has none")
    return tokens


# Where a text comes from

_MAPPING_FORM = '{"train": path, "valid": path, "test": path}'


def _documents(text: Text, split: str) -> list[str]:
    if isinstance(text, str):
        return _SOURCES[text](split) if text in _SOURCES else _file_documents(text, split)
    _check_mapping(text)
    return _file_documents(_named(text, split))


def _named(text: Text, split: str) -> str:
    """The corpus, or the path of the file, that a split is read from."""
    if not isinstance(text, str) and split not in text:
        raise UserError(f"text: its mapping has no {split}, only {', '.join(text)}; write {_MAPPING_FORM}")
    return text if isinstance(text, str) else text[split]


def _check_mapping(mapping: Mapping) -> None:
    for split, path in mapping.items():
        if split not in SPLITS or not isinstance(path, str):
            raise UserError(f"text: {split!r}: {path!r} is not a split and its path; write {_MAPPING_FORM}")


# Files


def _file_documents(path: str, split: str | None = None) -> list[str]:
    """The documents of a split of a file, or of the whole file."""
    pieces, of_one_document = _pieces(path)
    if split is not None:
        pieces = part_of(pieces, split)
    return ["".join(pieces)] if of_one_document else pieces


def _pieces(path: str) -> tuple[list[str], bool]:
    """What a file may be cut into; and whether the pieces are lines, of one document, or rows, documents themselves."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"text {path}: no such file; give a path or, as the whole text, one of {', '.join(_SOURCES)}")
    check_not_pointer(file)
    if file.suffix == ".jsonl":
        return _jsonl_rows(file), False
    if file.suffix == ".parquet":
        return _parquet_rows(file), False
    if file.suffix in _PLAIN:
        return _decode(file).splitlines(keepends=True), True
    raise UserError(f"text {path}: unknown ending {file.suffix!r}; known are .jsonl, .parquet, {', '.join(_PLAIN)}")


_PLAIN = (".txt", ".tokens", ".md")


def _decode(file: Path) -> str:
    """The text as it is, line ends included; a byte order mark is not text."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"text {file}: not UTF-8 at byte {error.start}; convert it to UTF-8") from None


def _jsonl_rows(file: Path) -> list[str]:
    rows = []
    # Not splitlines: JSON strings may hold characters it takes for line ends.
    for number, line in enumerate(_decode(file).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"text {file}: row {number} is not JSON: {error}") from None
            rows.append(_text_of(row if isinstance(row, dict) else {}, file, number))
    replaced = [SURROGATE.subn("\ufffd", row) for row in rows]
    if count := sum(number for _, number in replaced):
        log.warning("text %s: %d lone surrogates are no characters; each is read as U+FFFD", file, count)
    return [row for row, _ in replaced]


def _parquet_rows(file: Path) -> list[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        if (names := table.schema_arrow.names).count("text") != 1:
            raise UserError(f"text {file}: no single column 'text', only {', '.join(names):.90}; rename what holds it")
        values = table.read(columns=["text"])["text"].to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"text {file}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
    return [_text_of({"text": value}, file, number) for number, value in enumerate(values, start=1)]


def _text_of(row: dict, file: Path, number: int) -> str:
    if not isinstance(text := row.get("text"), str):
        raise UserError(f"text {file}: row {number}: no string under 'text' (keys: {', '.join(row):.90}); mend the row")
    return text


# The Hugging Face hub


def _wikitext2(split: str) -> list[str]:
    """Every row, empty ones too: the published perplexities join them all."""
    hub_split = {"train": "train", "valid": "validation", "test": "test"}[split]
    return _hub_rows("wikitext2", None, "Salesforce/wikitext", "wikitext-2-raw-v1", split=hub_split)


# Of C4's first files: (hub split, file, first document, end). All 356,317 of the train file would fill the memory
# with text few runs train on; valid and test are as long as the published evaluation's first 1,100 documents.
_C4 = {
    "train": ("train", "en/c4-train.00000-of-01024.json.gz", 0, 20_000),
    "valid": ("validation", "en/c4-validation.00000-of-00008.json.gz", 0, 1_100),
    "test": ("validation", "en/c4-validation.00000-of-00008.json.gz", 1_100, 2_200),
}


def _c4(split: str) -> list[str]:
    hub_split, file, first, end = _C4[split]
    rows = slice(first, end)
    return _hub_rows("c4", rows, "allenai/c4", data_files={hub_split: file}, split=hub_split, streaming=True)


def _c4_origin(split: str) -> str:
    _, file, first, end = _C4[split]
    return f"allenai/c4, {file}, documents {first + 1} to {end}"


def _hub_rows(name: str, rows: slice | None, *dataset: str, **options: object) -> list[str]:
    """The column `text` of a data set of the hub, or of some of its rows."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"text {name}: needs the package datasets; pip install datasets, or give a path") from None
    try:
        # Its bars would be drawn over ours.
        datasets.disable_progress_bars()
        data = datasets.load_dataset(*dataset, **options)
        selected = data if rows is None else itertools.islice(data, rows.start, rows.stop)
        return [row["text"] for row in selected]
    # The hub fails with exceptions of half a dozen libraries, and a user can do the same about all of them.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"text {name}: cannot load {dataset[0]} from the hub ({reason}); check the network, or give a path"
        ) from error


# pydoc: the interpreter's own documentation

# Test suites and tables are code, not English; the rest is not part of the standard library proper.
_NOT_DOCUMENTATION = {"test", "tests", "idle_test", "idlelib", "encodings", "pydoc_data"}
_NOT_DOCUMENTATION |= {"site-packages", "dist-packages", "__pycache__"}
# Shorter paragraphs ("Notes:", "Return a string.") repeat honestly; dropping them would leave holes.
_LONG_PARAGRAPH = 60


@functools.cache
def _pydoc_splits() -> dict[str, list[str]]:
    """The documentation's documents by split, in the order of their names; to parse it takes two seconds, once."""
    sources = [Path(__file__), *sorted(_sources(Path(sysconfig.get_path("stdlib"))))]
    versions = json.dumps([platform.python_version(), _topics()]).encode()
    return kept_in_cache("pydoc", [versions, *(path.read_bytes() for path in sources)], _parse_pydoc)


def _parse_pydoc() -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name, text in _without_repetition([*_topics(), *_docstrings()]):
        splits[_pydoc_split(name)].append(text)
    return splits


def _pydoc_split(name: str) -> str:
    """The split of a document by a hash of its name: the same in every run and on every machine."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    return split_at(place / 100, _PYDOC_BOUNDS)


def _topics() -> list[tuple[str, str]]:
    """The language reference as `help()` shows it: (name, text) of each topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(f"text pydoc: {sys.executable} lacks pydoc_data; use a full Python or another text") from None
    return [(f"topic {name}", topics[name].strip()) for name in sorted(topics)]


def _docstrings() -> list[tuple[str, str]]:
    """(name, docstrings joined by blank lines) of each standard module; sources are parsed, nothing is imported."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(_sources(root)):
        parts = path.relative_to(root).with_suffix("").parts
        if text := "\n\n".join(_docstrings_of(_parse(path))):
            documents.append((f"module {'.'.join(parts)}", text))
    return documents


@collecting_no_garbage()
def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings(action="ignore"):
        return ast.parse(path.read_bytes())


def _sources(root: Path) -> Iterator[Path]:
    """The standard library's own files; what distributions add (sitecustomize, _sysconfigdata) differs by machine."""
    for entry in root.iterdir():
        if entry.stem in sys.stdlib_module_names and entry.stem not in _NOT_DOCUMENTATION:
            for path in entry.rglob("*.py") if entry.is_dir() else [entry]:
                if path.suffix == ".py" and _NOT_DOCUMENTATION.isdisjoint(path.relative_to(root).with_suffix("").parts):
                    yield path


def _docstrings_of(node: ast.AST) -> Iterator[str]:
    """Cleaned docstrings in source order; only statements are visited, as most of a tree is expressions."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
        if docstring:
            yield docstring
    for block in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, block, ()):
            if isinstance(child, ast.stmt | ast.ExceptHandler):
                yield from _docstrings_of(child)


def _without_repetition(documents: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Each long paragraph once: topics quote one another at length, and a test quoted in training is no test."""
    seen: set[str] = set()
    for name, text in documents:
        paragraphs = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) < _LONG_PARAGRAPH or key not in seen:
                paragraphs.append(paragraph)
            seen.add(key)
        if kept := "\n\n".join(paragraphs).strip():
            yield name, kept


_SOURCES: dict[str, Callable[[str], list[str]]] = {
    "pydoc": lambda split: list(_pydoc_splits()[split]),
    "wikitext2": _wikitext2,
    "c4": _c4,
}
_ORIGINS: dict[str, Callable[[str], str]] = {
    "pydoc": lambda split: f"documentation of Python {platform.python_version()}",
    "wikitext2": lambda split: "Salesforce/wikitext, wikitext-2-raw-v1",
    "c4": _c4_origin,
}
