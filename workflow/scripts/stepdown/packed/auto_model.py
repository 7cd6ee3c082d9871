"""Packed folders for transformers' own `from_pretrained`: importing stepdown is all it takes.

    import stepdown
    model = AutoModelForCausalLM.from_pretrained("results/iter5/packed/bf16")

and so for whatever loads models by it: `pipeline`, lm-eval's `hf`, `transformers serve`. The folder's config.json says
`"quant_method": "stepdown"`; `registration` has that looked up here. transformers builds the model and ties its
weights; the folder is read and checked by `model.fill`, as in `load_packed`.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import UserError
from ..models.checkpoint import REST
from ..models.decoder import without_weights
from ..models.linears import replace_module
from ..registration import QUANT_METHOD
from .folder import read_index
from .linear import choose_kernel
from .model import fill, name_tensors, read_generation_config

# The one file that transformers reads as well; a folder without a model.safetensors is one that transformers refuses,
# and does not fill at random, where this module is not imported.
BESIDE_LAYERS = f"{REST}.safetensors"


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed folder, of which nothing is asked: packed.json says the same."""

    def __init__(self, quant_method: str = QUANT_METHOD, format: str = "", values: str = "bf16", **_: object) -> None:
        self.quant_method, self.format, self.values = quant_method, format, values


class PackedQuantizer(HfQuantizer):
    """Puts three-tier linears where the model has dense ones; for running a model, in bf16 on one device."""

    def update_device_map(self, device_map: dict | str | None) -> dict | None:
        """A GPU where there is one, unless a device is named; raises `UserError` for several."""
        if not isinstance(device_map, dict) or not device_map:
            device_map = {"": torch.device("cuda" if torch.cuda.is_available() else "cpu")}
        devices = sorted({str(device) for device in device_map.values()})
        if len(devices) > 1:
            raise UserError(f"device_map: a packed model runs on one device, found {', '.join(devices)}; name one")
        if not devices[0].isdigit() and devices[0].partition(":")[0] not in ("cpu", "cuda"):
            raise UserError(
                f"device_map: a packed model runs on 'cpu' or 'cuda', found {devices[0]!r}; name one of them"
            )
        return device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        # The last word before files are looked for.
        config.transformers_weights = BESIDE_LAYERS
        return config

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str], device_map: dict, **_: object
    ) -> None:
        self._folder = Path(checkpoint_files[0]).parent
        self._index = read_index(self._folder)
        read_generation_config(self._folder)
        self._place = torch.device(next(iter(device_map.values())))
        self._kernel = choose_kernel("auto", self._place)
        self._names = name_tensors(model, self._folder, self._index)
        for name in self._names.linears:
            # Without parameters, so that none is made room for.
            replace_module(model, name, nn.Identity())
        # `fill` gives each use of a block what the others have.
        ties = model.all_tied_weights_keys.items()
        owners = self._names.linears.keys()
        model.all_tied_weights_keys = {
            name: source for name, source in ties if not owners & {name.rpartition(".")[0], source.rpartition(".")[0]}
        }
        # What is missing or too much is told by `read_shard` and `name_tensors`, and nothing stays at random.
        model._keys_to_ignore_on_load_missing = model._keys_to_ignore_on_load_unexpected = {""}
        for module in model.modules():
            module._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: nn.Module, **_: object) -> nn.Module:
        for name, buffer in _buffers(model):
            owner, _, own = name.rpartition(".")
            model.get_submodule(owner)._buffers[own] = buffer.to(self._place)
        fill(model, self._names, self._folder, self._index, self._kernel, self._place)
        return model.requires_grad_(False)

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        """The folder it was loaded from is what there is to copy."""
        return False


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a model without weights has of its own, by the configuration it was built with."""
    with without_weights():
        yield from type(model)._from_config(copy.deepcopy(model.config), dtype=torch.bfloat16).named_buffers()


# Not by the decorators that there are for it: they refuse a method whose name stands there already.
AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = PackedConfig
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = PackedQuantizer
