"""A packed folder as a Hugging Face model whose linears run packed."""

from collections.abc import Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..cli import log, progress
from ..errors import UserError
from ..files import read_json_object
from ..models.checkpoint import REST, beside_layers, check_finite, shard_of, without
from ..models.decoder import build_empty, choose_device, head_name, types_of
from ..models.linears import as_linears_, computes_as_linear, linear_of, replace_module
from ..models.loading import told_in_one_line
from ..models.stored_names import stored_names
from .cpu import INSTRUCTIONS
from .decoding import quicken_decoding
from .folder import HEAD_BITS, VALUES, read_index, read_shard, shapes_in
from .linear import ThreeTierLinear, choose_kernel, dense_linear

GENERATION_CONFIG = "generation_config.json"

if TYPE_CHECKING:
    from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

    class CausalLanguageModel(PreTrainedModel, GenerationMixin):
        """What the causal language models of transformers are: both, though no class of theirs says so."""


def load_packed(
    folder: Path | str, kernel: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> "CausalLanguageModel":
    """The Hugging Face model of a packed folder, in bf16 and ready to run, its linears `ThreeTierLinear`.

    kernel: `auto` (the log says which it came to), `avx512`, `avx2`, `triton`, or `torch` (unpacked weights). On a CPU
    the head runs on the same kernel. Raises `UserError` for a folder that is not whole, of a later version, or changed
    since it was written; all is checked before anything is computed.
    """
    folder, place = Path(folder), choose_device(device)
    index = read_index(folder)
    kernel = choose_kernel(kernel, place)
    model = build_empty(folder, trust_remote_code, torch.bfloat16).eval()
    if (generation := read_generation_config(folder)) is not None:
        model.generation_config = generation
    fill(model, name_tensors(model, folder, index), folder, index, kernel, place)
    return model.to(place).requires_grad_(False)


def read_generation_config(folder: Path) -> "GenerationConfig | None":
    """Where a conversation ends, for one, chat models say in this file alone; raises `UserError` for one that
    `from_pretrained` would pass over."""
    from transformers import GenerationConfig

    if not (folder / GENERATION_CONFIG).is_file():
        return None
    read_json_object(folder / GENERATION_CONFIG)
    with told_in_one_line(folder, f"{GENERATION_CONFIG} is none that transformers can load"):
        return GenerationConfig.from_pretrained(folder)


@dataclass(frozen=True)
class Names:
    """stored: name of each tensor of a model -> name in the folder; types: the same name -> what it is loaded as;
    linears: name of each linear of the model that runs packed -> name in the folder; unpacked: the same of those that
    compute something of their own with their weight."""

    stored: dict[str, str]
    types: dict[str, torch.dtype]
    linears: dict[str, str]
    unpacked: dict[str, str]


def name_tensors(model: nn.Module, folder: Path, index: dict) -> Names:
    """Where a model, still without weights, has what is in a packed folder; all its matrices become linears of their
    own. Raises `UserError` for a tensor of the model that the folder has not, or has in another shape, and for one of
    the folder that no layer of the model has a place for."""
    as_linears_(model)
    ordinary, matrices = shapes_in(folder, index)
    shapes = ordinary | {f"{name}.weight": shape for name, shape in matrices.items()}
    if head_name(model) in matrices:
        _untie_head(model)
    stored = stored_names(model, sorted(shapes))
    for name, tensor in _held(model).items():
        if name not in stored:
            raise UserError(f"{folder}: no tensor for {name}; was it packed from this model? pack it again")
        if shapes[stored[name]] != tensor.shape:
            raise UserError(
                f"{folder}: config.json makes {name} {list(tensor.shape)}, the files hold"
                f" {list(shapes[stored[name]])}; take both from the same model"
            )
    used = set(stored.values())
    of_matrices = {f"{name}.{part}" for name in matrices for part in ("weight", "bias") if shard_of(name) != REST}
    unused = shapes.keys() - used
    beside = beside_layers(unused, used, model._keys_to_ignore_on_load_unexpected)
    for name in sorted({*beside, *_weights_in_layers(model, unused, used), *(of_matrices & unused)}):
        raise UserError(f"{folder}: the files also hold {name}, for which config.json has no place; pack it again")
    linears: dict[str, str] = {}
    unpacked: dict[str, str] = {}
    for name, source in stored.items():
        if (source := source.removesuffix(".weight")) in matrices:
            name = name.removesuffix(".weight")
            (linears if computes_as_linear(model.get_submodule(name)) else unpacked)[name] = source
    return Names(stored, types_of(model, torch.bfloat16), linears, unpacked)


def _held(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of the model has: parameters, and buffers such as the bias of a router."""
    of_files = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in of_files}
    kept = without(buffers, model._keys_to_ignore_on_load_missing)
    return dict(model.named_parameters()) | {name: buffers[name] for name in kept}


def _weights_in_layers(model: nn.Module, unused: Set[str], used: set[str]) -> list[str]:
    """Those of the unused tensors that are a weight, or the bias beside one, in a layer of the model; what is neither,
    such as a mask, many checkpoints hold that no model loads."""
    layers = {shard_of(name) for name in used} - {REST}
    owners = {name.removesuffix(".weight") for name in unused | used if name.endswith(".weight")}
    found = [name for name in unused if shard_of(name) in layers and name.rpartition(".")[0] in owners]
    return without(found, model._keys_to_ignore_on_load_unexpected)


def fill(model: nn.Module, names: Names, folder: Path, index: dict, kernel: str, place: torch.device) -> None:
    """Put into a model what a packed folder holds, one decoder layer at a time, each checked; raises `UserError`."""
    head = head_name(model)
    for file in progress(index["sha256"], "load"):
        tensors, matrices = read_shard(folder / file, index)
        own, moved = {}, {}
        for name, source in names.stored.items():
            if (tensor := tensors.get(source)) is None:
                continue
            wanted = names.types[name]
            if wanted.is_floating_point != tensor.is_floating_point():
                raise UserError(f"{folder / file}: {source} is {tensor.dtype}; pack it again")
            # Once: a tied head and its embedding stay one tensor.
            if (source, wanted) not in moved:
                moved[source, wanted] = tensor.to(place, wanted if tensor.is_floating_point() else None)
            own[name] = moved[source, wanted]
        for name, source in names.linears.items():
            if source in matrices:
                matrix, bias = matrices[source].to(device=place), own.pop(f"{name}.bias", None)
                # Of a dense matrix torch, and a GPU, have a product of their own.
                fastest = kernel if kernel in INSTRUCTIONS or name != head else "torch"
                replace_module(model, name, ThreeTierLinear(matrix, bias, fastest))
        for name, source in names.unpacked.items():
            if source in matrices:
                weight = ThreeTierLinear(matrices[source], None, "torch").weight
                own[f"{name}.weight"] = weight.to(place, names.types[f"{name}.weight"])
        model.load_state_dict(own, strict=False, assign=True)
    _pack_head(model, folder, kernel, index["values"])
    for each in (model, model.base_model):
        each.save_pretrained = partial(_refuse, folder, "a packed model is not saved anew; copy the folder")
    if isinstance(model.get_output_embeddings(), ThreeTierLinear):
        advice = "a packed head keeps its tokens; resize the model before it is packed"
        model.resize_token_embeddings = partial(_refuse, folder, advice)
    if kernel in INSTRUCTIONS and quicken_decoding(model):
        log.info("single tokens go through the decoder in C++")


def _refuse(folder: Path, reason: str, *_: object, **__: object) -> None:
    raise UserError(f"{folder}: {reason}")


def _pack_head(model: nn.Module, folder: Path, kernel: str, values: str) -> None:
    """A head that is stored as it was is Dense, and runs on the CPU's kernels as such. Where kept weights are whole
    numbers it has 8 bits, the nearest, whatever computes with it."""
    head, bits = model.get_output_embeddings(), None if VALUES[values] is None else HEAD_BITS
    if not isinstance(head, nn.Linear) or (kernel not in INSTRUCTIONS and bits is None):
        return
    name = head_name(model)
    if bits is not None:
        check_finite(folder, name, head.weight)
    packed = dense_linear(head.weight, head.bias, kernel if kernel in INSTRUCTIONS else "torch", bits)
    replace_module(model, name, packed if kernel in INSTRUCTIONS else linear_of(packed.weight, head.bias))
    _untie_head(model)


def _untie_head(model: nn.Module) -> None:
    """Whoever ties weights later finds none to tie with a packed head."""
    head = f"{head_name(model)}.weight"
    ties = model.all_tied_weights_keys.items()
    model.all_tied_weights_keys = {name: source for name, source in ties if head not in (name, source)}
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
