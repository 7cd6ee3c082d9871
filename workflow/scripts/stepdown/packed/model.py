"""A packed folder as a Hugging Face model whose linears run packed."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..cli import progress
from ..errors import UserError
from ..models.decoder import build_empty, choose_device, types_of
from ..models.linears import as_linears_, replace_module
from ..models.stored_names import stored_names
from .cpu import INSTRUCTIONS
from .folder import checkpoint_names, read_index, read_shard
from .format import PackedMatrix
from .linear import ThreeTierLinear, choose_kernel, dense_linear

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel

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
    model = build_empty(folder, trust_remote_code).eval()
    as_linears_(model)
    stored = stored_names(model, checkpoint_names(folder, index))
    types = types_of(model, torch.bfloat16)
    for file in progress(index["sha256"], "load"):
        tensors, matrices = read_shard(folder / file, index)
        _load_shard(model, stored, types, tensors, matrices, kernel, place)
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise UserError(f"{folder}: no tensor for {missing[0]}; was it packed from this model? pack it again")
    _pack_head(model, kernel)
    return model.to(place).requires_grad_(False)


def _load_shard(
    model: nn.Module,
    stored: dict[str, str],
    types: dict[str, torch.dtype],
    tensors: dict[str, Tensor],
    matrices: dict[str, PackedMatrix],
    kernel: str,
    place: torch.device,
) -> None:
    """Put what one file holds where the model has it; stored: name in the model -> name in the file; types: the same
    name -> what it is loaded as."""
    own = {
        name: tensors[source].to(place, types[name] if tensors[source].is_floating_point() else None)
        for name, source in stored.items()
        if source in tensors
    }
    for name, source in stored.items():
        linear = source.removesuffix(".weight")
        if linear in matrices:
            module = name.removesuffix(".weight")
            bias = own.get(f"{module}.bias")
            replace_module(model, module, ThreeTierLinear(matrices[linear].to(device=place), bias, kernel))
    model.load_state_dict(own, strict=False, assign=True)


def _pack_head(model: nn.Module, kernel: str) -> None:
    """The head is Dense, and runs on the CPU's kernels as such; torch, and a GPU, have a product of their own."""
    head = model.get_output_embeddings()
    if kernel in INSTRUCTIONS and isinstance(head, nn.Linear):
        name = next(name for name, module in model.named_modules() if module is head)
        replace_module(model, name, dense_linear(head.weight, head.bias, kernel))
