"""A GGUF file, the form of llama.cpp's models, as a folder in Hugging Face form."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UserError
from ..plan.gguf_header import GgufHeader, read_gguf_header
from .checkpoint import check_not_inside, new_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

INSTEAD = "use a folder in Hugging Face form"
# Of its rotary frequencies a file of Llama 3.1 and later has what they are divided by, and not what that follows from:
# the same in all of them but for the factor, which the lowest is divided by.
ROPE_FREQUENCIES = "rope_freqs.weight"
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def import_gguf(file: Path, target: Path) -> None:
    """Write the model of a GGUF file, dequantised to bfloat16, with its tokenizer and generation config, to a folder.

    The whole model is in memory while it is read. Raises `UserError` for a file that is none, truncated, of a tensor
    type or an architecture that transformers does not know, without a tensor that its architecture has, or with one
    that transformers would pass over.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from .loading import told_in_one_line

    check_not_inside(file, target)
    header = read_gguf_header(file)
    with told_in_one_line(file, "transformers cannot read it", INSTEAD):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model, found = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    if found["missing_keys"]:
        raise UserError(f"{file}: has no tensor for {min(found['missing_keys'])}; copy or download it again")
    _check_biases(file, header, model)
    _scale_rope_(model.config, file, header)
    with new_folder(target) as folder, told_in_one_line(file, "transformers cannot save it in safetensors"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _check_biases(file: Path, header: GgufHeader, model: "PreTrainedModel") -> None:
    """Of some architectures transformers reads the weights alone."""
    held = {name: count for name, count in header.tensors.items() if name.endswith(".bias")}
    read = sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith("bias"))
    if sum(held.values()) > read:
        raise UserError(f"{file}: holds biases, such as {min(held)}, which transformers does not read; {INSTEAD}")


def _scale_rope_(config: "PretrainedConfig", file: Path, header: GgufHeader) -> None:
    """Tell a configuration how the file stretches rotary positions, which transformers does not read."""
    kind, factor = (header.of_architecture(f"rope.scaling.{key}") for key in ("type", "factor"))
    if kind == "linear" and factor:
        config.rope_parameters |= {"rope_type": "linear", "factor": float(factor)}
    elif kind not in (None, "none"):
        raise UserError(f"{file}: rope.scaling.type is {kind!r}, which is not read from GGUF files; {INSTEAD}")
    if ROPE_FREQUENCIES in header.tensors:
        factors = _read_float32(file, ROPE_FREQUENCIES)
        config.rope_parameters |= {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA_3}
        computed = rope_factors(config)
        if computed.shape != factors.shape or not torch.allclose(computed, factors, rtol=1e-3):
            raise UserError(f"{file}: its {ROPE_FREQUENCIES} are not those of Llama 3.1 or later; {INSTEAD}")


def rope_factors(config: "PretrainedConfig") -> Tensor | None:
    """By what Llama 3 divides the frequency of each rotary pair: float32 [head size / 2]; None where by nothing."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if config.rope_parameters["rope_type"] == "default":
        return None
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    return config.rope_parameters["rope_theta"] ** -exponents / frequencies


def _read_float32(file: Path, name: str) -> Tensor:
    import gguf

    found = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == name)
    return torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy())
