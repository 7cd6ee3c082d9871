"""A GGUF file, the form of llama.cpp's models, as a folder in Hugging Face form."""

import shutil
from pathlib import Path

import torch

from ..errors import UserError
from ..plan.gguf_header import read_gguf_header


def import_gguf(file: Path, target: Path) -> None:
    """Write the model of a GGUF file, dequantised to bfloat16, with its tokenizer and generation config, to a folder.

    The whole model is in memory while it is read. Raises `UserError` for a file that is none, truncated, of a tensor
    type or an architecture that transformers does not know, or without a tensor that its architecture has.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from .loading import told_in_one_line

    read_gguf_header(file)
    with told_in_one_line(file, "transformers cannot read it", "use a folder in Hugging Face form"):
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
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
