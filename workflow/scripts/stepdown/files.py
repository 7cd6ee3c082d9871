"""Files that are written whole or not at all, and model folders looked at from outside. Standard library only."""

import json
import os
from pathlib import Path

from .errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAME = "model.safetensors"


def atomic_write(path: Path | str, text: str) -> None:
    """Write `text` under a temporary name and rename it, so that nobody ever sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def usual_mode() -> int:
    """The permissions a new file of this user has; safetensors would give its files to their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_json(path: Path | str, content: object) -> None:
    """Write JSON as people read it, atomically; keys stay in the order given."""
    atomic_write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def weight_files(folder: Path | str) -> list[Path]:
    """The safetensors files a checkpoint folder says it consists of.

    Raises `UserError` when the folder, its config, its weights or one file named by its index is missing.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        found = "has no config.json" if folder.is_dir() else "is not a folder"
        raise UserError(f"{folder}: {found}; give the folder of a Hugging Face model")
    index = folder / INDEX_NAME
    if index.is_file():
        names = sorted(set(_read_index(index)["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder}: {missing[0]}, named in {INDEX_NAME}, is missing; copy or download the model again"
            )
        return [folder / name for name in names]
    if (folder / SINGLE_FILE_NAME).is_file():
        return [folder / SINGLE_FILE_NAME]
    raise UserError(f"{folder}: no weights found; expected {SINGLE_FILE_NAME} or {INDEX_NAME} with the files it names")


def safetensors_header(file: Path) -> tuple[dict, int]:
    """The header of a safetensors file and where its data start.

    Raises `UserError` when the file is no such file or not as long as its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(
                f"{file}: truncated ({size} bytes, not even its header is whole); copy or download it again"
            )
        try:
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{file}: not a safetensors file (its header is unreadable); copy or download it again"
            ) from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise UserError(f"{file}: truncated or damaged ({size} bytes, {expected} expected); copy or download it again")
    return header, 8 + length


def check_length(where: str, sequence_length: int, folder: Path) -> None:
    """A sequence must not be longer than the positions the model was trained on."""
    config = read_json_object(folder / "config.json")
    text_config = config.get("text_config")
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        for name in ("max_position_embeddings", "n_positions"):
            if isinstance(part.get(name), int) and sequence_length > part[name]:
                raise UserError(f"{where}: found {sequence_length}; {folder} allows at most {part[name]} ({name})")


def read_json_object(path: Path) -> dict:
    """The JSON object in a file of a model folder; `UserError` where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a model folder in Hugging Face form") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); copy the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}, not an object of keys; copy the model again")
    return content


def _read_index(path: Path) -> dict:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(index["weight_map"], dict)
        return index
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"{path}: not a readable index of weights; copy or download it again") from None
