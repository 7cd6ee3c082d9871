"""What transformers makes of odd folders: one line with its reason, before anything is trained on them."""

import json
import logging
import runpy
import shutil
import subprocess
import sys
from contextlib import nullcontext
from logging.handlers import MemoryHandler
from pathlib import Path

import pytest
import torch
from families import make_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM

from stepdown.cli import log
from stepdown.errors import UserError
from stepdown.models.decoder import build_empty, open_decoder
from stepdown.models.layer_walk import LayerWalk
from stepdown.models.loading import load_model, load_tokenizer, told_in_one_line

ROOT = Path(__file__).parents[2]
TOKENIZER = [ROOT / "resources/pydoc-llama" / name for name in ("tokenizer.json", "tokenizer_config.json")]


def words():
    """A tokenizer that knows two words, and no word for others."""
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer.to_str()


@pytest.fixture
def model(tmp_path):
    folder = make_model("llama", tmp_path / "model", vocab_size=4096)
    for file in TOKENIZER:
        shutil.copyfile(file, folder / file.name)
    return folder


def change(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def change_weights(folder, do):
    weights = load_file(folder / "model.safetensors")
    do(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def base_model(folder, monkeypatch):
    """What the script says of a folder: its last line, of which it has only one where it fails."""
    out = folder.parent / "out"
    words = ["--model", folder, "--output-model", out / "model", "--output-tier-map", out / "map", "--log", out / "log"]
    monkeypatch.setattr(sys, "argv", ["base_model", *map(str, words)])
    monkeypatch.syspath_prepend(str(ROOT / "workflow/scripts"))
    try:
        runpy.run_path(str(ROOT / "workflow/scripts/base_model.py"), run_name="__main__")
    except SystemExit as end:
        assert end.code == 1 and not (out / "map").exists()
    finally:
        log.propagate = True
        log.handlers.clear()
    return (out / "log").read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"num_attention_heads": 5}, "hidden size (48) is not a multiple of the number of attention heads (5)"),
        ({"num_attention_heads": 0, "head_dim": None}, "ZeroDivisionError"),
        ({"dtype": "float99"}, "no attribute 'float99'"),
        ({"hidden_act": "foo"}, "KeyError: 'foo'"),
        ({"model_type": "foo"}, "does not recognize this architecture"),
        ({"vocab_size": "4096"}, "expected int, got str"),
        ({"intermediate_size": -3}, "negative dimension"),
        ({"pad_token_id": 99999}, "Padding_idx must be within num_embeddings"),
        ({"text_config": {"vocab_size": 3}}, "not a causal language model"),
        ({"attn_implementation": "foo"}, "is not supported"),
        ({"model_type": "foo", "auto_map": {"AutoConfig": "own.Own"}}, "set trust_remote_code: true"),
        ({"quantization_config": "int4"}, "quantised or packed already"),
        ({"quantization_config": {"quant_method": "fp8"}}, "give the model before that"),
        ({"vocab_size": 5000}, "embed_tokens.weight [5000, 48], the weights hold [4096, 48]"),
        ({"num_key_value_heads": 4}, "k_proj.weight [48, 48], the weights hold [24, 48]"),
        ({"intermediate_size": 80}, "gate_proj.weight [80, 48], the weights hold [72, 48]"),
        ({"num_hidden_layers": 6}, "no tensor for model.layers.5."),
        ({"num_hidden_layers": 2}, "config.json has 2 layers, the weights also hold model.layers.2."),
    ],
    ids=str,
)
def test_a_config_of_no_or_another_model_is_told_by_the_first_job(model, monkeypatch, keys, told):
    change(model, **keys)
    line = base_model(model, monkeypatch)
    assert told in line and str(model.parent) in line, line


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"generation_config.json": '{"max_new_tokens": -1}'}, "generation_config.json: transformers cannot read it"),
        ({"generation_config.json": "null"}, "generation_config.json: transformers cannot read it"),
        ({"tokenizer.json": None}, "; copy its tokenizer.json too, or pip install"),
        ({"tokenizer.json": None, "tokenizer.model": "abcd"}, "copy its tokenizer.json too, or pip install"),
        ({"tokenizer.json": '{"model": {}}'}, "no tokenizer that transformers can load (KeyError"),
        ({"tokenizer.json": words(), "tokenizer_config.json": "{}"}, "Missing [UNK] token from the vocabulary); mend"),
    ],
    ids=str,
)
def test_a_file_that_a_later_job_would_trip_over_is_told_by_the_first(model, monkeypatch, files, told):
    for name, content in files.items():
        (model / name).write_text(content or "")
        if content is None:
            (model / name).unlink()
    assert told in base_model(model, monkeypatch)


@pytest.mark.parametrize("whole", [True, False])
def test_pickled_weights_of_old_are_read_to_their_end(model, monkeypatch, whole):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    pickle = model / "pytorch_model.bin"
    torch.save(weights, pickle, _use_new_zipfile_serialization=False)
    generation = {"do_sample": False, "temperature": 0.5, "num_beams": 0}
    (model / "generation_config.json").write_text(json.dumps(generation))
    if whole:
        assert "matrices to prune" in base_model(model, monkeypatch)
        out = model.parent / "out/model"
        assert json.loads((out / "generation_config.json").read_text()) == generation
        assert load_file(out / "model.safetensors").keys() == weights.keys()
    else:
        pickle.write_bytes(pickle.read_bytes()[:-1000])
        assert f"error: {model}: not a causal language model that transformers can load" in base_model(
            model, monkeypatch
        )


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"num_hidden_layers": 6}, "no tensor for model.layers.5."),
        ({"num_hidden_layers": 4}, "the weights also hold model.layers.4."),
        ({"tie_word_embeddings": False}, "no tensor for lm_head.weight"),
    ],
    ids=str,
)
def test_nothing_is_made_up_or_left_out_of_pickled_weights(model, monkeypatch, keys, told):
    """As transformers does with a word that nobody reads."""
    weights = load_file(model / "model.safetensors")
    if "tie_word_embeddings" in keys:
        weights.pop("lm_head.weight")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    change(model, **keys)
    assert told in base_model(model, monkeypatch)


@pytest.mark.parametrize("is_decoder", [True, False])
def test_tokens_that_see_those_after_them_are_refused(tmp_path, monkeypatch, is_decoder):
    folder = make_model("bert", tmp_path / "model", is_decoder=is_decoder)
    line = base_model(folder, monkeypatch)
    assert ("each token of the family 'bert' sees those after it" in line) != is_decoder


def test_a_model_that_is_sliced_already(model, monkeypatch):
    (model / "slicing.json").write_text(json.dumps({"format": "stepdown sliced 1", "width": 32}))
    assert "sliced already, which transformers does not load" in base_model(model, monkeypatch)


def test_flash_attention_that_is_not_there_is_replaced_with_a_word(model, caplog):
    tokens = torch.arange(24).view(2, 12)
    expected = load_model(model, torch.float32)(tokens).logits
    change(model, attn_implementation="flash_attention_2")
    decoder = open_decoder(model, "cpu")
    assert decoder.model.config._attn_implementation == "sdpa"
    assert "flash_attention_2 is not to be had here" in caplog.text and "sdpa takes its place" in caplog.text
    assert torch.equal(load_model(model, torch.float32)(tokens).logits, expected)


@pytest.mark.parametrize("fails", [True, False])
def test_what_transformers_warns_of_is_read_only_where_nothing_fails(fails):
    told = MemoryHandler(capacity=10)
    library = logging.getLogger("transformers")
    library.addHandler(told)
    try:
        with pytest.raises(UserError) if fails else nullcontext(), told_in_one_line("folder", "no model"):
            logging.getLogger("transformers.models").error("odd")
            assert not told.buffer
            if fails:
                raise KeyError("a reason")
    finally:
        library.removeHandler(told)
    assert [record.getMessage() for record in told.buffer] == ([] if fails else ["odd"])


@pytest.mark.parametrize(
    ("rename", "told"),
    [
        (lambda name: f"module.{name}", "the weights hold module.lm_head.weight and the like"),
        (lambda name: None, "the weights hold nothing"),
    ],
)
def test_weights_under_names_of_their_own(model, monkeypatch, rename, told):
    """As training in several processes saves them, for one."""
    weights = {rename(name): tensor for name, tensor in load_file(model / "model.safetensors").items() if rename(name)}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    line = base_model(model, monkeypatch)
    assert "config.json asks for model.layers.0." in line and told in line


def test_weights_in_whole_numbers_are_refused(model, monkeypatch):
    change_weights(model, lambda weights: weights.update({"lm_head.weight": torch.ones(4096, 48, dtype=torch.int8)}))
    assert "lm_head.weight is stored as whole numbers" in base_model(model, monkeypatch)


def test_a_config_that_asks_for_outputs_without_names_changes_nothing(model):
    tokens = torch.arange(24).view(2, 12)
    expected = load_model(model, torch.float32)(tokens).logits
    change(model, return_dict=False, output_hidden_states=True)
    assert torch.equal(load_model(model, torch.float32)(tokens).logits, expected)
    walk = LayerWalk(open_decoder(model, "cpu"), [tokens])
    for _, _, replay in walk.layers(None):
        replay()
    torch.testing.assert_close(next(walk.logits()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_tied_weights_are_found_under_either_name(tmp_path, stored):
    folder = make_model("llama_tied", tmp_path / "model")

    def rename(weights):
        matrix = weights.pop("model.embed_tokens.weight")
        names = ("lm_head.weight", "model.embed_tokens.weight") if stored == "both" else (stored,)
        weights.update({name: matrix.clone() for name in names})

    change_weights(folder, rename)
    tokens = torch.arange(24).view(2, 12)
    walk = LayerWalk(open_decoder(folder, "cpu"), [tokens])
    for _, _, replay in walk.layers(None):
        replay()
    whole = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    torch.testing.assert_close(next(walk.logits()), whole, rtol=1e-5, atol=1e-6)


def test_more_tokens_than_rows_are_told_with_both_sizes(model):
    assert load_tokenizer(model).embedding_rows == 4096
    change(model, vocab_size=4000)
    with pytest.raises(UserError, match="the tokenizer has 4096 tokens, the embedding 4000 rows"):
        load_tokenizer(model)


def test_a_model_without_a_fault_is_built_without_a_word(model, caplog):
    build_empty(model)
    load_tokenizer(model)
    assert not caplog.text


@pytest.mark.parametrize("early", ["", "import transformers; "])
def test_no_library_draws_bars_of_its_own(model, early):
    code = (
        f"import argparse; {early}from stepdown import cli; from stepdown.models.loading import load_model;"
        f"cli.run(lambda _: load_model({str(model)!r}), argparse.ArgumentParser())"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "workflow/scripts"
    )
    assert finished.returncode == 0 and "Loading weights" not in finished.stderr, finished.stderr
