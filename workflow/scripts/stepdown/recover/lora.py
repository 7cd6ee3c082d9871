"""LoRA (Hu et al. 2021) under a mask: it is masked while it trains, so that what is merged is what was trained."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as check_target
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..cli import log
from ..errors import UserError
from ..models.checkpoint import save_tensors
from ..models.linears import watching_inputs
from ..tensors.masks import as_bits, from_bits
from .processes import is_first
from .settings import ALL_LINEAR
from .sharding import local, own_parameters, own_rows, whole


class MaskedLoraLinear(lora.Linear):
    """A linear whose adapter is masked while it trains: y = x (W + keep * scaling B A)^T + bias.

    What is merged is therefore what was trained, to the bit, and a pruned weight is never anything but zero.
    W: [out, in], A: [rank, in], B: [out, rank]. The price of a mask is that B A is formed in every step: a step takes
    the time of full finetuning, and saves the optimizer's memory. Dropout acts on the adapter's input.
    """

    def __init__(self, *arguments, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        self.register_buffer("keep", None, persistent=False)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to W, [out, in]; peft's own merge asks for it here too."""
        # Under autocast B A would be rounded to bf16 while training, and not when merged.
        with torch.autocast(self.weight.device.type, enabled=False):
            delta = super().get_delta_weight(adapter)
            return delta if self.keep is None else delta * from_bits(self.keep, delta.shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters or self.merged:
            return self.base_layer(x)
        (adapter,) = self.active_adapters
        delta = self.get_delta_weight(adapter)
        dropout = self.lora_dropout[adapter]
        if self.training and not isinstance(dropout, nn.Identity):
            return self.base_layer(x) + F.linear(dropout(x), delta.to(x.dtype))
        return F.linear(x, (self.weight + delta).to(self.weight.dtype), self.bias)


def add_masked_adapter(
    model: PreTrainedModel,
    keep_masks: Mapping[str, Tensor],
    targets: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float,
    low_memory: bool = False,
) -> peft.PeftModel:
    """The model with a masked adapter on each linear that `targets` name; only the adapters train.

    low_memory: hold a bit of a mask for each weight, and not a byte. Raises UserError for a target that matches none of
    the masked linears.
    """
    targets = _without_shared(model, match_targets(list(keep_masks), targets))
    targets = _without_uncalled(model, targets)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type=peft.TaskType.CAUSAL_LM
    )
    config._register_custom_module({nn.Linear: MaskedLoraLinear})
    with _weights_somewhere([model.get_submodule(name) for name in targets]):
        adapted = peft.get_peft_model(model, config)
    for name in targets:
        keep = keep_masks[name]
        if not keep.all():
            # get_peft_model has put the adapters into the model it was given.
            model.get_submodule(name).keep = as_bits(keep) if low_memory else keep
    return adapted


@contextmanager
def _weights_somewhere(linears: Sequence[nn.Linear]) -> Iterator[None]:
    """While open, weights that are still to be read are on the CPU and empty: peft puts adapters where weights are."""
    unread = {linear: linear.weight for linear in linears if linear.weight.is_meta}
    for linear, weight in unread.items():
        linear.weight = nn.Parameter(weight.new_empty(0, device="cpu"))
    yield
    for linear, weight in unread.items():
        linear.weight = weight.requires_grad_(False)


@torch.no_grad()
def merge(model: peft.PeftModel) -> PreTrainedModel:
    """The model with its adapter merged; of one in shards each process merges the rows that it has."""
    for linear in [module for module in model.modules() if isinstance(module, MaskedLoraLinear)]:
        for factor in (*linear.lora_A.values(), *linear.lora_B.values()):
            factor.weight = nn.Parameter(whole(factor.weight.detach()), requires_grad=False)
        (adapter,) = linear.active_adapters
        delta = linear.get_delta_weight(adapter)
        held = local(linear.weight.detach())
        held.add_(delta if held.shape == delta.shape else delta[own_rows(len(delta))])
    return model.unload()


def _without_shared(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """The targets without weights that several modules have: an adapter on one of them would be merged into all."""
    linears = (module for module in model.modules() if isinstance(module, nn.Linear))
    uses = Counter(linear.weight for linear in linears)
    return _left_in(targets, lambda name: uses[model.get_submodule(name).weight] == 1, "used by several layers")


@torch.no_grad()
def _without_uncalled(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """The targets without those whose weights are used without calls, as Mamba's kernels do: an adapter would not be
    seen. Of experts, some are called; peft refuses more of Mamba's."""
    called: set[str] = set()
    linears = {name: model.get_submodule(name) for name in targets}
    # Of a model in shards, whose weights are still to be read: one zero all over, which takes no memory.
    unread = {name: weight for name, weight in model.named_parameters() if weight.is_meta}
    zeros = {name: weight.new_zeros((), device="cpu").expand(weight.shape) for name, weight in unread.items()}
    tokens = torch.zeros(1, 2, dtype=torch.int64, device="cpu" if zeros else model.device)
    with watching_inputs(linears, lambda name, _: called.add(_kind(name))):
        functional_call(model, zeros, kwargs={"input_ids": tokens, "use_cache": False})

    def is_called(name: str) -> bool:
        try:
            check_target(peft.LoraConfig(), model, name.rpartition(".")[2])
        except ValueError:
            return False
        return _kind(name) in called

    return _left_in(targets, is_called, "used without calls")


def _kind(name: str) -> str:
    """A name with `*` for its numbers."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _left_in(targets: list[str], fits: Callable[[str], bool], otherwise: str) -> list[str]:
    """The targets that fit; a line names those that do not, whose weights are `otherwise`."""
    kept = [name for name in targets if fits(name)]
    if left_out := [name for name in targets if name not in kept]:
        others = len(left_out) - 1
        log.warning("lora: %s and %d others get no adapter: their weights are %s", left_out[0], others, otherwise)
    if not kept:
        raise UserError("recovery: lora_targets: none of them can have an adapter; name others, or use method: full")
    return kept


def save_adapter(model: peft.PeftModel, folder: Path) -> None:
    """Write the adapter as peft reads it. It counts only under the mask: where the model it belongs to is not zero.

    Of a model in shards, all processes must call it.
    """
    adapters = {name: whole(weight.detach()) for name, weight in own_parameters(model) if weight.requires_grad}
    if not is_first():
        return
    config = model.peft_config["default"]
    config.base_model_name_or_path = None  # Where it lay while it was trained is nobody's business.
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_tensors(
        peft.get_peft_model_state_dict(model, adapters), folder / "adapter_model.safetensors", {"format": "pt"}
    )


def match_targets(linears: Sequence[str], targets: Sequence[str]) -> list[str]:
    """The linears that end in one of the targets (whole parts of a name, such as `q_proj` or `mlp.down_proj`)."""
    matched: set[str] = set()
    for target in targets:
        found = {name for name in linears if target == ALL_LINEAR or f".{name}".endswith(f".{target}")}
        if not found:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise UserError(
                f"recovery: lora_targets: {target!r} matches no pruned linear; there are {known}, or {ALL_LINEAR}"
            )
        matched |= found
    return [name for name in linears if name in matched]
