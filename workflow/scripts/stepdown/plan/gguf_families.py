"""Which families of models can be written as a GGUF file. Standard library only."""

from pathlib import Path

from ..errors import UserError
from ..files import read_json_object

# `model_type` of transformers -> what llama.cpp calls the architecture. Of these the package `gguf` knows every tensor
# by its name, and nothing but the order of rotary pairs differs.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def gguf_architecture(folder: Path) -> str:
    """What llama.cpp calls the architecture of the model in a folder; raises `UserError` for a family it is not written
    for."""
    family = read_json_object(folder / "config.json").get("model_type")
    if family not in ARCHITECTURES:
        raise UserError(
            f"{folder}: a GGUF file is written of {', '.join(ARCHITECTURES)}, found the family {family!r}; use"
            " llama.cpp's convert_hf_to_gguf.py"
        )
    return ARCHITECTURES[family]
