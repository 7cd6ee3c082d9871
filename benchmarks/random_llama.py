"""A random Llama of about 1 B parameters on disk, written a layer at a time, with the bundled model's tokenizer.
Called as `python benchmarks/random_llama.py FOLDER`.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

BUNDLED = Path(__file__).parents[1] / "resources/pydoc-llama"


def write_random_llama(folder: Path, layers: int = 22) -> Path:
    """Hidden 2048, FFN 5632, 32 heads, 4 key-value heads, vocabulary 32000, bf16: 1.1 B parameters in 22 layers."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED / name, folder / name)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    write_shards(folder, shapes)
    return folder


def write_shards(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    generator, weight_map, total_size = torch.Generator().manual_seed(0), {}, 0
    prefixes = dict.fromkeys(".".join(name.split(".")[:3]) for name in shapes)
    for number, prefix in enumerate(prefixes):
        names = [name for name in shapes if name == prefix or name.startswith(prefix + ".")]
        shard = {name: random_tensor(shapes[name], generator) for name in names}
        save_file(shard, folder / f"model-{number:05}.safetensors", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, f"model-{number:05}.safetensors"))
        total_size += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_tensor(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms are ones, matrices random as a model is initialised."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    arguments = parser.parse_args()
    write_random_llama(arguments.folder, arguments.layers)
