"""What can be checked before the first job: the configuration, the model's folder, the texts. Standard library only,
but for `complete_config`, which Snakemake's own environment runs."""

import codecs
import difflib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..files import (
    check_is_text,
    check_length,
    check_not_pointer,
    distinct_names,
    safetensors_header,
    weight_files,
)
from ..splits import part_of
from .block_size import check_block
from .gguf_header import is_gguf, read_gguf_header
from .gpus import memory_of_gpus, visible_gpus
from .model_files import check_model
from .training_memory import TrainingPlan, check_memory, read_model_size

CORPORA = ("pydoc", "wikitext2", "c4")
TEXT_ENDINGS = (".txt", ".tokens", ".md", ".jsonl", ".parquet")
# The splits each section of the configuration reads of its text.
SPLITS_READ = {"calibration": ("train",), "recovery": ("train", "valid"), "evaluation": ("test",)}

# What a Parquet file begins and ends with; and how much of another text is looked at.
PARQUET, BEGINNING = b"PAR1", 1 << 16
# A text of fewer lines than these, or of fewer bytes a token of a sequence, may leave a tenth of it too short.
FEW_LINES, FEW_BYTES = 100, 20

PACKED_BLOCK_SIZE = 16

# The JSON Schema of the configuration, for people.
TYPE_WORDS = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "a section of keys",
}
BOUND_WORDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "multipleOf": "a multiple of {}",
    "minItems": "at least {} of them",
    "uniqueItems": "each item once",
}


# --- the configuration: keys, types, defaults ------------------------------------------------------------------------


def complete_config(config: dict, schema: dict) -> dict:
    """A copy of the configuration in the schema's order with its defaults filled in.

    Raises `UserError` for an unknown key, a wrong type, or a value out of bounds.
    """
    return _complete(config, schema, schema.get("$defs", {}), "")


def _complete(value: object, schema: dict, definitions: dict, key: str) -> object:
    schema = _resolve(schema, definitions) | {"$defs": definitions}
    value = _read(value, schema)
    if isinstance(value, dict) and "properties" in schema:
        return dict(_complete_section(value, schema["properties"], definitions, key))
    if isinstance(value, dict) and isinstance(schema.get("additionalProperties"), dict):
        items = schema["additionalProperties"]
        value = {name: _complete(item, items, definitions, _join(key, name)) for name, item in value.items()}
    if isinstance(value, list) and "items" in schema:
        value = [_complete(item, schema["items"], definitions, key) for item in value]
    return _checked(value, schema, key)


def _read(value: object, schema: dict) -> object:
    """The value as the schema's type: `--config 'pruning={k: 8}'` and `--config schedule=null` hand over text, which
    YAML reads as a number and as nothing."""
    import yaml
    from jsonschema import Draft202012Validator

    is_valid = Draft202012Validator(schema).is_valid
    if not isinstance(value, str) or (is_valid(value) and not (value == "null" and is_valid(None))):
        return value
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    return read if is_valid(read) or isinstance(read, dict | list) else value


def _complete_section(section: dict, properties: dict, definitions: dict, key: str) -> Iterator[tuple[str, object]]:
    for name in section:
        if name not in properties:
            near = difflib.get_close_matches(str(name), properties, 1)
            hint = f"did you mean {near[0]}?" if near else f"the keys here are {', '.join(properties)}"
            raise UserError(f"config: unknown key {_join(key, name)}; {hint}")
    for name, schema in properties.items():
        schema = _resolve(schema, definitions)
        if name in section:
            yield name, _complete(section[name], schema, definitions, _join(key, name))
        elif "default" in schema:
            yield name, schema["default"]
        elif schema["type"] == "object":
            yield name, _complete({}, schema, definitions, _join(key, name))


def _checked(value: object, schema: dict, key: str) -> object:
    from jsonschema import Draft202012Validator

    if not Draft202012Validator(schema).is_valid(value) or (isinstance(value, float) and not math.isfinite(value)):
        found = "nothing" if value is None else repr(value)
        raise UserError(f"config key {key}: found {found}; write {_expected(value, schema)}")
    # To JSON Schema 128.0 is an integer, to a command line it is not.
    return int(value) if isinstance(value, float) and "integer" in schema.get("type", "") else value


def _expected(value: object, schema: dict) -> str:
    """What the schema asks for, in words."""
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if "number" in types and (number := re.fullmatch(r"([0-9.]+)e([+-]?[0-9]+)", str(value), re.IGNORECASE)):
        mantissa = number[1] if "." in number[1] else f"{number[1]}.0"
        return f"{mantissa}e{int(number[2]):+d} (to YAML {value} is text)"
    bounds = [words.format(schema[bound]) for bound, words in BOUND_WORDS.items() if bound in schema]
    asked = ", ".join([" or ".join(TYPE_WORDS[name] for name in types), *bounds])
    if "string" in types and not isinstance(value, str | list | dict | None):
        asked += " (a name that YAML reads otherwise, such as a number, is text as ./2024_10, or in quotes in a file)"
    return asked


def _resolve(schema: dict, definitions: dict) -> dict:
    if "$ref" not in schema:
        return schema
    return definitions[schema["$ref"].rpartition("/")[2]] | {name: schema[name] for name in schema if name != "$ref"}


def _join(section: str, name: object) -> str:
    return f"{section}.{name}" if section else str(name)


# --- what the configuration points at --------------------------------------------------------------------------------


def check_inputs(config: dict) -> None:
    """Model, texts and lengths of a complete configuration; `UserError` for what no job could work with."""
    check_block(**{key: config["pruning"][key] for key in ("block_size", "k")})
    if config["pruning"]["target"] is not None:
        check_target(config["pruning"])
    folder = local_model(config["model"])
    header = read_gguf_header(Path(config["model"])) if is_gguf(config["model"]) else None
    if folder:
        check_model(folder)
        if config["recovery"]["method"] == "lora" and any(folder.glob("*.safetensors")):
            check_adapter_targets(config["recovery"]["lora"]["targets"], folder)
    if config["recovery"]["sharded"] and config["recovery"]["processes"] == 1:
        raise UserError("config key recovery.sharded: found true with one process; raise recovery.processes")
    if config["recovery"]["memory"] == "low" and not config["recovery"]["bf16"]:
        raise UserError("config key recovery.memory: found low, which computes in bfloat16; set recovery.bf16: true")
    check_packed(config)
    tasks = config["zero_shot"]["task_folder"]
    if tasks:
        check_name("config key zero_shot.task_folder", tasks)
    if tasks and not Path(tasks).is_dir():
        raise UserError(f"config key zero_shot.task_folder: no folder {tasks}; give one with the tasks' YAML files")
    for file in Path(tasks).rglob("*") if tasks else []:
        if file.is_file():
            check_not_pointer(file)
    for section, splits in SPLITS_READ.items():
        options = config[section]
        length = options["sequence_length"]
        if folder:
            check_length(f"config key {section}.sequence_length", length, folder)
        if header and length > (header.context_length or length):
            told = f"{config['model']} allows at most {header.context_length}"
            raise UserError(f"config key {section}.sequence_length: found {length}; {told}")
        texts = options["texts"] if section == "evaluation" else [options["text"]]
        key = f"config key {section}.{'texts' if section == 'evaluation' else 'text'}"
        for text in texts:
            check_text(key, text, splits, length)
        if section == "evaluation":
            check_distinct(key, texts)


def check_writable(*folders: Path) -> None:
    """Folders that a run writes to, as far as they are there already."""
    for folder in folders:
        if folder.is_symlink() and not folder.exists():
            told = f"links to {os.readlink(folder)}, which is not there"
            raise UserError(f"{folder}: {told}; mount it or remove the link")
        if folder.is_file():
            raise UserError(f"{folder.resolve()}: is a file, where a run has a folder; rename it, or run elsewhere")
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{folder.resolve()}: no permission to write here; change it, or run in another folder")


def check_links(step: Path) -> None:
    """The base model's files may be links to the user's own: whatever was moved since, they must lead somewhere."""
    made = step / "tier_map.safetensors"
    for link in sorted((step / "model").glob("*")):
        if made.exists() and not link.exists():
            raise UserError(
                f"{link}: links to {os.readlink(link)}, which is not there; was the project or the model moved? "
                f"Delete {made}, and the model is linked anew"
            )


def check_target(pruning: dict) -> None:
    """A target goes by what blocks cost over the whole model, and no further than TopK everywhere."""
    key, target = "config key pruning.target", pruning["target"]
    if len(target) != 1:
        raise UserError(f"{key}: found {target}; write one of {{bytes: 0.5}} and {{sparsity: 0.6}}")
    for other, needed in (("cost", "fisher"), ("shared_over", "model")):
        if pruning[other] != needed:
            raise UserError(f"{key}: goes with pruning.{other}: {needed} only; found {pruning[other]}")
    size, k = pruning["block_size"], pruning["k"]
    if "bytes" in target and size != PACKED_BLOCK_SIZE:
        raise UserError(f"{key}: models are packed in blocks of {PACKED_BLOCK_SIZE}, found {size}; write a sparsity")
    # A TopK weight takes 3 bytes; one of a Dense block 2, the block's place in the tier map 1.
    least, most = (3 * k + 1) / (2 * size**2), 1 - k / size**2
    if target.get("bytes", 1) < least or target.get("sparsity", 0) > most:
        raise UserError(f"{key}: found {target}; TopK everywhere is {{bytes: {least:.3f}}}, {{sparsity: {most:.3f}}}")


def local_model(model: str) -> Path | None:
    """The folder a model is in, or None for a hub id and for a GGUF file."""
    check_name("config key model", model)
    path = Path(model)
    if is_gguf(model):
        return None
    if path.is_dir():
        return path
    # `resources/pydoc-lama` has the form of a hub id, but who has a folder `resources` means one in it.
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model) or ("/" in model and path.parent.is_dir()):
        raise UserError(f"config key model: no folder {model}; name a folder with config.json, a GGUF file or a hub id")
    return None


def local_files(model: str) -> list[Path]:
    """The local files that a model consists of; none for a hub id."""
    if is_gguf(model):
        return [Path(model)]
    folder = local_model(model)
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md") if folder else []


def check_adapter_targets(targets: str | list[str], folder: Path) -> None:
    """Each target ends the name of a matrix, as far as the names on disk tell: experts have others once taken apart."""
    headers = [safetensors_header(file)[0] for file in weight_files(folder)]
    shapes = {name: entry["shape"] for header in headers for name, entry in header.items() if name != "__metadata__"}
    matrices = {f".{name.removesuffix('.weight')}" for name, shape in shapes.items() if len(shape) == 2}
    # Neither embedding nor head: only what lies in a layer, which has a number.
    matrices = {name for name in matrices if any(map(str.isdigit, name.split(".")))}
    for target in [targets] if isinstance(targets, str) else targets:
        fits = target == "all-linear" or any(name.endswith(f".{target}") for name in matrices)
        if not fits and all(len(shape) < 3 for shape in shapes.values()):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in matrices}))
            raise UserError(f"config key recovery.lora.targets: found {target!r}; {folder} has {known}, or all-linear")


def check_packed(config: dict) -> None:
    """`UserError` where packed models are to be measured and there is none, or none that can be packed."""
    if not config["speed"]["packed"]:
        return
    if not config["schedule"]:
        raise UserError("config key speed.packed: packs the last iteration, but schedule is null; write packed: []")
    check_packable(config["pruning"]["block_size"], "; write that, or speed.packed: []")


def check_packable(block_size: int, remedy: str = "") -> None:
    """`UserError` where a model in such blocks cannot be packed; remedy: what else helps who asks for it."""
    if block_size != PACKED_BLOCK_SIZE:
        told = f"found {block_size}; models are packed in blocks of {PACKED_BLOCK_SIZE}"
        raise UserError(f"config key pruning.block_size: {told}{remedy}")


def check_training_memory(recovery: dict, folder: Path) -> None:
    """A training must fit into the largest GPU of this machine; nothing is said where there is none."""
    found = max(memory_of_gpus(), default=None)
    if found and visible_gpus() and (size := read_model_size(folder)):
        same = ("method", "memory", "batch_size", "sequence_length", "processes", "sharded", "gradient_checkpointing")
        values = {name: recovery[name] for name in same}
        distilled, rank = recovery["distill"]["weight"] > 0, recovery["lora"]["rank"]
        check_memory(size, TrainingPlan(distilled=distilled, lora_rank=rank, **values), found)


def check_text(where: str, text: str | dict, splits: tuple[str, ...], sequence_length: int) -> None:
    """A known corpus, a file, or one file per split read, each with at least a byte per token of one sequence."""
    if text in CORPORA:
        return
    if isinstance(text, dict) and (missing := [split for split in splits if split not in text]):
        raise UserError(f"{where}: no file for the split {missing[0]}; name one for each of {', '.join(splits)}")
    for path in text_files(text, splits):
        check_name(where, str(path))
        if not path.is_file():
            by_split = isinstance(text, dict)
            known = ": split by split, a text is of files only" if by_split else f" or one of {', '.join(CORPORA)}"
            raise UserError(f"{where}: no file {path}; name a file{known}")
        if path.suffix not in TEXT_ENDINGS:
            raise UserError(f"{where}: {path} ends in none of {', '.join(TEXT_ENDINGS)}; give it the right ending")
        check_not_pointer(path)
        check_form(where, path)
        if path.suffix == ".jsonl":
            check_first_row(where, path)
        size = path.stat().st_size
        # A token takes at least one byte of text; parquet is compressed, so its size says nothing.
        if size < sequence_length and path.suffix != ".parquet":
            raise UserError(
                f"{where}: {path} has {size} bytes, too few for one sequence of {sequence_length} tokens; "
                "name a longer text or a shorter sequence_length"
            )
        if isinstance(text, str) and path.suffix != ".parquet":
            check_splits(where, path, splits, sequence_length)


def check_form(where: str, path: Path) -> None:
    """What the ends of a text file tell: Parquet that is whole, or UTF-8 as far as its beginning goes."""
    with path.open("rb") as file:
        begin = file.read(BEGINNING)
        if path.suffix == ".parquet":
            file.seek(max(0, path.stat().st_size - len(PARQUET)))
            if not begin.startswith(PARQUET) or file.read() != PARQUET:
                raise UserError(f"{where}: {path} is no Parquet file, or not whole; copy or download it again")
            return
    try:
        codecs.getincrementaldecoder("utf-8")().decode(begin)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {path} is not UTF-8 at byte {error.start}; convert it to UTF-8") from None


def check_first_row(where: str, path: Path) -> None:
    """The others are likely to be as the first one is."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
    try:
        row = json.loads(first)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: the first row of {path} is not JSON ({error}); write an object a line") from None
    if not isinstance(row, dict) or "text" not in row:
        found = (", ".join(row) or "nothing") if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where}: the first row of {path} has no 'text', only {found}; rename its key")
    if not isinstance(row["text"], str):
        found = json.dumps(row["text"])
        raise UserError(f"{where}: the first row of {path} has {found:.40} under 'text'; write a string")


def check_splits(where: str, path: Path, splits: tuple[str, ...], sequence_length: int) -> None:
    """Each split read of a text that is cut must have a byte per token of one sequence too; where that can fail."""
    with path.open(encoding="utf-8", errors="replace") as file:
        has_few_lines = len(list(itertools.islice(file, FEW_LINES))) < FEW_LINES
    if not has_few_lines and path.stat().st_size >= FEW_BYTES * sequence_length:
        return
    pieces, between = read_pieces(path), "\n\n" if path.suffix == ".jsonl" else ""
    for split in splits if pieces else ():
        part = between.join(part_of(pieces, split))
        size = len(part.encode(errors="surrogatepass")) if part.strip() else 0
        if size < sequence_length:
            cut = f"{path}, cut between {'rows' if between else 'lines'} at 80 and 90 %"
            told = f"has {size} bytes of text for {split}, too few for one sequence of {sequence_length} tokens"
            raise UserError(f"{where}: {cut}, {told}; name a longer text, one of more lines, or a file for each split")


def read_pieces(path: Path) -> list[str]:
    """The lines or rows that a text is cut between; none where a row is not as it should be, which its job tells."""
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    if path.suffix != ".jsonl":
        return text.splitlines(keepends=True)
    try:
        rows = [json.loads(line)["text"] for line in text.split("\n") if line.strip()]
    except (ValueError, LookupError, TypeError, RecursionError):
        return []
    return rows if all(isinstance(row, str) for row in rows) else []


def check_name(where: str, name: str) -> None:
    """Jobs are given a name on a command line, and write it into results: it is no option, and text."""
    if name.startswith("-"):
        raise UserError(f"{where}: found {name}, which a command line takes for an option; write ./{name}")
    check_is_text(where, name)


def check_distinct(where: str, texts: list[str | dict]) -> None:
    """No text is evaluated twice: the second figure would take the place of the first."""
    try:
        distinct_names([text if isinstance(text, str) else text["test"] for text in texts])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def text_files(text: str | dict, splits: tuple[str, ...]) -> list[Path]:
    """The local files that these splits of a text are read from; none for a corpus by name."""
    if isinstance(text, dict):
        return [Path(text[split]) for split in splits]
    return [] if text in CORPORA else [Path(text)]
