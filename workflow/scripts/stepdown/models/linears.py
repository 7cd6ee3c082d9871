"""Every prunable matrix as an `nn.Linear` of its own, whatever form its family gives it.

Two forms hide matrices: GPT-2's Conv1D holds them transposed, and a mixture of experts holds those of all its experts
in one 3-D parameter. What takes their place here computes the same, and is hooked and masked like any other linear.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..cli import log

# The linears of an expert whose fused parameter is made of several, in the order they are concatenated.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def as_linears_(model: nn.Module) -> list[str]:
    """Replace Conv1D and fused experts in a model by linears; returns the names of those that were held transposed.

    Experts of another form than down(act(gate(x)) * up(x)), without biases, stay as they are, with a warning.
    """
    from transformers.pytorch_utils import Conv1D

    transposed = []
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            replace_module(model, name, linear_of(module.weight.T, module.bias))
            transposed.append(name)
        elif _are_fused_experts(module):
            replace_module(model, name, SeparateExperts(module))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and ".experts." in name:
            log.warning("%s: experts of a form that is not known here; they stay dense", name)
    return transposed


class SeparateExperts(nn.ModuleList):
    """Experts as modules of three linears; each sees the tokens routed to it, and no others.

    Takes the parameters away from the fused module it is made of: gate_up_proj [experts, 2 * inner, hidden] and
    down_proj [experts, hidden, inner].
    """

    def __init__(self, fused: nn.Module):
        parameters = {name: getattr(fused, name).detach() for name in FUSED}
        super().__init__(
            nn.ModuleDict(
                {
                    linear: linear_of(part.clone())
                    for name, linears in FUSED.items()
                    for linear, part in zip(linears, parameters[name][number].chunk(len(linears)), strict=True)
                }
            )
            for number in range(len(parameters["down_proj"]))
        )
        self._apply_gate = fused._apply_gate
        for name in FUSED:
            delattr(fused, name)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum over its experts of each token's outputs: [tokens, hidden]; index and weights: [tokens, top k]."""
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, place = torch.where(top_k_index == number)
            if len(token) == 0:
                continue
            seen = hidden_states[token]
            inner = self._apply_gate(torch.cat([expert["gate_proj"](seen), expert["up_proj"](seen)], dim=-1))
            weighted = expert["down_proj"](inner) * top_k_weights[token, place, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        return output


def fused_names(model: nn.Module) -> dict[str, str]:
    """Names that fused parameters had before they were replaced -> name of the `SeparateExperts` in their place."""
    experts = [name for name, module in model.named_modules() if isinstance(module, SeparateExperts)]
    return {f"{name}.{parameter}": name for name in experts for parameter in FUSED}


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear of a weight [out, in] and a bias [out]."""
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach())
    return linear


@contextmanager
def watching_inputs(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, `see` is called with the name of a module and its inputs [..., in], each time it is given some."""
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs[0]))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _are_fused_experts(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    transposed = getattr(module, "is_transposed", True) or not getattr(module, "is_concatenated", False)
    return parameters.keys() == FUSED.keys() and not transposed


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the model has the one of that name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module.train(model.training))
