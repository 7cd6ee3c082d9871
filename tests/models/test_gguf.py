"""GGUF files: imported bit for bit, and what is wrong with one told in one line."""

import json
import shutil
import struct
from pathlib import Path

import gguf
import pytest
import torch
import yaml
from families import make_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from stepdown.errors import UserError
from stepdown.models.decoder import load_whole
from stepdown.models.gguf import import_gguf
from stepdown.plan.gguf_header import BLOCKS, is_gguf, read_gguf_header
from stepdown.plan.preflight import check_inputs, complete_config, local_files, local_model

ROOT = Path(__file__).parents[2]
# As llama.cpp calls the tensors of a Llama.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 4096}  # Q8_0 has blocks of 32
HEADS, KEY_HEADS = 4, 2


def own_name(name):
    """model.layers.0.mlp.up_proj.weight -> blk.0.ffn_up.weight"""
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(
            name, "output.weight"
        )
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def interleaved(weight, heads):
    """Rows of a query or key matrix in llama.cpp's order of rotary pairs."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(folder, file, architecture="llama", without=(), scaling=None):
    """The Llama of a folder as a GGUF file of Q8_0; returns its weights as the file has them."""
    config, tokenizer = (json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer.json"))
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    if scaling:
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(4.0)
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = tokenizer["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in sorted(vocabulary, key=vocabulary.get)])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    kept = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        heads = HEADS if "q_proj" in name else KEY_HEADS if "k_proj" in name else 0
        weight = interleaved(tensor.numpy(), heads) if heads else tensor.numpy()
        packed = gguf.quants.quantize(weight, kind)
        if own_name(name) not in without:
            writer.add_tensor(own_name(name), packed, raw_dtype=kind)
        # Blocks lie within rows, so that rows may be put in order before or after.
        kept[name] = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = make_model("llama", tmp_path_factory.mktemp("gguf") / "model", **SIZES)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "resources/pydoc-llama" / name, folder / name)
    return folder


@pytest.fixture
def file(source, tmp_path):
    write_gguf(source, tmp_path / "some.gguf")
    return tmp_path / "some.gguf"


def error_of(check, *arguments):
    with pytest.raises(UserError) as caught:
        check(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is right ---------------------------------------------------------------------------------------------------


def test_a_file_becomes_a_folder_bit_for_bit(source, tmp_path):
    weights = write_gguf(source, tmp_path / "some.gguf")
    import_gguf(tmp_path / "some.gguf", tmp_path / "model")
    imported = load_file(tmp_path / "model/model.safetensors")
    assert imported.keys() == weights.keys()
    for name, weight in weights.items():
        assert imported[name].dtype == torch.bfloat16 and torch.equal(imported[name], weight.bfloat16()), name
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "model", source))
    for words in ("def main():\n    return None", "Ünïcode  and  spaces "):
        assert ours(words, add_special_tokens=False) == theirs(words, add_special_tokens=False)
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == 1
    with torch.no_grad():
        assert load_whole(tmp_path / "model", "cpu")(torch.arange(20)[None]).logits.isfinite().all()


def test_the_header_says_what_planning_asks(file, source):
    header = read_gguf_header(file)
    assert header.context_length == 64
    assert header.parameters == sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())
    assert is_gguf(str(file)) and local_model(str(file)) is None and local_files(str(file)) == [file]
    assert not is_gguf(str(source)) and not is_gguf("someone/some-model")


def test_types_are_those_that_are_dequantised():
    for kind, block in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == block


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [4, 20, 300, 60_000, -1])
def test_a_truncated_file(file, left):
    file.write_bytes(file.read_bytes()[:left])
    assert "truncated" in error_of(read_gguf_header, file)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "it is empty"),
        (b"PK\x03\x04...", "does not begin with GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n", "only a pointer of git-lfs"),
    ],
)
def test_no_gguf_file(file, content, told):
    file.write_bytes(content)
    assert told in error_of(read_gguf_header, file)
    file.unlink()
    assert "no file" in error_of(read_gguf_header, file)


def test_a_byte_anywhere_in_the_header_is_one_line_or_none(file):
    """Whatever is wrong, nothing but `UserError` comes out, and it comes soon."""
    content = file.read_bytes()
    for place in [*range(4, 400), *range(400, 120_000, 997)]:
        file.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            read_gguf_header(file)
        except UserError as error:
            assert "\n" not in str(error)


def test_an_unknown_tensor_type(file):
    content = file.read_bytes()
    place = content.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 2 * 8
    assert struct.unpack_from("<I", content, place) == (8,)
    file.write_bytes(content[:place] + struct.pack("<I", 99) + content[place + 4 :])
    assert "blk.0.ffn_up.weight is of the tensor type 99" in error_of(read_gguf_header, file)


def test_an_unknown_architecture(source, tmp_path):
    write_gguf(source, tmp_path / "other.gguf", architecture="clip")
    assert "clip" in error_of(import_gguf, tmp_path / "other.gguf", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_positions_that_are_stretched_linearly_stay_so(source, tmp_path):
    write_gguf(source, tmp_path / "some.gguf", scaling=gguf.RopeScalingType.LINEAR)
    import_gguf(tmp_path / "some.gguf", tmp_path / "model")
    rope = json.loads((tmp_path / "model/config.json").read_text())["rope_parameters"]
    assert rope == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


def test_positions_that_are_stretched_in_a_way_that_is_not_read(source, tmp_path):
    write_gguf(source, tmp_path / "some.gguf", scaling=gguf.RopeScalingType.YARN)
    told = error_of(import_gguf, tmp_path / "some.gguf", tmp_path / "model")
    assert "rope.scaling.type is 'yarn', which is not read" in told and not (tmp_path / "model").exists()


def test_a_missing_tensor(source, tmp_path):
    write_gguf(source, tmp_path / "some.gguf", without=["blk.1.ffn_up.weight"])
    told = error_of(import_gguf, tmp_path / "some.gguf", tmp_path / "model")
    assert "no tensor for model.layers.1.mlp.up_proj.weight" in told and not (tmp_path / "model").exists()


def test_a_sequence_longer_than_the_model_allows(file):
    schema = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())
    given = {"model": str(file), "calibration": {"sequence_length": 65}}
    config = complete_config(given, schema)
    assert "calibration.sequence_length: found 65" in error_of(check_inputs, config)
