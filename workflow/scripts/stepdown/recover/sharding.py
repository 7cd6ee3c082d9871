"""A model in shards over several processes (FSDP), for models that are larger than a device: read, saved, gathered.

A layer's parameters are whole only while it computes. Each process reads the rows of each tensor that it is to have and
nothing else; what lies beside a parameter, such as its mask, is given as those rows too. `whole`, `gather` and
`save_whole` talk to the other processes: all of them must call these.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from ..models.checkpoint import load_tensors, save_tensors
from ..models.decoder import Decoder, find_layers
from ..models.tensor_files import in_file_order
from .processes import is_first


def own_rows(count: int) -> slice:
    """Which of so many rows this process has: the first of equal parts, the last of which may be smaller or empty."""
    share = -(-count // int(os.environ.get("WORLD_SIZE", 1)))
    first = min(count, share * int(os.environ.get("RANK", 0)))
    return slice(first, min(count, first + share))


def reader(*decoders: Decoder) -> Callable[[nn.Module], None]:
    """What gives a part of the decoders' models, which are on the meta device, its weights: this process's rows.

    The other rows are never written to, and take no memory. Weights are known by the parameter they are for, whatever
    has been put around it since.
    """
    sources: dict[nn.Parameter, tuple[Decoder, str]] = {}
    for decoder in decoders:
        decoder.model.tie_weights(recompute_mapping=False)
        sources |= {parameter: (decoder, name) for name, parameter in decoder.model.named_parameters()}
        stored = {name: decoder.stored[name] for name, _ in decoder.model.named_buffers() if name in decoder.stored}
        found = decoder.checkpoint.tensors(stored.values())
        buffers = {name: found[stored_name].to(decoder.types[name]) for name, stored_name in stored.items()}
        decoder.model.load_state_dict(buffers, strict=False, assign=True)

    def read(module: nn.Module) -> None:
        # Tied ones stay tied.
        filled: dict[nn.Parameter, nn.Parameter] = {}
        for part in module.modules():
            for own, parameter in part._parameters.items():
                if parameter is not None and parameter.is_meta:
                    if parameter not in filled:
                        filled[parameter] = _with_own_rows(parameter, *sources[parameter])
                    part._parameters[own] = filled[parameter]

    return read


def _with_own_rows(parameter: nn.Parameter, decoder: Decoder, name: str) -> nn.Parameter:
    rows = own_rows(len(parameter))
    value = torch.empty(parameter.shape, dtype=decoder.types[name])
    value[rows] = decoder.checkpoint.rows(decoder.stored[name], rows).to(value.dtype)
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


def shard_(model: nn.Module, device: str, read: Callable[[nn.Module], None] | None = None) -> None:
    """Shard a model over all processes, decoder layers, embedding and head by themselves, the rest together.

    The processes must have been told of each other already; device: `cpu` or `cuda`; read: what gives a part of the
    model its weights, if it has none.
    """
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for part in (*model.get_submodule(find_layers(model)), *_ends(model), model):
        if read:
            read(part)
        fully_shard(part, mesh=mesh)


def _ends(model: nn.Module) -> list[nn.Module]:
    """Embedding and head of a model, where it has both and they are two."""
    try:
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return []
    weights = [getattr(end, "weight", None) for end in ends]
    return ends if weights[0] is not None and weights[1] is not None and weights[0] is not weights[1] else []


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model by name, in shards if it is: a forward pass may have left some of them whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model.named_parameters()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, sharded or not."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, sharded or not; it is the tensor's own memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def beside(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor, of which each process has its rows, as it lies beside a parameter: in shards as that is, on its device;
    a number for all of it as it is."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor) or tensor.dim() == 0:
        return tensor
    placed = (parameter.device_mesh, parameter.placements)
    return DTensor.from_local(tensor, *placed, run_check=False, shape=parameter.shape, stride=parameter.stride())


def gather(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Those of tensors that are named, whole on the CPU of the first process; the others get nothing."""
    gathered = {}
    for name in sorted(name for name in names if name in tensors):
        value = whole(tensors[name])
        if is_first():
            gathered[name] = value.cpu()
    return gathered


def save_whole(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors, in shards or not, to a file, of which one at a time is whole."""
    if is_first():
        save_tensors(tensors, path, metadata, ready=lambda tensor: whole(tensor.detach()))
    else:
        for name in in_file_order(tensors):
            whole(tensors[name].detach())


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write what is trained of a sharded model to a folder: each process what it has."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: local(weight.detach()) for name, weight in own_parameters(model) if weight.requires_grad}
    save_tensors(weights, folder / f"model-{_rank()}.safetensors", {})


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Give a sharded model what `save_weights` wrote."""
    weights = load_tensors(folder / f"model-{_rank()}.safetensors")[0]
    for name, parameter in own_parameters(model):
        if name in weights:
            local(parameter).copy_(weights[name])


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write the state of a sharded model's optimizer to a folder: each process what it has. Returns once all have."""
    torch.save(tree_map(_local_or_itself, optimizer.state_dict()), folder / f"optimizer-{_rank()}.pt")
    torch.distributed.barrier()


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Give a sharded model's optimizer what `save_optimizer` wrote."""
    state = torch.load(folder / f"optimizer-{_rank()}.pt", weights_only=True, map_location="cpu")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        state["state"][number] = {key: beside(value, parameters[number]) for key, value in values.items()}
    optimizer.load_state_dict(state)


def _local_or_itself(value: object) -> object:
    return local(value) if isinstance(value, Tensor) else value


def _rank() -> int:
    return torch.distributed.get_rank()
