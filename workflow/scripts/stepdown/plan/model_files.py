"""What the files of a model's folder tell without being loaded: that they are whole, and of one model. Standard library
only."""

import math
import re
import zipfile
from pathlib import Path

from ..errors import UserError
from ..files import (
    PICKLES,
    PICKLES_INDEX,
    check_not_pointer,
    has_only_pickles,
    names_in_index,
    read_json_object,
    safetensors_header,
    text_config,
    weight_files,
)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "special_tokens_map.json")


def check_model(folder: Path) -> None:
    """A folder in Hugging Face form: config.json, a tokenizer, and weights that are all there to the last byte."""
    check_weights(folder)
    if not has_tokenizer(folder):
        raise UserError(f"{folder}: no tokenizer ({', '.join(TOKENIZER_FILES)}); copy it beside config.json")
    check_tokenizer(folder)


def check_weights(folder: Path) -> None:
    """config.json, and weights that are all there to the last byte, each number by itself."""
    for file in sorted(folder.iterdir()):
        if file.is_file():
            check_not_pointer(file)
    if (folder / "config.json").is_file():
        _check_not_quantised(folder)
    if has_only_pickles(folder):
        named = names_in_index(folder / PICKLES_INDEX)
        for file in [folder / name for name in named] or folder.glob(PICKLES):
            check_pickle(file)
    else:
        for file in weight_files(folder):
            safetensors_header(file)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: holds an adapter (adapter_config.json); merge it into the model, or move it away")
    read_json_object(folder / "config.json")


def _check_not_quantised(folder: Path) -> None:
    config = read_json_object(folder / "config.json")
    if config.get("quantization_config") or text_config(config).get("quantization_config"):
        raise UserError(
            f"{folder}: quantised or packed already (quantization_config in config.json); give the model before that"
        )


def check_pickle(file: Path) -> None:
    """Pickled weights are for the first job to convert; what torch saves now is a zip archive, whose end tells it is
    whole."""
    if not file.is_file():
        raise UserError(f"{file.parent}: {file.name}, named in {PICKLES_INDEX}, is missing; copy it too")
    with file.open("rb") as opened:
        start = opened.read(2)
    if not start or (start == b"PK" and not zipfile.is_zipfile(file)):
        raise UserError(f"{file}: truncated ({file.stat().st_size} bytes); copy or download it again")
    if start not in (b"PK", b"\x80\x02"):
        raise UserError(f"{file}: no pickled weights as torch saves them; copy or download it again")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def check_tokenizer(folder: Path) -> None:
    """The files of a tokenizer hold what their names say, and no more tokens than the embedding has rows."""
    found = {name: read_json_object(folder / name) for name in TOKENIZER_JSON if (folder / name).is_file()}
    if "tokenizer.json" in found and not isinstance(found["tokenizer.json"].get("model"), dict):
        raise UserError(f"{folder / 'tokenizer.json'}: describes no tokenizer (no key 'model'); copy it again")
    alone = not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "merges.txt"))
    if "vocab.json" in found and alone and not any(folder.glob("*.py")):
        raise UserError(f"{folder}: vocab.json without merges.txt, which belongs to it; copy it beside config.json")
    file = next((folder / name for name in ("tokenizer.json", "vocab.json") if name in found), None)
    if file and not has_only_pickles(folder) and (tokens := _ordinary_tokens(file)) > (rows := _most_rows(folder)):
        raise UserError(
            f"{folder}: {file.name} has {tokens} tokens, the embedding {rows} rows; take both from the same model"
        )


def _ordinary_tokens(file: Path) -> int:
    """How many rows the tokens of a tokenizer.json or vocab.json ask for, but for special ones: some models are
    published with one that no text holds and no row is there for."""
    content, added = read_json_object(file), []
    if file.name == "tokenizer.json":
        content, added = content["model"].get("vocab"), content.get("added_tokens") or []
    if not isinstance(content, dict | list | None) or not isinstance(added, list):
        raise UserError(f"{file}: its tokens are no list; copy it again")
    found = range(len(content)) if isinstance(content, list) else content.values() if content else ()
    numbers = {number for number in found if isinstance(number, int)}
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("id"), int):
            raise UserError(f"{file}: an added token without a number (id); copy it again")
        (numbers.discard if token.get("special") else numbers.add)(token["id"])
    return 1 + max(numbers, default=-1)


def _most_rows(folder: Path) -> float:
    """The most rows of a matrix outside the numbered layers, where embedding and head are."""
    headers = [safetensors_header(file)[0] for file in weight_files(folder)]
    outside = [entry for header in headers for name, entry in header.items() if not re.search(r"\.\d+\.|^__", name)]
    return max((entry["shape"][0] for entry in outside if len(entry["shape"]) == 2), default=math.inf)
