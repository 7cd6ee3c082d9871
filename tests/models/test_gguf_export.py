"""GGUF files written: read again by transformers they are the same model, and llama.cpp runs them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from families import make_model
from safetensors.torch import load_file, save_file
from three_tiers import prune_by_magnitude
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stepdown.errors import UserError
from stepdown.models.decoder import load_whole, open_decoder
from stepdown.models.gguf import import_gguf
from stepdown.models.gguf_export import export_gguf
from stepdown.models.gguf_tokenizer import pre_tokenizer_of, scores_of, tokens_of
from stepdown.plan.gguf_header import read_gguf_header
from stepdown.prune.slicing import slice_checkpoint

ROOT = Path(__file__).parents[2]
IDENTITY = {"base_model": "0", "iteration": "1"}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 4100}
# 4 rows without a token; of Qwen3, the head size that transformers takes where a file says another.
FAMILIES = {
    "llama": {},
    "llama_tied": {},
    "mistral": {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": 128, "num_attention_heads": 4},
}


@pytest.fixture
def model(request, tmp_path):
    return make(request.param if hasattr(request, "param") else "llama", tmp_path)


def make(family, folder):
    """A model pruned in three tiers, in bf16, with the bundled tokenizer."""
    make_model(family, folder / "base", dtype="bfloat16", **(SIZES | FAMILIES.get(family, {})))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "resources/pydoc-llama" / name, folder / "base" / name)
    prune_by_magnitude(folder / "base", folder)
    return folder / "model"


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
def logits(folder):
    return load_whole(folder, "cpu")(torch.arange(40)[None]).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_the_same_model(family, tmp_path):
    model = make(family, tmp_path)
    export_gguf(model, tmp_path / "model.gguf", "bf16")
    read_gguf_header(tmp_path / "model.gguf")
    import_gguf(tmp_path / "model.gguf", tmp_path / "again")
    ours, theirs = weights(model), weights(tmp_path / "again")
    ours.pop("lm_head.weight" if family == "llama_tied" else "", None)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    assert torch.equal(logits(tmp_path / "again"), logits(model))


def with_rope(model, **parameters):
    """The model with its rotary positions stretched."""
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0} | parameters
    config["max_position_embeddings"] = 16384
    (model / "config.json").write_text(json.dumps(config))
    return model


LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_stretched_positions_of_llama_3_are_read_back(factor, model, tmp_path):
    with_rope(model, rope_type="llama3", factor=factor, **LLAMA_3)
    export_gguf(model, tmp_path / "model.gguf", "bf16")
    import_gguf(tmp_path / "model.gguf", tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(model))
    with_rope(model, rope_type="default")
    assert not torch.equal(logits(tmp_path / "again"), logits(model))


def test_positions_stretched_in_another_way_are_refused(model, tmp_path):
    with_rope(model, rope_type="llama3", factor=8.0, **(LLAMA_3 | {"high_freq_factor": 2.0}))
    export_gguf(model, tmp_path / "model.gguf", "bf16")
    with pytest.raises(UserError, match=r"rope_freqs.* are not those of Llama 3"):
        import_gguf(tmp_path / "model.gguf", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_biases_that_are_not_read_are_refused(tmp_path):
    make_model("llama", tmp_path / "model", dtype="bfloat16", attention_bias=True, **SIZES)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "resources/pydoc-llama" / name, tmp_path / "model" / name)
    prune_by_magnitude(tmp_path / "model", tmp_path / "pruned")
    export_gguf(tmp_path / "pruned/model", tmp_path / "model.gguf", "bf16")
    with pytest.raises(UserError, match=r"holds biases, such as .*attn_k.bias"):
        import_gguf(tmp_path / "model.gguf", tmp_path / "again")


def test_nothing_beside_an_imported_model_is_lost(model, tmp_path):
    export_gguf(model, tmp_path / "there/model.gguf", "bf16")
    with pytest.raises(UserError, match=r"the model .*model.gguf lies there, and would be lost"):
        import_gguf(tmp_path / "there/model.gguf", tmp_path / "there")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("years")
    with pytest.raises(UserError, match="holds thesis"):
        import_gguf(tmp_path / "there/model.gguf", tmp_path / "other")
    assert (tmp_path / "there/model.gguf").exists() and (tmp_path / "other/thesis.txt").exists()


@pytest.mark.parametrize("model", ["llama", "qwen2"], indirect=True)
def test_q8_0_keeps_zeros_and_rounds_the_rest(model, tmp_path):
    export_gguf(model, tmp_path / "model.gguf", "q8_0")
    import_gguf(tmp_path / "model.gguf", tmp_path / "again")
    again = weights(tmp_path / "again")
    for name, tensor in weights(model).items():
        assert not again[name][tensor == 0].any(), name
        if tensor.dim() == 2:
            step = tensor.float().unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
            error = (again[name].float() - tensor.float()).unflatten(1, (-1, 32)).abs()
            # Half a step, and what storing the result in bf16 rounds.
            assert (error <= step * 0.51 + tensor.float().unflatten(1, (-1, 32)).abs() / 250).all(), name
        else:
            assert torch.equal(again[name], tensor), name


def test_the_tokenizer_comes_along(model, tmp_path):
    export_gguf(model, tmp_path / "model.gguf", "bf16")
    ours = AutoTokenizer.from_pretrained(model)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for words in ("def main():\n    return None", "Ünïcode  and  spaces 1234 "):
        assert ours(words).input_ids == theirs(words, add_special_tokens=False).input_ids
    assert (theirs.bos_token, theirs.eos_token) == (ours.bos_token, ours.eos_token)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD4099]"


def test_same_model_same_bytes(model, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        export_gguf(model, tmp_path / name / "model.gguf", "q8_0")
    assert (tmp_path / "one/model.gguf").read_bytes() == (tmp_path / "two/model.gguf").read_bytes()


@pytest.mark.parametrize("stored", ["another head", "only the head", "old frequencies", "no prefix"])
def test_weights_count_as_they_are_stored(stored, tmp_path):
    """Whatever config.json says of ties, under which name they are stored, and what more is in the files."""
    model = make("llama_tied", tmp_path)
    rest = load_file(model / "rest.safetensors")
    if stored == "another head":
        rest["lm_head.weight"] = rest["model.embed_tokens.weight"].flip(0)
    elif stored == "only the head":
        rest["lm_head.weight"] = rest.pop("model.embed_tokens.weight")
    elif stored == "old frequencies":
        rest["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    else:
        rest = {name.removeprefix("model."): tensor for name, tensor in weights(model).items()}
        for file in model.glob("model.layers*.safetensors"):
            file.unlink()
    save_file(rest, model / "rest.safetensors", {"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": {name: file.name for file in model.glob("*.safetensors") for name in load_file(file)},
    }
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    export_gguf(model, tmp_path / "model.gguf", "bf16")
    import_gguf(tmp_path / "model.gguf", tmp_path / "again")
    assert ("lm_head.weight" in weights(tmp_path / "again")) == (stored == "another head")
    assert torch.equal(logits(tmp_path / "again"), logits(model))


def edit_config(model, **changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def test_llama_3_scales_its_frequencies(model, tmp_path):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    edit_config(model, rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **scaling})
    export_gguf(model, tmp_path / "model.gguf", "bf16")
    factors = next(t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "rope_freqs.weight").data
    # The fastest pair turns as it did, the slowest an eighth as fast.
    assert factors.shape == (8,) and factors[0] == 1 and factors[-1] == pytest.approx(8)


# ---------------------------------------------------------------- tokenizers


def test_sentencepiece_tokens_scores_and_types(tmp_path):
    vocabulary = {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "▁": 3, "a": 4, "b": 5, "ab": 6, "▁ab": 7}
    merges = [("a", "b"), ("▁", "ab")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    state = json.loads(fast.backend_tokenizer.to_str())
    tokens, types = tokens_of(state, 9)
    assert tokens == [*vocabulary, "[PAD8]"]
    assert types == [2, 3, 6, 1, 1, 1, 1, 1, 5]
    scores = scores_of(tokens, ["a b", "▁ ab"])
    # The first merge first; what is no merge comes after all of them.
    assert scores[6] > scores[7] > max(score for score, token in zip(scores, tokens, strict=True) if "ab" not in token)


def test_a_special_token_without_a_row_is_left_out():
    state = {"model": {"vocab": {"a": 0, "<s>": 2}}, "added_tokens": [{"id": 2, "content": "<s>", "special": True}]}
    assert tokens_of(state, 2) == (["a", "[PAD1]"], [1, 5])


def test_a_tokenizer_to_which_a_letter_is_nothing(model, tmp_path):
    tokenizer = Tokenizer(models.BPE({"b": 0, "c": 1, "bc": 2}, [("b", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
    export_gguf(model, tmp_path / "model.gguf", "bf16")
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.add_bos_token"].contents() is False


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        ([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(add_prefix_space=False)], None),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], None),
        ([pre_tokenizers.Whitespace()], None),
    ],
)
def test_how_text_is_split(steps, name, tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    state = json.loads(tokenizer.to_str())
    if name:
        assert pre_tokenizer_of(state, tmp_path) == name
    else:
        with pytest.raises(UserError, match="splits text in a way"):
            pre_tokenizer_of(state, tmp_path)


# ---------------------------------------------------------------- what is refused


def refused(model, file, match):
    with pytest.raises(UserError, match=match) as caught:
        export_gguf(model, file, "bf16")
    assert "\n" not in str(caught.value) and str(model) in str(caught.value)
    assert not list(file.parent.glob("*.gguf*"))


@pytest.mark.parametrize("family", ["opt", "mixtral"])
def test_other_families(family, tmp_path):
    make_model(family, tmp_path / "base")
    refused(tmp_path / "base", tmp_path / "model.gguf", f"found the family '{family}'")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope scaling 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise(model, tmp_path, changes, match):
    edit_config(model, **changes)
    refused(model, tmp_path / "model.gguf", match)


def test_a_tensor_without_a_name(model, tmp_path):
    """A sliced model computes what no architecture of llama.cpp does."""
    slice_checkpoint(open_decoder(model, "cpu"), torch.arange(40)[None], 1, 32, tmp_path / "sliced", IDENTITY)
    refused(tmp_path / "sliced", tmp_path / "model.gguf", "model.layers.0.attention_shortcut has no name")


def test_a_tensor_that_is_not_there(model, tmp_path):
    shard = next(model.glob("model.layers.0*"))
    tensors = load_file(shard)
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, shard, {"format": "pt"})
    refused(model, tmp_path / "model.gguf", "no tensor for model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize(("hidden_size", "kind"), [(64, "MOSTLY_Q8_0"), (48, "MOSTLY_BF16")])
def test_rows_that_are_no_whole_blocks(hidden_size, kind, tmp_path, caplog):
    sizes = {"hidden_size": hidden_size, "intermediate_size": 72, "vocab_size": 4100}
    make_model("llama", tmp_path / "base", dtype="bfloat16", **sizes)
    shutil.copyfile(ROOT / "resources/pydoc-llama/tokenizer.json", tmp_path / "base/tokenizer.json")
    export_gguf(tmp_path / "base", tmp_path / "model.gguf", "q8_0")
    assert "matrices stay bf16" in caplog.text
    told = gguf.GGUFReader(tmp_path / "model.gguf").fields["general.file_type"].contents()
    assert gguf.LlamaFileType(told).name == kind


# ---------------------------------------------------------------- by hand, and in llama.cpp


def test_the_script(model, tmp_path):
    command = [sys.executable, ROOT / "workflow/scripts/gguf_file.py", "--model", model, "--output"]
    finished = subprocess.run([*command, tmp_path / "model.gguf"], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    export_gguf(model, tmp_path / "ours.gguf", "bf16")
    assert (tmp_path / "model.gguf").read_bytes() == (tmp_path / "ours.gguf").read_bytes()


@pytest.mark.parametrize(("values", "tolerance"), [("bf16", 0.1), ("q8_0", 0.2)])
@torch.no_grad()
def test_llama_cpp_computes_the_same(values, tolerance, tmp_path):
    """The tokens of a text, and how likely the next ones are; the bundled model in three tiers."""
    llama_cpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install xllamacpp)")
    prune_by_magnitude(ROOT / "resources/pydoc-llama", tmp_path)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", values)
    parameters = llama_cpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.cpuparams.n_threads = str(tmp_path / "model.gguf"), 128, 1
    prompt = "Return the length of the list, 12 items."
    asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 5}
    answer = llama_cpp.Server(parameters).handle_completions(asked)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")(prompt, return_tensors="pt").input_ids
    assert answer["usage"]["prompt_tokens"] == tokens.numel()
    ours = load_whole(tmp_path / "model", "cpu")(tokens).logits[0, -1].float().log_softmax(-1)
    for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        assert token["logprob"] == pytest.approx(ours[token["id"]].item(), abs=tolerance)
