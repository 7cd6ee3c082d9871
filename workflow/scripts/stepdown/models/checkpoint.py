"""Checkpoints as ordinary Hugging Face folders: read lazily, a tensor at a time; written whole or not at all."""

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..cli import progress
from ..errors import UserError
from ..files import INDEX_NAME, atomic_write, read_json_object, safetensors_header, weight_files
from .fused import Fused
from .tensor_files import as_stored, dtype_of, load_tensors, read_part, save_tensors, stored_bytes

# What stands in a checkpoint beside its weights and belongs to it.
SIDE_FILES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
# The shard of what belongs to no decoder layer.
REST = "rest"


class Checkpoint:
    """The weights of a folder, read when asked for; every matrix [out, in], also one that is stored transposed, and
    every matrix alone, also where one tensor holds several.

    transposed: names of those stored so; fused: name of a tensor that holds several -> how. The index of a folder of
    ours says both; of another origin, only the model can tell. Raises `UserError` when the folder holds no safetensors
    weights or a file is truncated.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self._file_of: dict[str, Path] = {}
        self._headers: dict[Path, dict] = {}
        for file in weight_files(self.folder):
            header, _ = safetensors_header(file)
            self._headers[file] = {name: entry for name, entry in header.items() if name != "__metadata__"}
            self._file_of.update(dict.fromkeys(self._headers[file], file))
        metadata = _index_metadata(self.folder)
        self.transposed = frozenset(metadata.get("transposed", ()))
        self.fused = {name: Fused(**layout) for name, layout in metadata.get("fused", {}).items()}

    @property
    def fused(self) -> dict[str, Fused]:
        return self._fused

    @fused.setter
    def fused(self, fused: Mapping[str, Fused]) -> None:
        self._fused = dict(fused)
        # Name of each matrix that shares a tensor -> that tensor, and where in it: a view on the meta device.
        self._part_of: dict[str, tuple[str, Tensor]] = {}
        for name, layout in self._fused.items():
            parts = layout.views(torch.empty(layout.shape, device="meta"))
            self._part_of |= {part: (name, view) for part, view in parts}

    @property
    def stored(self) -> list[str]:
        """Names of the tensors as the files have them."""
        return sorted(self._file_of)

    @property
    def names(self) -> list[str]:
        return sorted((self._file_of.keys() - self.fused.keys()) | self._part_of.keys())

    def __contains__(self, name: str) -> bool:
        return name in self._part_of or (name in self._file_of and name not in self.fused)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading the tensor."""
        return tuple(self._place(name)[1].shape)

    def _place(self, name: str) -> tuple[str, Tensor]:
        """Under which name a tensor is stored, and where in that: a view on the meta device."""
        if name in self._part_of:
            return self._part_of[name]
        file = self._file_holding(name)
        whole = as_stored(self._headers[file][name])
        return name, whole.T if name in self.transposed else whole

    def _file_holding(self, name: str) -> Path:
        if name not in self._file_of:
            raise UserError(f"{self.folder}: no tensor {name!r}; is this a checkpoint of the same model?")
        return self._file_of[name]

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is stored as."""
        stored, _ = self._part_of.get(name, (name, None))
        return dtype_of(self._file_of[stored], self._headers[self._file_of[stored]][stored])

    def holds_integers(self, name: str) -> bool:
        """Whether a tensor is stored as whole numbers, and what they stand for is not known here."""
        return name in self._file_of and self._headers[self._file_of[name]][name]["dtype"].startswith(("I", "U"))

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of the named tensors."""
        names = set(names)
        parts = names & self._part_of.keys()
        sources = {self._part_of[part][0] for part in parts}
        found = self._read((names - parts) | sources)
        for source in sources:
            views = self.fused[source].views(found.pop(source))
            found |= {part: view.contiguous() for part, view in views if part in parts}
        return found

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of tensors as the files have them, but for those stored transposed."""
        found = {}
        for name in names:
            file = self._file_holding(name)
            entry = self._headers[file][name]
            tensor = read_part(file, entry, as_stored(entry))
            found[name] = tensor.T.contiguous() if name in self.transposed else tensor
        return found

    def rows(self, name: str, rows: slice) -> Tensor:
        """A copy of some rows of a tensor; no more of the file is read than they span."""
        stored, place = self._place(name)
        file = self._file_of[stored]
        return read_part(file, self._headers[file][stored], place[rows])

    def matrix(self, linear: str) -> Tensor:
        """The weight [out, in] of a linear."""
        return self.tensors([f"{linear}.weight"])[f"{linear}.weight"]

    def shards(self) -> dict[str, list[str]]:
        """Names of the tensors by shard: one shard per decoder layer, one (`rest`) for what belongs to none."""
        shards = defaultdict(list)
        for name in self.names:
            shards[shard_of(name)].append(name)
        return dict(shards)

    def content_hash(self) -> str:
        """sha256 of all names, types, shapes and bytes; how the tensors are spread over files does not matter."""
        digest = hashlib.sha256()
        for name in self.stored:
            file = self._file_of[name]
            entry = self._headers[file][name]
            digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            for chunk in stored_bytes(file, *entry["data_offsets"]):
                digest.update(chunk)
        return digest.hexdigest()

    def identity(self) -> dict[str, str]:
        """What the checkpoint says it is: `base_model` and `iteration`; a folder of other origin is its own base."""
        known = _index_metadata(self.folder).get("stepdown")
        return known or {"base_model": self.content_hash(), "iteration": "0"}


def check_identity(path: Path | str, kind: str, found: Mapping[str, str], due: Mapping[str, str]) -> None:
    """Raise `UserError` unless what a file says of itself is the identity of the model that it is to be of."""
    if any(found.get(key) != value for key, value in due.items()):
        told, expected = (f"iteration {of.get('iteration')} of {of.get('base_model', '')[:12]}" for of in (found, due))
        raise UserError(f"{path}: not {kind} ({told}, not {expected}); give what was written for this model")


def _index_metadata(folder: Path) -> dict:
    index = folder / INDEX_NAME
    metadata = read_json_object(index).get("metadata") if index.is_file() else None
    return metadata if isinstance(metadata, dict) else {}


def is_finite(values: Tensor) -> bool:
    return all(bound.isfinite() for bound in values.aminmax())


def check_finite(folder: Path, name: str, weight: Tensor) -> None:
    """Raises `UserError` if a weight of a checkpoint is NaN or infinite."""
    if not is_finite(weight):
        raise UserError(f"{folder}: {name}: a weight is NaN or infinite; copy or download the model again")


def shard_of(name: str) -> str:
    """The decoder layer a tensor belongs to ("model.layers.3"), found by the first number in its name; else `REST`."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return REST if number is None else ".".join(parts[: number + 1])


def beside_layers(names: Iterable[str], used: Iterable[str], left_out: Iterable[str] | None = None) -> list[str]:
    """Those of the names that belong to layers beside the ones that the used names belong to, but for those of patterns
    that a family leaves out."""
    layers = {shard_of(name) for name in used}
    lists = {layer.rpartition(".")[0] for layer in layers}
    found = ((name, shard_of(name)) for name in sorted(without(names, left_out)))
    return [name for name, layer in found if layer not in layers and layer.rpartition(".")[0] in lists]


def without(names: Iterable[str], left_out: Iterable[str] | None) -> list[str]:
    """The names but for those of patterns that a family leaves out."""
    return [name for name in names if not any(re.search(pattern, name) for pattern in left_out or ())]


def rewrite_checkpoint(
    source: Checkpoint | Path | str,
    target: Path | str,
    change: Callable[[dict[str, Tensor]], None],
    identity: dict[str, str],
    description: str = "write",
) -> None:
    """Write `target` as the checkpoint `source` with its weights changed, one decoder layer in memory at a time.

    `change` gets the tensors of a shard by name and changes or replaces them; a tensor that keeps its name keeps its
    type.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)

    def changed() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for shard, names in progress(checkpoint.shards().items(), description):
            tensors = checkpoint.tensors(names)
            change(tensors)
            as_stored_(checkpoint, tensors)
            yield shard, tensors

    write_checkpoint(checkpoint.folder, target, changed(), identity, checkpoint.transposed, fused=checkpoint.fused)


def as_stored_(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """Give tensors the type that those of their names have in a checkpoint; others keep theirs."""
    tensors |= {name: tensor.to(checkpoint.dtype(name)) for name, tensor in tensors.items() if name in checkpoint}


def write_checkpoint(
    source: Path,
    target: Path | str,
    shards: Iterable[tuple[str, dict[str, Tensor]]],
    identity: dict[str, str],
    transposed: Iterable[str] = (),
    texts: Mapping[str, str] | None = None,
    fused: Mapping[str, Fused] | None = None,
) -> None:
    """Write `target` as a checkpoint of (name of a shard, its tensors by name), one shard in memory at a time: when it
    is written, the tensors are taken out of its mapping.

    The other files are those of the folder `source`, but for `texts`: name of a file -> what it says instead.
    transposed: names of the matrices, given as [out, in], that their family stores the other way round; fused: name of
    each tensor that stands for several of those given -> how.
    """
    transposed, fused = frozenset(transposed), dict(fused or {})
    with new_folder(target) as folder:
        for file in side_files(source):
            shutil.copyfile(file, folder / file.name)
        for name, text in (texts or {}).items():
            atomic_write(folder / name, text)
        weight_map, total_size = {}, 0
        for shard, tensors in shards:
            tensors |= {name: tensors[name].T for name in transposed.intersection(tensors)}
            fuse_(tensors, fused)
            save_tensors(tensors, folder / f"{shard}.safetensors", {"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, f"{shard}.safetensors"))
            total_size += sum(tensor.nbytes for tensor in tensors.values())
            # Whoever gave them still has the mapping when it reads the next ones.
            tensors.clear()
        write_index(folder, weight_map, total_size, identity, transposed, fused)


def fuse_(tensors: dict[str, Tensor], fused: Mapping[str, Fused]) -> None:
    """Put the tensors that are parts of another into that one."""
    for name, layout in fused.items():
        first = next(iter(layout.shapes()))
        if first in tensors:
            tensors[name] = tensors[first].new_empty(layout.shape)
            for part, view in layout.views(tensors[name]):
                view.copy_(tensors.pop(part))


@contextmanager
def new_folder(target: Path | str) -> Iterator[Path]:
    """A folder to write in that becomes `target` at the end, in place of the model that was there; on an error it is
    deleted. Raises `UserError` where something else was there."""
    target = Path(target)
    check_replaceable(target)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_replaceable(target: Path) -> None:
    """Only a model, or what is left of links to one, gives way to another: raises `UserError` for other files."""
    if target.is_dir() and not os.path.lexists(target / "config.json"):
        for other in (each for each in sorted(target.iterdir()) if not each.is_symlink()):
            raise UserError(f"{target}: holds {other.name} and no model, which would be lost; name another folder")


def check_not_inside(source: Path, target: Path) -> None:
    """Raises `UserError` for a model that lies where another is to be written."""
    if source.resolve().is_relative_to(target.resolve()):
        raise UserError(f"{target}: the model {source} lies there, and would be lost; name another folder")


def write_base_index(checkpoint: Checkpoint) -> str:
    """Write into the folder of a base model what only reading all its weights, or building the model, can tell.

    An index that is a link is replaced, not written through. Returns the hash by which the model is known from now on.
    """
    weight_map, total_size = {}, 0
    for file in weight_files(checkpoint.folder):
        header, start = safetensors_header(file)
        weight_map.update(dict.fromkeys(header.keys() - {"__metadata__"}, file.name))
        total_size += file.stat().st_size - start
    base_model = checkpoint.content_hash()
    identity = {"base_model": base_model, "iteration": "0"}
    write_index(checkpoint.folder, weight_map, total_size, identity, checkpoint.transposed, checkpoint.fused)
    return base_model


def write_index(
    folder: Path,
    weight_map: dict[str, str],
    total_size: int,
    identity: dict[str, str],
    transposed: Iterable[str],
    fused: Mapping[str, Fused],
) -> None:
    """The index of a checkpoint as Hugging Face has it, and in its metadata what we know of the weights.

    With their hashes it differs where they do, and can stand for them.
    """
    hashes = {name: file_hash(folder / name) for name in sorted(set(weight_map.values()))}
    metadata = {"total_size": total_size, "stepdown": identity, "transposed": sorted(transposed), "sha256": hashes}
    if fused:
        metadata["fused"] = {name: asdict(layout) for name, layout in fused.items()}
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
    atomic_write(folder / INDEX_NAME, text + "\n")


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def rewriting_layers(
    source: Checkpoint, target: Path | str, identity: dict[str, str], texts: Mapping[str, str] | None = None
) -> Iterator[Callable[[dict[str, Tensor]], None]]:
    """Write `target` as `source` with tensors of its layers changed, in the order of the model's layers.

    Yields what takes the new tensors of a layer by name: those that `source` has, or of a linear the parts that stand
    for its weight, such as `weight_packed`. It leaves the dict it is given empty, so that a layer is not held while
    the next one is made. The checkpoint is written when the block ends: layers are walked in the order of the model and
    written in the order of their names. texts: see `write_checkpoint`.
    """
    file_of: dict[str, Path] = {}
    with waiting_beside(target) as waiting:

        def put_aside(tensors: dict[str, Tensor]) -> None:
            file = waiting / f"{len(file_of)}.safetensors"
            save_tensors(tensors, file, {})
            replaced = (name if name in source else f"{name.rpartition('.')[0]}.weight" for name in tensors)
            file_of.update(dict.fromkeys(replaced, file))
            tensors.clear()

        def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
            for shard, names in progress(source.shards().items(), "write"):
                tensors = source.tensors(name for name in names if name not in file_of)
                for file in {file_of[name] for name in names if name in file_of}:
                    tensors |= load_tensors(file)[0]
                as_stored_(source, tensors)
                yield shard, tensors

        yield put_aside
        write_checkpoint(source.folder, target, shards(), identity, source.transposed, texts, source.fused)


@contextmanager
def waiting_beside(target: Path | str) -> Iterator[Path]:
    """A folder beside a checkpoint to be, where layers wait on disk until the last is known; gone at the end, and what
    a job that was killed has left of it before."""
    waiting = Path(target).with_name(f"{Path(target).name}.layers")
    shutil.rmtree(waiting, ignore_errors=True)
    waiting.mkdir(parents=True)
    try:
        yield waiting
    finally:
        shutil.rmtree(waiting, ignore_errors=True)


def pass_on_checkpoint(source: Path | str, target: Path | str) -> None:
    """Make `target` the same checkpoint as `source`, its weights by hard links where the file system has them."""
    with new_folder(target) as folder:
        for file in sorted(Path(source).iterdir()):
            # The index is an output that Snakemake dates: it must be a file of its own.
            copy = _link_or_copy if file.suffix == ".safetensors" else shutil.copyfile
            copy(file, folder / file.name)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        # What a link leads to: a relative one would lead nowhere from another folder.
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def side_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that are neither weights nor their index: configuration, tokenizer, code."""
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in SIDE_FILES)
    return [file for file in files if not file.name.endswith(".index.json")]
