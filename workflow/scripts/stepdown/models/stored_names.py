"""Under which name a checkpoint stores each tensor of a model, by transformers' own rules of loading.

transformers renames tensors while loading: GPT-NeoX stores its head as `embed_out`, old OPT leaves out `model.`.
Experts are stored one by one and fused while loading, or fused from the beginning; `model` has them one by one, see
`linears`. What is computed from stored tensors, such as convolutions that are joined, has no name of its own:
`write_computed` writes it.
"""

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from ..cli import progress
from ..errors import UserError
from .checkpoint import Checkpoint, shard_of, write_checkpoint
from .fused import Fused
from .linears import fused_names


@dataclass
class Naming:
    """stored: name of each tensor of the model -> name in the checkpoint; fused: name of each stored tensor that holds
    several matrices -> how; computed: first name in the model of what a conversion makes -> the conversion of
    transformers, and by pattern the names of the stored tensors it takes."""

    stored: dict[str, str] = field(default_factory=dict)
    fused: dict[str, Fused] = field(default_factory=dict)
    computed: dict[str, tuple[object, list[tuple[str, str]]]] = field(default_factory=dict)


def stored_names(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Name of each tensor of the model -> which of the names in its checkpoint it is stored under; tied ones share."""
    return find_names(model, names).stored


def find_names(model: nn.Module, names: list[str]) -> Naming:
    """What transformers would make of tensors with these names.

    A stored tensor that holds several matrices of the model is `fused`, not `stored`, as long as it is among the names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    fused = fused_names(model)
    own = model.state_dict() | fused
    found = Naming()
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if renamed not in own:
            plain, _ = rename_source_key(name, [], [], model.base_model_prefix, own)
            renamed, pattern = (plain, None) if plain in own else (renamed, pattern)
        if renamed not in own:
            continue
        if pattern is None and renamed in fused:
            found.fused[name] = replace(fused[renamed], name=_experts_beside(name))
        elif pattern is None:
            found.stored[renamed] = name
        elif renamed in fused and (part := _expert(name, by_pattern[pattern], pattern, fused[renamed])):
            found.stored[part] = name
        else:
            _, sources = found.computed.setdefault(renamed, (deepcopy(by_pattern[pattern]), []))
            sources.append((pattern, name))
    for pair in model.all_tied_weights_keys.items():
        for name, source in (pair, pair[::-1]):
            if name not in found.stored and source in found.stored:
                found.stored[name] = found.stored[source]
    return found


def _experts_beside(name: str) -> str:
    """What experts are called whose matrices are in the stored tensor of that name."""
    parent = name.removesuffix(".weight").rpartition(".")[0]
    return parent if parent.endswith(".experts") else f"{parent}.experts"


def _expert(name: str, converter: object, pattern: str, layout: Fused) -> str | None:
    """The model's name of an expert's matrix that is stored alone, if fusing is all that the conversion does."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    number = re.search(r"\.experts\.(\d+)\.", name)
    merge, *more = converter.operations
    plain = isinstance(merge, MergeModulelist) and all(isinstance(step, Concatenate) and step.dim == 1 for step in more)
    if not (number and plain) or layout.transposed or layout.interleaved:
        return None
    return f"{layout.name}.{number[1]}.{layout.parts[converter.source_patterns.index(pattern)]}.{layout.kind}"


def write_computed(model: nn.Module, checkpoint: Checkpoint, naming: Naming, target: Path) -> None:
    """Write a checkpoint in which what has to be computed from stored tensors is, by transformers' own conversions, and
    everything else as it was; one decoder layer in memory at a time. Raises `UserError` where a conversion fails."""
    taken = {name for _, sources in naming.computed.values() for _, name in sources}
    shards: dict[str, tuple[list[str], list[str]]] = {}
    for name in checkpoint.names:
        if name not in taken:
            shards.setdefault(shard_of(name), ([], []))[0].append(name)
    for name in naming.computed:
        shards.setdefault(shard_of(name), ([], []))[1].append(name)

    def converted() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for shard, (kept, computed) in progress(shards.items(), "convert"):
            tensors = checkpoint.tensors(kept)
            for name in computed:
                tensors |= _compute(model, checkpoint, name, *naming.computed[name])
            yield shard, tensors

    write_checkpoint(checkpoint.folder, target, converted(), {"base_model": "", "iteration": "0"})


def _compute(
    model: nn.Module, checkpoint: Checkpoint, name: str, converter: object, sources: list[tuple[str, str]]
) -> Mapping[str, Tensor]:
    tensors = checkpoint.tensors(source for _, source in sources)
    for pattern, source in sorted(sources, key=lambda pair: _natural(pair[1])):
        converter.add_tensor(name, source, pattern, tensors.pop(source))
    try:
        found = converter.convert(name, model=model, config=model.config)
    except (ValueError, RuntimeError, KeyError, AttributeError, StopIteration) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{checkpoint.folder}: {name} cannot be made of {sources[0][1]} by the conversion that transformers has for"
            f" the family {model.config.model_type!r} ({reason})"
        ) from None
    return {key: value[0] if isinstance(value, list) else value for key, value in found.items()}


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Orders numbers in names by their value, as transformers does."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
