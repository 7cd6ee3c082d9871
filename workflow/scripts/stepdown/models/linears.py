"""Every prunable matrix as an `nn.Linear` of its own, whatever form its family gives it.

Two forms hide matrices: GPT-2's Conv1D holds them transposed, and a mixture of experts holds those of all its experts
in one 3-D parameter. What takes their place here computes the same, and is hooked and masked like any other linear.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .fused import PARTS, Fused


def as_linears_(model: nn.Module) -> list[str]:
    """Replace Conv1D and fused experts in a model by linears; returns the names of those that were held transposed.

    Experts of a form that transformers does not describe stay as they are; `Decoder.left_dense` names them.
    """
    from transformers.pytorch_utils import Conv1D

    transposed = []
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            replace_module(model, name, linear_of(module.weight.T, module.bias))
            transposed.append(name)
        elif _are_fused_experts(module):
            replace_module(model, name, SeparateExperts(module))
    return transposed


class SeparateExperts(nn.ModuleList):
    """Experts as modules of linears; each sees the tokens routed to it, and no others.

    Takes the parameters away from the fused module it is made of, as transformers describes it
    (`use_experts_implementation`): with a gate or without, with biases or without, [out, in] or [in, out].
    """

    def __init__(self, fused: nn.Module):
        self.layout = {name: _layout(fused, name) for name, _ in fused.named_parameters()}
        found = [dict(layout.views(getattr(fused, name).detach())) for name, layout in self.layout.items()]
        tensors = {name: tensor.clone() for views in found for name, tensor in views.items()}
        linears = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
        super().__init__(nn.ModuleDict() for _ in range(len(fused.down_proj)))
        for name in sorted(linears):
            _, number, part = name.split(".")
            self[int(number)][part] = linear_of(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))
        for name in self.layout:
            delattr(fused, name)
        self.has_gate, self.interleaved = fused.has_gate, not fused.is_concatenated
        self.act = fused._apply_gate if fused.has_gate else fused.act_fn

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum over its experts of each token's outputs: [tokens, hidden]; index and weights: [tokens, top k]."""
        # Summed in float32 and rounded once, as transformers does.
        output = torch.zeros_like(hidden_states, dtype=torch.float32)
        weights = top_k_weights.flatten()
        for expert, places in zip(self, self._places(top_k_index), strict=True):
            token = places // top_k_index.shape[1]
            # While it trains, an expert without tokens takes part too: its gradient is zero and not missing, as in
            # the fused form, and processes that add up their gradients wait for one of every parameter.
            if len(token) == 0 and not self.training:
                continue
            inner = self.act(self._inner(expert, hidden_states[token]))
            weighted = expert["down_proj"](inner) * weights[places, None]
            output.index_add_(0, token, weighted.float())
        return output.to(hidden_states.dtype)

    def _places(self, top_k_index: Tensor) -> tuple[Tensor, ...]:
        """Of each expert, where in all of `top_k_index` it is named. Asking expert by expert, the host would wait for
        each."""
        named, order = top_k_index.flatten().sort(stable=True)
        ends = torch.searchsorted(named, torch.arange(len(self), device=named.device), right=True)
        first, *others = ends.tolist()
        return order.tensor_split([first, *others])[: len(self)]

    def _inner(self, expert: nn.ModuleDict, seen: Tensor) -> Tensor:
        """What the activation is given, in the order in which the family's own function expects gate and up."""
        if not self.has_gate:
            return expert["up_proj"](seen)
        halves = expert["gate_proj"](seen), expert["up_proj"](seen)
        return torch.stack(halves, dim=-1).flatten(-2) if self.interleaved else torch.cat(halves, dim=-1)


def fused_names(model: nn.Module) -> dict[str, Fused]:
    """Names that fused parameters had before they were replaced -> what the model has in their place."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, SeparateExperts):
            found |= {f"{name}.{own}": replace(layout, name=name) for own, layout in module.layout.items()}
    return found


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear of a weight [out, in] and a bias [out]."""
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach())
    return linear


def computes_as_linear(linear: nn.Linear) -> bool:
    """Whether a linear on the meta device makes [..., out] of [..., in], whatever its class: a family's own may answer
    with a router's choice, or take groups of inputs apart."""
    if type(linear).forward is nn.Linear.forward:
        return True
    try:
        output = linear(torch.empty(1, 3, linear.in_features, dtype=linear.weight.dtype, device="meta"))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    return isinstance(output, Tensor) and output.shape == (1, 3, linear.out_features)


@contextmanager
def watching_inputs(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, `see` is called with the name of a module and its inputs [..., in], each time it is given some."""
    with ExitStack() as hooks:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs[0]))
            hooks.callback(hook.remove)
        yield


@contextmanager
def watching_outputs(modules: Mapping[str, nn.Module], see: Callable[[str, Any], None]) -> Iterator[None]:
    """While open, `see` is called with the name of a module and what it gives, each time it does: of a plain linear its
    outputs [..., out]."""
    with ExitStack() as hooks:
        for name, module in modules.items():
            hook = module.register_forward_hook(lambda _, __, outputs, name=name: see(name, outputs))
            hooks.callback(hook.remove)
        yield


def _are_fused_experts(module: nn.Module) -> bool:
    """Whether a module says of itself how its parameters hold experts, in a form that `SeparateExperts` computes."""
    parameters = dict(module.named_parameters())
    described = hasattr(module, "is_concatenated") and not hasattr(module, "post_expert_norm")
    return described and "down_proj" in parameters and all(_layout(module, name) for name in parameters)


def _layout(module: nn.Module, parameter: str) -> Fused | None:
    """How a parameter of a module of experts holds their linears."""
    of, kind = (parameter[:-5], "bias") if parameter.endswith("_bias") else (parameter, "weight")
    if of not in PARTS:
        return None
    shape = tuple(module.get_parameter(parameter).shape)
    return Fused("", PARTS[of], shape, kind, module.is_transposed, not module.is_concatenated)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the model has the one of that name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module.train(model.training))
