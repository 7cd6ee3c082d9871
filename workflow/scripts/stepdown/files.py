"""Files that are written whole or not at all, and files of others looked at from outside. Standard library only."""

import errno
import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType

from .errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAME = "model.safetensors"
PICKLES = "pytorch_model*.bin"
PICKLES_INDEX = "pytorch_model.bin.index.json"
# What config.json calls the number of positions.
POSITIONS = ("max_position_embeddings", "n_positions")
# Half a character: JSON can write it (`\ud83d`), no encoding can, and no tokenizer takes it.
SURROGATE = re.compile("[\ud800-\udfff]")
GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What JSON has to be like: of a type, the very text, a list of a form, or an object with a form under each key; under
# `str` that of all its other keys, of which one at least there has to be where no key is named.
Form = type | UnionType | str | list | dict
NUMBER = int | float


@contextmanager
def written_whole(path: Path | str) -> Iterator[Path]:
    """A temporary name to write a file under, which has its own at the end: nobody ever sees half of it, and nothing is
    left of it on an error. Raises `UserError` where a folder has the name, and on a full disk."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UserError(f"{path}: could not be written ({error.strerror}); is the disk full?") from None
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: Path | str, text: str) -> None:
    """Write `text` to a file, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path | str, content: object) -> None:
    """Write JSON as people read it, atomically; keys stay in the order given."""
    atomic_write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def cache_folder() -> Path | None:
    """Where what takes time to make is kept: below $XDG_CACHE_HOME or ~/.cache; None where neither can be."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepdown"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # read-only, or a user without a home
        return None
    return folder if os.access(folder, os.W_OK) else None


def kept_in_cache(name: str, made_of: Iterable[bytes], make: Callable[[], object]) -> object:
    """What `make` returns, kept as JSON in the cache for as long as it would be made of the same bytes."""
    folder = cache_folder()
    if folder is None:
        return make()
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in made_of))
    file = folder / f"{name}-{digest.hexdigest()[:16]}.json"
    # Not there yet, or another job is writing it.
    with suppress(OSError, ValueError):
        return json.loads(file.read_text(encoding="utf-8"))
    made = make()
    with suppress(OSError):
        atomic_write(file, json.dumps(made))
    return made


def weight_files(folder: Path | str) -> list[Path]:
    """The safetensors files a checkpoint folder says it consists of.

    Raises `UserError` when the folder, its config, its weights or one file named by its index is missing, and when it
    says two things.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        found = "has no config.json" if folder.is_dir() else "is not a folder"
        raise UserError(f"{folder}: {found}; give the folder of a Hugging Face model")
    single, names = (folder / SINGLE_FILE_NAME).is_file(), names_in_index(folder / INDEX_NAME)
    if not names:
        if single:
            return [folder / SINGLE_FILE_NAME]
        raise UserError(
            f"{folder}: no weights found; expected {SINGLE_FILE_NAME} or {INDEX_NAME} with the files it names"
        )
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: {name}, named in {INDEX_NAME}, is missing; copy or download the model again, or, where a"
                f" run made it, delete {INDEX_NAME} and run again"
            )
    if single and SINGLE_FILE_NAME not in names:
        raise UserError(
            f"{folder}: has {SINGLE_FILE_NAME}, and {INDEX_NAME} that names {names[0]} instead; remove one of the two"
        )
    return [folder / name for name in names]


def names_in_index(path: Path) -> list[str]:
    """The files an index says the weights are in; none where there is no index."""
    if not path.is_file():
        return []
    names = read_json_object(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{path}: not a readable index of weights; copy or download it again")
    for name in set(names.values()):
        if name != Path(name).name:
            raise UserError(f"{path}: names {name!r}; put every file of the weights beside config.json")
    return sorted(set(names.values()))


def has_only_pickles(folder: Path) -> bool:
    """Whether the weights of a folder are pickled ones, without any in safetensors."""
    return not any((folder / name).is_file() for name in (SINGLE_FILE_NAME, INDEX_NAME)) and any(folder.glob(PICKLES))


def safetensors_header(file: Path) -> tuple[dict, int]:
    """The header of a safetensors file and where its data start.

    Raises `UserError` when the file is no such file or not as long as its header says.
    """
    check_not_pointer(file)
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(
                f"{file}: truncated ({size} bytes, not even its header is whole); copy or download it again"
            )
        try:
            header = json.loads(opened.read(length))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            ends = [int(entry["data_offsets"][1]) for entry in entries]
            assert all(entry["dtype"] and min(entry["shape"], default=0) >= 0 for entry in entries)
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError, OverflowError):
            raise UserError(
                f"{file}: not a safetensors file (its header is unreadable); copy or download it again"
            ) from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise UserError(f"{file}: truncated or damaged ({size} bytes, {expected} expected); copy or download it again")
    return header, 8 + length


def check_not_pointer(file: Path) -> None:
    """A pointer of git-lfs stands for a file that was never fetched."""
    with file.open("rb") as opened:
        if opened.read(len(GIT_LFS_POINTER)) == GIT_LFS_POINTER:
            raise UserError(f"{file}: only a pointer of git-lfs, not the file itself; run git lfs pull")


def check_is_text(where: str, name: str) -> None:
    """The name of a file may be any bytes; what stands in a result is UTF-8."""
    if SURROGATE.search(name):
        raise UserError(f"{where}: found {name!r}, which is not UTF-8 and stands in no result; rename it")


def distinct_names(paths: Sequence[str]) -> list[str]:
    """What to call each of several files: its name, or, where others have the same, as much of its path as tells them
    apart. Raises `UserError` for a file that is named twice."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    same_name = defaultdict(set)
    for path, own in zip(paths, parts, strict=True):
        if own in same_name[own[-1]]:
            raise UserError(f"{path}: named twice; name each text once")
        same_name[own[-1]].add(own)

    def tail(own: tuple[str, ...]) -> str:
        others = same_name[own[-1]]
        return next(
            str(Path(*own[-count:]))
            for count in range(1, len(own) + 1)
            if len({other[-count:] for other in others}) == len(others)
        )

    return [tail(own) for own in parts]


def check_length(where: str, sequence_length: int, folder: Path) -> None:
    """A sequence must not be longer than the positions the model was trained on."""
    for name, most in _positions(folder):
        if sequence_length > most:
            raise UserError(f"{where}: found {sequence_length}; {folder} allows at most {most} ({name})")


def fitting(prompt: int, more: int, folder: Path) -> tuple[int, int]:
    """How many tokens of a prompt, and how many more after it, a model has positions for; one of each at least."""
    most = min([prompt + more, *(most for _, most in _positions(folder))])
    more = max(1, min(more, most - 1))
    return max(1, min(prompt, most - more)), more


def _positions(folder: Path) -> list[tuple[str, int]]:
    config = read_json_object(folder / "config.json")
    parts = ((name, part.get(name)) for part in (config, text_config(config)) for name in POSITIONS)
    return [(name, most) for name, most in parts if isinstance(most, int)]


def text_config(config: dict) -> dict:
    """Of a config.json what describes the part that reads and writes: of a model that also sees, a section of it."""
    section = config.get("text_config")
    return section if isinstance(section, dict) and section else config


def read_json_object(path: Path) -> dict:
    """The JSON object in a file of a model folder; `UserError` where there is none."""
    try:
        check_not_pointer(path)
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a model folder in Hugging Face form") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); copy the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}, not an object of keys; copy the model again")
    return content


def read_result(path: Path, kind: str, form: Form) -> dict:
    """The JSON that another script wrote; `UserError` where it is not of its kind, which has this form."""
    try:
        # What is not even a number, of a model that broke, is beyond all numbers.
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: math.inf)
    except (ValueError, RecursionError) as error:
        raise _not_a(kind, path, f"no JSON ({error})") from None
    check_form(content, path, kind, form)
    return content


def check_form(content: object, path: Path, kind: str, form: Form) -> None:
    """Raise `UserError` for the first key of a file's content that is missing or has another value than its form."""
    for fault in _misfits(content, form):
        raise _not_a(kind, path, fault)


def _not_a(kind: str, path: Path, fault: str) -> UserError:
    return UserError(f"{path}: not {kind}: {fault}; name another file, or delete it and run again")


def _misfits(value: object, form: Form, key: str = "") -> Iterator[str]:
    """What of a value is not as its form has it, in words."""
    if isinstance(form, str):
        if value != form:
            yield f"{_told(key, value)}, not {json.dumps(form, ensure_ascii=False)}"
    elif isinstance(value, bool) or not isinstance(value, type(form) if isinstance(form, dict | list) else form):
        yield _told(key, value)
    elif isinstance(form, list):
        for place, item in enumerate(value):
            yield from _misfits(item, form[0], f"{key}[{place}]")
    elif isinstance(form, dict):
        yield from _misfits_of_keys(value, form, key)


def _misfits_of_keys(value: dict, form: dict, key: str) -> Iterator[str]:
    named = [name for name in form if name is not str]
    others = [name for name in value if name not in named] if str in form else []
    if not named and not others:
        yield _told(key, value)
    for name in named + others:
        inner = f"{key}.{name}" if key else name
        if name in value:
            yield from _misfits(value[name], form.get(name, form.get(str)), inner)
        else:
            yield f"key {inner} is missing"


def _told(key: str, value: object) -> str:
    return f"{f'key {key}' if key else 'all of it'} is {json.dumps(value, ensure_ascii=False):.60}"


def _constant(name: str) -> float:
    """Some families are published with a bound of Infinity; nothing is computed with what is not a number."""
    if name == "NaN":
        raise ValueError("a value in it is NaN")
    return float(name)
