"""A model whose parameters lie in shards over several processes (FSDP): for models that are larger than a device.

A layer's parameters are whole only while it computes. Every function here but `shard_`, `local` and `sharded_like`
talks to the other processes: all of them must call it.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..models.checkpoint import load_tensors, save_tensors
from ..models.decoder import find_layers
from .processes import is_first

WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.pt"
# Whole tensors, on the CPU of the first process alone.
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
TRAINED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
LOADED = StateDictOptions(full_state_dict=True, strict=False)


def shard_(model: nn.Module, device: str) -> None:
    """Shard a model over all processes, each decoder layer by itself and what is left together.

    The processes must have been told of each other already; device: `cpu` or `cuda`.
    """
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for layer in model.get_submodule(find_layers(model)):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def unshard_(model: nn.Module) -> None:
    """Make every parameter whole again, on the CPU; in all processes but the first they are empty afterwards."""
    whole_ones: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                # Tied ones stay tied.
                if parameter not in whole_ones:
                    value = whole(parameter.detach()).cpu()
                    whole_ones[parameter] = nn.Parameter(value if is_first() else value.to("meta"), requires_grad=False)
                module._parameters[name] = whole_ones[parameter]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, sharded or not."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, sharded or not; it is the tensor's own memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that every process has whole, as it lies beside a parameter: sharded as that is, on its device."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor.to(parameter.device)
    # Each process has it already: nothing is sent.
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write what is trained of a sharded model, whole, to a folder."""
    weights = get_model_state_dict(model, options=TRAINED)
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(weights, folder / WEIGHTS, {})


def load_weights(model: nn.Module, folder: Path) -> None:
    """Give a sharded model what `save_weights` wrote."""
    set_model_state_dict(model, load_tensors(folder / WEIGHTS)[0], options=LOADED)


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write the state of a sharded model's optimizer, whole, to a folder."""
    state = get_optimizer_state_dict(model, optimizer, options=GATHERED)
    if is_first():
        torch.save(state, folder / OPTIMIZER)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Give a sharded model's optimizer what `save_optimizer` wrote."""
    state = torch.load(folder / OPTIMIZER, weights_only=True, map_location="cpu")
    set_optimizer_state_dict(model, optimizer, state, options=LOADED)
