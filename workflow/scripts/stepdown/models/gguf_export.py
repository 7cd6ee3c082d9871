"""A checkpoint as a GGUF file, the form of llama.cpp's models, in bf16 or in Q8_0.

Names and metadata are those of llama.cpp's convert_hf_to_gguf.py. What was pruned stays zero in Q8_0 too: a block of 32
weights has a scale and no offset.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor
from transformers import PretrainedConfig

from ..cli import log, progress
from ..errors import UserError
from ..files import written_whole
from ..plan.gguf_families import gguf_architecture
from .decoder import Decoder, open_decoder
from .gguf import rope_factors
from .gguf_tokenizer import add_tokenizer
from .importing import check_layers

# That are float32 on their way into the file.
ROWS_AT_ONCE = 1024
BF16, F32 = gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F32
# By the name a user gives: what matrices are stored as, and llama.cpp's number for such a file.
VALUES = {
    "bf16": (BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


def export_gguf(folder: Path, file: Path, values: str) -> None:
    """Write the model and the tokenizer of a folder as a GGUF file, one tensor in memory at a time.

    values: one of `VALUES`. Vectors are float32, and in Q8_0 a matrix whose rows are no whole blocks of 32 is bf16.
    Raises `UserError` for a family or a tokenizer that cannot be written, and leaves nothing half-written.
    """
    architecture = gguf_architecture(folder)
    decoder = open_decoder(folder, "cpu")
    check_layers(decoder)
    kind, _ = VALUES[values]
    with written_whole(file) as partial, closing(gguf.GGUFWriter(partial, architecture)) as writer:
        add_configuration(writer, decoder.model.config, architecture)
        entries = list(_entries(decoder, architecture, kind))
        writer.add_file_type(_file_type(entries, values))
        add_tokenizer(writer, folder, rows=decoder.model.config.vocab_size)
        _write(writer, entries)


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its name there, its shape, what it is stored as, and how it is read."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    read: Callable[[], Tensor]


def _entries(decoder: Decoder, architecture: str, kind: gguf.GGMLQuantizationType) -> Iterator[Entry]:
    checkpoint, config = decoder.checkpoint, decoder.model.config
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    factors = rope_factors(config)
    if factors is not None:
        yield Entry("rope_freqs.weight", tuple(factors.shape), F32, lambda: factors)
    for name, own in gguf_names(decoder, architecture).items():
        stored = decoder.stored[name]
        shape = checkpoint.shape(stored)
        stored_as = F32 if len(shape) == 1 else kind if shape[-1] % block == 0 else BF16

        def read(name: str = name, stored: str = stored) -> Tensor:
            return in_rotary_order(name, checkpoint.tensors([stored])[stored], config, architecture)

        yield Entry(own, shape, stored_as, read)


def _file_type(entries: list[Entry], values: str) -> gguf.LlamaFileType:
    """What the file is called by its matrices; says which of them are of another kind than was asked for."""
    kind, file_type = VALUES[values]
    matrices = [entry for entry in entries if len(entry.shape) > 1]
    if others := [entry for entry in matrices if entry.kind != kind]:
        first, row = others[0].name, others[0].shape[-1]
        log.warning("%d matrices stay bf16: their rows are no whole blocks of 32, as %s of %d", len(others), first, row)
    return file_type if len(others) < len(matrices) else VALUES["bf16"][1]


def _write(writer: gguf.GGUFWriter, entries: list[Entry]) -> None:
    """The whole file, one tensor in memory at a time."""
    for entry in entries:
        # Of F32 a block is a number of 4 bytes.
        shape = gguf.quants.quant_shape_to_byte_shape(entry.shape, entry.kind)
        writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), math.prod(shape), entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in progress(entries, "gguf"):
        writer.write_tensor_data(_quantised(entry))


def _quantised(entry: Entry) -> np.ndarray:
    """The bytes of a tensor, made of some rows at a time: in float32 an embedding takes more than a layer does."""
    tensor, shape = entry.read(), gguf.quants.quant_shape_to_byte_shape(entry.shape, entry.kind)
    found, rows = np.empty(shape, np.uint8), tensor.reshape(-1, entry.shape[-1])
    places = found.reshape(len(rows), -1)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        places[part] = gguf.quants.quantize(rows[part].float().numpy(), entry.kind).view(np.uint8)
    return found


def add_configuration(writer: gguf.GGUFWriter, config: PretrainedConfig, architecture: str) -> None:
    """The sizes of the model. Raises `UserError` for what llama.cpp would compute otherwise."""
    where = config.name_or_path
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in ("default", "llama3"):
        raise UserError(f"{where}: rope scaling {rope_type!r} is not written to GGUF; use convert_hf_to_gguf.py")
    if config.hidden_act != "silu":
        raise UserError(f"{where}: hidden_act {config.hidden_act!r}, llama.cpp computes silu in this architecture")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Beyond a sliding window llama.cpp, which has none in these architectures, would attend to more.
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_context_length(min(config.max_position_embeddings, window))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if architecture == "llama":
        writer.add_rope_dimension_count(head_size)


def gguf_names(decoder: Decoder, architecture: str) -> dict[str, str]:
    """Name of each tensor of the model -> name in the file; a tied head is left out, as llama.cpp expects it."""
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, len(decoder.layers))
    names = {}
    for name in sorted(decoder.stored.keys() - decoder.model.all_tied_weights_keys.keys()):
        found = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            folder = decoder.checkpoint.folder
            raise UserError(f"{folder}: {name} has no name in a GGUF file of the architecture {architecture}")
        names[name] = found
    return names


def in_rotary_order(name: str, tensor: Tensor, config: PretrainedConfig, architecture: str) -> Tensor:
    """A tensor as the file has it: in the architecture `llama` the two rows of a rotary pair stand side by side, and
    not half a head apart."""
    part = name.split(".")[-2]
    if architecture != "llama" or part not in ("q_proj", "k_proj"):
        return tensor
    heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
