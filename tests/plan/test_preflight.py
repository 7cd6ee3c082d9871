"""What is checked before the first job: one clear line for each mistake, nothing to say about what is right."""

import contextlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from stepdown import text
from stepdown.errors import UserError
from stepdown.files import fitting
from stepdown.plan import preflight
from stepdown.plan.block_size import check_block
from stepdown.plan.compressions import check_step

ROOT = Path(__file__).parents[2]
SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())
PUBLISHED = ROOT / "config/published.yaml"  # goes over the overlay of a model
CONFIGS = sorted({*(ROOT / "config").glob("*.yaml")} - {PUBLISHED})


def complete(config):
    return preflight.complete_config(config, SCHEMA)


def error_of(check, *arguments):
    with pytest.raises(UserError) as caught:
        check(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- the configuration -----------------------------------------------------------------------------------------------


def test_defaults_are_of_the_published_size():
    config = complete({})
    pruning, calibration = config["pruning"], config["calibration"]
    assert (pruning["block_size"], pruning["k"], pruning["selection"]) == (16, 10, "wanda")
    assert (pruning["top_blocks"], pruning["threshold"]) == (0.6, 0.8)
    assert (calibration["samples"], calibration["sequence_length"], calibration["batch_size"]) == (128, 2048, 1)
    recovery = config["recovery"]
    assert (recovery["batch_size"], recovery["gradient_accumulation"], recovery["learning_rate"]) == (4, 4, 2e-5)
    assert (recovery["bf16"], recovery["evaluation_steps"], recovery["checkpoints_kept"]) == (True, 100, 2)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_names_every_key(path):
    """An overlay goes over config.yaml: a key it leaves out would be that of a small machine."""
    config = yaml.safe_load(path.read_text())
    assert complete(config) == config


def test_the_published_method_goes_over_any_model():
    config = yaml.safe_load(PUBLISHED.read_text())
    complete(config)
    of_the_model = {key for key, _ in flat(config)} & {"model", "device", "recovery.text", "recovery.sequence_length"}
    assert not of_the_model and not {"calibration", "evaluation"} & config.keys()


def test_the_readme_tells_every_key_and_its_default():
    told, section = {}, ""
    for line in (ROOT / "config/README.md").read_text().splitlines():
        if heading := re.match(r"`(\w+)`: ", line):
            section = f"{heading[1]}."
        elif row := re.match(r"\| `([\w.]+)` \|.*\| `(.+)` \|$", line):
            told[section + row[1]] = row[2]
    assert told == {key: yaml_text(default) for key, default in flat(complete({}))}


def flat(section, prefix=""):
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def yaml_text(value):
    """A value as a config file has it."""
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    return "2.0e-5" if value == 2e-5 else value if isinstance(value, str) else json.dumps(value)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"modle": "x"}, "unknown key modle; did you mean model?"),
        ({"recovery": {"learning_rat": 1}}, "unknown key recovery.learning_rat; did you mean learning_rate?"),
        ({"recovery": {"lora": {"r": 8}}}, "unknown key recovery.lora.r; the keys here are rank"),
        ({3: 4}, "unknown key 3"),
        ({"recovery": {"learning_rate": "2e-5"}}, "recovery.learning_rate: found '2e-5'; write 2.0e-5"),
        ({"recovery": {"learning_rate": "1E4"}}, "write 1.0e+4"),
        ({"recovery": {"learning_rate": "fast"}}, "found 'fast'; write a number, above 0"),
        ({"recovery": {"learning_rate": 0}}, "above 0"),
        ({"recovery": {"learning_rate": math.nan}}, "found nan"),
        ({"recovery": {"weight_decay": math.inf}}, "found inf"),
        ({"recovery": {"bf16": 1}}, "found 1; write true or false"),
        ({"recovery": {"method": "half"}}, "write full or lora"),
        ({"recovery": {"lora": {"dropout": 1}}}, "at least 0, below 1"),
        ({"recovery": None}, "recovery: found nothing; write a section of keys"),
        ({"recovery": [1]}, "recovery: found [1]; write a section of keys"),
        ({"calibration": {"samples": True}}, "calibration.samples: found True; write a whole number"),
        ({"calibration": {"samples": 1.5}}, "found 1.5"),
        ({"calibration": {"samples": 0}}, "at least 1"),
        ({"calibration": {"text": 3}}, "calibration.text: found 3"),
        ({"calibration": {"text": {"tarin": "a.txt"}}}, "unknown key calibration.text.tarin; did you mean train?"),
        ({"pruning": {"block_size": 18}}, "pruning.block_size: found 18"),
        ({"pruning": {"k": -1}}, "pruning.k: found -1"),
        ({"evaluation": {"texts": []}}, "evaluation.texts: found []"),
        ({"evaluation": {"texts": "pydoc"}}, "evaluation.texts: found 'pydoc'; write a list"),
        ({"oneshot": "wanda-2of4"}, "oneshot: found 'wanda-2of4'; write a list"),
        (
            {"layer_sparsity": {"table": {"q_proj": 1}}},
            "layer_sparsity.table.q_proj: found 1; write a number, at least 0",
        ),
        ({"layer_sparsity": {"owl_lambda": 5}}, "owl_lambda: found 5; write a number, at least 0, at most 0.5"),
        ({"seed": 2**32}, "seed: found 4294967296; write a whole number, at least 0, at most 4294967295"),
        ({"recovery": {"lora": {"targets": []}}}, "targets: found []; write text or a list, at least 1 of them"),
        ({"device": "gpu"}, "device: found 'gpu'; write auto or cpu or cuda"),
        ({"speed": {"packed": ["int2"]}}, "speed.packed: found 'int2'; write bf16 or int8"),
        ({"model": None}, "model: found nothing; write text"),
        ({"seed": "x: ["}, "seed: found 'x: ['"),
        ({"model": yaml.safe_load("2024-10-01")}, "is text as ./2024_10"),
        ({"model": yaml.safe_load("on")}, "found True; write text (a name that YAML reads otherwise"),
    ],
)
def test_a_wrong_key_or_value_is_one_clear_line(config, told):
    assert told in error_of(complete, config)


def test_numbers_given_as_text_are_read_as_yaml_reads_them():
    """As `--config 'pruning={k: 8}'` gives them."""
    config = complete({"pruning": {"k": "8"}, "recovery": {"learning_rate": "2.0e-5", "tokens_per_epoch": "null"}})
    assert config["pruning"]["k"] == 8
    assert (config["recovery"]["learning_rate"], config["recovery"]["tokens_per_epoch"]) == (2e-5, None)
    assert complete({"schedule": "null"})["schedule"] is None
    assert complete({"layer_sparsity": {"table": {"q_proj": "0.3"}}})["layer_sparsity"]["table"] == {"q_proj": 0.3}
    samples = complete({"calibration": {"samples": 64.0}})["calibration"]["samples"]
    assert isinstance(samples, int)
    assert samples == 64


@pytest.mark.parametrize(
    ("key", "section"),
    [("calibration", "{samples: 8}"), ("evaluation", '{texts: ["pydoc"]}'), ("pruning", "{target: {bytes: 0.5}}")],
)
def test_a_section_given_as_text_is_complete(key, section):
    """Quoted once too often: it has its defaults, and its keys are looked at."""
    assert complete({key: section}) == complete({key: yaml.safe_load(section)})
    assert f"unknown key {key}.{section[1:4]}zz" in error_of(complete, {key: f"{section[:4]}zz: 1}}"})


def test_adapter_targets_that_match_nothing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    names = ("layers.0.q_proj", "layers.0.up_proj", "embed_tokens", "lm_head")
    tensors = {f"{name}.weight": torch.ones(2, 2) for name in names}
    save_file(tensors, tmp_path / "model.safetensors")
    for targets in ("all-linear", "q_proj", ["layers.0.up_proj", "q_proj"]):
        preflight.check_adapter_targets(targets, tmp_path)
    told = error_of(preflight.check_adapter_targets, ["q_proj", "v_proj"], tmp_path)
    assert told == f"config key recovery.lora.targets: found 'v_proj'; {tmp_path} has q_proj, up_proj, or all-linear"
    for other in ("proj", "embed_tokens", "lm_head"):
        assert f"found '{other}'" in error_of(preflight.check_adapter_targets, other, tmp_path)


def test_shards_want_several_processes():
    assert "recovery.sharded: found true with one" in error_of(
        preflight.check_inputs, complete({"recovery": {"sharded": True}})
    )


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"schedule": None}, "packs the last iteration, but schedule is null; write packed: []"),
        (
            {"pruning": {"block_size": 32}},
            "found 32; models are packed in blocks of 16; write that, or speed.packed: []",
        ),
    ],
)
def test_packed_models_that_cannot_be_measured(other, told):
    assert told in error_of(preflight.check_inputs, complete({"speed": {"packed": ["int8"]}} | other))
    preflight.check_packed(complete(other))


def test_little_memory_wants_bfloat16():
    assert "recovery.memory: found low, which computes in bfloat16" in error_of(
        preflight.check_inputs, complete({"recovery": {"memory": "low", "bf16": False}})
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target": {"bytes": 0.5, "sparsity": 0.5}}, "write one of {bytes: 0.5} and {sparsity: 0.6}"),
        ({"target": {}}, "pruning.target: found {}; write one of"),
        ({"cost": "wanda"}, "pruning.target: goes with pruning.cost: fisher only; found wanda"),
        ({"shared_over": "matrix"}, "goes with pruning.shared_over: model only; found matrix"),
        ({"block_size": 32}, "models are packed in blocks of 16, found 32; write a sparsity"),
        ({"target": {"bytes": 0.06}}, "found {'bytes': 0.06}; TopK everywhere is {bytes: 0.061}, {sparsity: 0.961}"),
        ({"target": {"sparsity": 0.97}}, "found {'sparsity': 0.97}; TopK everywhere is"),
    ],
)
def test_a_target_that_cannot_be(changes, told):
    pruning = complete({"pruning": {"target": {"bytes": 0.5}}})["pruning"]
    preflight.check_target(pruning)
    assert told in error_of(preflight.check_target, pruning | changes)


def test_block_size_and_k():
    check_block(4, 16)
    assert "multiple of 4" in error_of(check_block, 18, 10)
    assert "a block of 8x8 has 64 entries" in error_of(check_block, 8, 65)


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    """A folder that looks like a model of two shards."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 128}))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1, "c": 2}}}))
    for name in "ab":
        save_file({name: torch.ones(3, 5)}, folder / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in "ab"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_whole_model(model):
    preflight.check_model(model)
    preflight.check_length("here", 128, model)


def test_a_model_in_one_file(model):
    (model / "model.safetensors.index.json").unlink()
    (model / "a.safetensors").rename(model / "model.safetensors")
    preflight.check_model(model)


def test_pickled_weights_are_for_the_first_job(model):
    for file in model.glob("*.safetensors*"):
        file.unlink()
    torch.save({"a": torch.ones(3, 5)}, model / "pytorch_model.bin")
    preflight.check_model(model)


@pytest.mark.parametrize("cut", [1, 30, 130, 10_000])
def test_a_truncated_shard(model, cut):
    shard = model / "b.safetensors"
    shard.write_bytes(shard.read_bytes()[:-cut])
    assert "b.safetensors" in error_of(preflight.check_model, model)


def test_a_shard_that_is_something_else(model):
    (model / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "a.safetensors" in error_of(preflight.check_model, model)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "b.safetensors", "model.safetensors.index.json", "generation_config.json"]
)
def test_a_pointer_of_git_lfs(model, name):
    (model / name).write_text(POINTER)
    assert f"{name}: only a pointer of git-lfs" in error_of(preflight.check_model, model)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda saved: saved[:-100], "truncated"),
        (lambda saved: saved[:100], "truncated"),
        (lambda saved: b"", "truncated (0 bytes)"),
        (lambda saved: POINTER.encode(), "only a pointer of git-lfs"),
        (lambda saved: b"<html>", "no pickled weights"),
    ],
)
def test_pickled_weights_that_are_not_whole(model, damage, told):
    for file in model.glob("*.safetensors*"):
        file.unlink()
    torch.save({"a": torch.ones(3, 5)}, model / "pytorch_model.bin")
    (model / "pytorch_model.bin").write_bytes(damage((model / "pytorch_model.bin").read_bytes()))
    assert told in error_of(preflight.check_model, model)


def test_pickled_weights_of_which_a_file_is_missing(model):
    for file in model.glob("*.safetensors*"):
        file.unlink()
    torch.save({"a": torch.ones(3, 5)}, model / "pytorch_model-1.bin")
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "pytorch_model-2.bin, named in pytorch_model.bin.index.json, is missing" in error_of(
        preflight.check_model, model
    )


ADDED = [{"id": 3, "content": "<a>"}, {"id": 4, "content": "<b>"}]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"tokenizer.json": ""}, "tokenizer.json: not JSON"),
        ({"tokenizer.json": "{}"}, "describes no tokenizer"),
        ({"tokenizer.json": {"model": {"vocab": "x"}}}, "its tokens are no list"),
        (
            {"tokenizer.json": {"model": {"vocab": {}}, "added_tokens": [{"id": [1]}]}},
            "an added token without a number",
        ),
        ({"tokenizer_config.json": "["}, "tokenizer_config.json: not JSON"),
        ({"tokenizer.json": None, "vocab.json": {"a": 0}}, "vocab.json without merges.txt"),
        (
            {"tokenizer.json": None, "vocab.json": {"a": 9}, "merges.txt": ""},
            "has 10 tokens, the embedding 3 rows",
        ),
        (
            {"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 3}}}},
            "has 4 tokens, the embedding 3 rows",
        ),
        (
            {"tokenizer.json": {"model": {"vocab": [["a", 0.0]] * 4}}},
            "has 4 tokens, the embedding 3 rows",
        ),
        ({"tokenizer.json": {"model": {"vocab": {}}, "added_tokens": ADDED}}, "has 5 tokens, the embedding 3 rows"),
    ],
)
def test_a_tokenizer_that_is_none_or_of_another_model(model, files, told):
    for name, content in files.items():
        (model / name).write_text(content if isinstance(content, str) else json.dumps(content))
        if content is None:
            (model / name).unlink()
    assert told in error_of(preflight.check_model, model)


ODD = [None, "x", "", -1, 10**30, 1.5, True, [], [None], {}, {"a": None}, math.inf, math.nan]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_whatever_a_file_holds_is_one_line_or_none(model, name):
    (model / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 3}, "hidden_size": 5}))
    tokens = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "special": True}]}
    (model / "tokenizer.json").write_text(json.dumps(tokens))
    whole = (model / name).read_text()
    for content in (changed for odd in ODD for changed in with_each_replaced(json.loads(whole), odd)):
        (model / name).write_text(json.dumps(content))
        for check, *more in (
            *((preflight.check_model, model), (preflight.check_length, "here", 2, model)),
            *((check_step, "structured/shortgpt-2", model), (check_step, "quantised/int8-g5/iter0", model)),
        ):
            with contextlib.suppress(UserError):
                check(*more)


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_whatever_a_header_says_is_one_line_or_none(model, key):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for odd in ODD:
        for content in with_each_replaced({"a": entry | {key: [odd, odd]}}, odd):
            header = json.dumps(content).encode()
            (model / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
            with contextlib.suppress(UserError):
                preflight.check_model(model)


def with_each_replaced(content, odd):
    """The content with one of its values replaced, itself included, after the other."""
    yield odd
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        for changed in with_each_replaced(content[key], odd):
            whole = content.copy()
            whole[key] = changed
            yield whole


def test_a_special_token_needs_no_row(model):
    """As Gemma 3 is published: no text holds it."""
    special = [token | {"special": True} for token in ADDED]
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 2}}, "added_tokens": special}))
    preflight.check_model(model)


@pytest.mark.parametrize("section", ["", "text_config"])
def test_a_model_that_is_quantised_already(model, section):
    """By others, or by this project: what is written from it would be no such model any more."""
    found = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (model / "config.json").write_text(json.dumps({section: found} if section else found))
    assert "quantised or packed already (quantization_config in config.json)" in error_of(preflight.check_model, model)


def test_a_line_break_in_a_name_is_no_second_line(tmp_path):
    assert "no folder a\\nb; name" in error_of(preflight.local_model, "a\nb")


def test_an_adapter_beside_the_weights(model):
    """transformers would load it too, and nothing else here."""
    (model / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in error_of(preflight.check_model, model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "b.safetensors"])
def test_a_missing_file(model, name):
    (model / name).unlink()
    assert name in error_of(preflight.check_model, model)


def test_a_model_without_weights(model):
    for file in model.glob("*.safetensors*"):
        file.unlink()
    assert "no weights" in error_of(preflight.check_model, model)


@pytest.mark.parametrize("content", ["", "{", "[]", '"model"', '{"rms_norm_eps": NaN}', "[" * 100_000, "\ufeff{}"])
def test_a_config_that_is_none(model, content):
    (model / "config.json").write_text(content)
    assert "config.json" in error_of(preflight.check_model, model)


@pytest.mark.parametrize("config", [{"n_positions": 64}, {"text_config": {"max_position_embeddings": 64}}])
def test_a_sequence_longer_than_the_model_allows(model, config):
    (model / "config.json").write_text(json.dumps(config))
    preflight.check_length("config key calibration.sequence_length", 64, model)
    message = error_of(preflight.check_length, "config key calibration.sequence_length", 65, model)
    assert "calibration.sequence_length: found 65" in message
    assert "at most 64" in message


def test_a_measured_prompt_is_as_long_as_the_model_allows(model):
    (model / "config.json").write_text(json.dumps({"n_positions": 64, "text_config": {"hidden_size": 4}}))
    expected = {(32, 32): (32, 32), (60, 5): (59, 5), (128, 32): (32, 32), (8, 100): (1, 63)}
    assert {tokens: fitting(*tokens, model) for tokens in expected} == expected
    assert "at most 64" in error_of(preflight.check_length, "here", 65, model)


def test_results_that_lead_nowhere(tmp_path):
    (tmp_path / "results").symlink_to(tmp_path / "disk")
    assert "results: links to" in error_of(preflight.check_writable, tmp_path / "results")
    (tmp_path / "disk").mkdir()
    preflight.check_writable(tmp_path / "results")
    (tmp_path / "file").touch()
    assert "file: is a file, where a run has a folder" in error_of(preflight.check_writable, tmp_path / "file")


@pytest.mark.parametrize("step", ["quantised/int8/iter01", "quantised/int8/iter00", "dynamic/uniform-0.5/iter٣"])
def test_a_step_by_another_number(step):
    assert "of which step?" in error_of(check_step, step, None)


def test_a_name_of_another_allocation_says_how_each_is_written():
    assert "write one of uniform-0.5, greedy-0.5" in error_of(check_step, "dynamic/foo/iter1", None)


def test_a_sliced_model_is_quantised_in_groups_of_what_is_left(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64, "intermediate_size": 128}))
    check_step("quantised/gptq4-g16/iter1", tmp_path, 8)
    check_step("quantised/gptq4-g8/structured/slicegpt-0.2", tmp_path, 8)
    check_step("quantised/gptq4-g16/structured/slicegpt-0.2", tmp_path, 16)
    told = error_of(check_step, "quantised/gptq4-g16/structured/slicegpt-0.1", tmp_path, 8)
    assert told == "group size 16: does not divide the 56 inputs of the sliced model; choose a divisor"


def test_a_folder_or_a_hub_id(model, monkeypatch):
    assert preflight.local_model(str(model)) == model
    assert preflight.local_model("meta-llama/Llama-2-7b-hf") is None
    assert preflight.local_model("gpt2") is None
    monkeypatch.chdir(model.parent.parent)
    near = f"{model.parent.name}/modell"
    assert "found -m, which a command line takes for an option; write ./-m" in error_of(preflight.local_model, "-m")
    for missing in (near, f"./{near}", str(model.parent / "x"), "~/model", "a/b/c", str(model / "config.json")):
        assert f"no folder {missing}" in error_of(preflight.local_model, missing)


# --- texts -----------------------------------------------------------------------------------------------------------


def test_the_corpora_are_those_that_can_be_read():
    assert set(preflight.CORPORA) == set(text._SOURCES)
    assert set(preflight.TEXT_ENDINGS) == {*text._PLAIN, ".jsonl", ".parquet"}


def test_texts(tmp_path):
    file = tmp_path / "some.txt"
    file.write_text("word " * 100)
    check = preflight.check_text
    check("here", "pydoc", ("train",), 2048)
    check("here", str(file), ("train",), 500)
    check("here", {"train": str(file)}, ("train",), 500)
    assert "has 500 bytes, too few" in error_of(check, "here", str(file), ("train",), 501)
    assert "here: no file wikitex2; name a file or one of pydoc" in error_of(check, "here", "wikitex2", ("train",), 8)
    assert "no file" in error_of(check, "here", str(tmp_path), ("train",), 8)
    splits = {"train": str(file), "test": "nowhere.txt"}
    assert "found -a.txt, which a command line takes for an option; write ./-a.txt" in error_of(
        check, "here", {"train": "-a.txt"}, ("train",), 8
    )
    assert "no file for the split valid" in error_of(check, "here", splits, ("train", "valid"), 8)
    assert "no file nowhere.txt" in error_of(check, "here", splits, ("test",), 8)
    only_files = "no file pydoc; name a file: split by split, a text is of files only"
    assert only_files in error_of(check, "here", {"train": "pydoc"}, ("train",), 8)
    other = tmp_path / "some.doc"
    other.write_text("word " * 100)
    assert "some.doc ends in none of .txt" in error_of(check, "here", str(other), ("train",), 8)


def test_a_text_that_is_only_a_pointer(tmp_path):
    (tmp_path / "a.txt").write_text(POINTER)
    assert "a.txt: only a pointer" in error_of(preflight.check_text, "here", str(tmp_path / "a.txt"), ("test",), 8)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"caf\xe9 " * 20, "a.txt is not UTF-8 at byte 3; convert it"),
        ("a.jsonl", b"\xff\xfe" + b"x\0" * 20, "a.jsonl is not UTF-8 at byte 0; convert it"),
        ("a.md", b"\x1f\x8b" + b"x" * 20, "a.md is not UTF-8 at byte 1; convert it"),
        ("a.parquet", b"PAR1" + b"x" * 20, "a.parquet is no Parquet file, or not whole"),
        ("a.parquet", b"PA", "a.parquet is no Parquet file, or not whole"),
    ],
)
def test_a_text_in_another_form(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    assert told in error_of(preflight.check_text, "here", str(tmp_path / name), ("test",), 8)


def test_a_character_may_lie_across_the_end_of_what_is_looked_at(tmp_path):
    (tmp_path / "a.txt").write_text("x" * (preflight.BEGINNING - 1) + "é")
    preflight.check_text("here", str(tmp_path / "a.txt"), ("train",), 8)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"content": "some text", "id": 3}\n', "a.jsonl has no 'text', only content, id; rename its key"),
        ('{"text": null}\n', "has null under 'text'; write a string"),
        ('\n["some text", "more"]\n', "has no 'text', only list"),
        ('[\n{"text": "some text"}\n]', "a.jsonl is not JSON (Expecting value"),
    ],
)
def test_the_first_row_is_looked_at(tmp_path, content, told):
    (tmp_path / "a.jsonl").write_text(content)
    assert told in error_of(preflight.check_text, "here", str(tmp_path / "a.jsonl"), ("train",), 8)
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n')
    preflight.check_text("here", str(tmp_path / "a.jsonl"), ("train",), 8)


def test_a_text_that_cannot_be_cut_between_lines(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("word " * 100 + "\n\n")
    told = error_of(preflight.check_text, "here", str(file), ("train", "valid"), 8)
    assert "a.txt, cut between lines at 80 and 90 %, has 0 bytes of text for valid, too few for one sequence" in told
    preflight.check_text("here", {"train": str(file), "valid": str(file)}, ("train", "valid"), 8)
    file.write_bytes(b"word \r" * 100)
    preflight.check_text("here", str(file), ("train", "valid"), 8)


@pytest.mark.parametrize(
    ("name", "content", "split", "told"),
    [
        ("a.txt", "word\n" * 100, "valid", "has 50 bytes of text for valid, too few for one sequence of 64 tokens"),
        ("a.md", "word\n" * 100, "test", "has 50 bytes of text for test"),
        ("a.txt", "\ufeff" + ("word " * 1000 + "\n") * 3, "test", "between lines at 80 and 90 %, has 0 bytes"),
        ("a.txt", "word\n" * 8000 + "\n" * 5000, "test", None),
        ("a.txt", "word " * 100 + "\n" * 80, "test", "has 0 bytes of text for test"),
        ("a.jsonl", '{"text": "some \\udc80 text"}\n' * 30, "valid", "between rows at 80 and 90 %, has 43 bytes"),
        ("a.jsonl", '{"text": "some text"}\n' * 80, "valid", None),
        ("a.jsonl", '{"text": "some text"}\n{"text": 3}\n' * 30, "valid", None),
        ("a.txt", "word\n" * 16, "train", "has 65 bytes of text for train"),
    ],
)
def test_a_split_too_short_for_one_sequence(tmp_path, name, content, split, told):
    """Cut as the jobs cut it; a row that is none is theirs to tell."""
    file = tmp_path / name
    file.write_text(content)
    length = 66 if split == "train" else 64
    if told:
        assert told in error_of(preflight.check_text, "here", str(file), (split,), length)
        found = len("\n\n".join(text._file_documents(str(file), split)).encode())
        assert found < length or not "".join(text._file_documents(str(file), split)).strip()
    else:
        preflight.check_text("here", str(file), (split,), length)


def test_a_name_that_is_no_text_stands_in_no_result():
    for check, *name in (
        (preflight.local_model, "caf\udce9"),
        (preflight.check_text, "here", "\udce9.txt", ("test",), 8),
    ):
        assert "which is not UTF-8 and stands in no result; rename it" in error_of(check, *name)


@pytest.mark.parametrize(
    "texts",
    [["pydoc", "a.txt", "pydoc"], ["a.txt", "b.txt", "./a.txt"], [{"test": "x/../a.txt"}, "a.txt"]],
    ids=["corpus", "file", "mapping"],
)
def test_a_text_evaluated_twice(texts):
    assert "evaluation.texts: " in (told := error_of(preflight.check_distinct, "config key evaluation.texts", texts))
    assert "named twice; name each text once" in told
    preflight.check_distinct("here", ["pydoc", "wikitext2", "x/a.txt", "y/a.txt", {"test": "z/a.txt"}])


def test_a_complete_configuration_is_checked_against_what_it_names(model, tmp_path):
    file = tmp_path / "some.txt"
    file.write_text("word\n" * 200)
    small = {"sequence_length": 64}
    config = complete(
        {"model": str(model), "calibration": small, "recovery": {**small, "text": str(file)}, "evaluation": small}
    )
    preflight.check_inputs(config)
    config["evaluation"]["sequence_length"] = 129
    assert "evaluation.sequence_length: found 129" in error_of(preflight.check_inputs, config)
    config["evaluation"] = {**small, "texts": ["pydoc", "nowhere.txt"]}
    assert "evaluation.texts: no file nowhere.txt" in error_of(preflight.check_inputs, config)
    # Whose last tenth is no sequence, which is nothing to who only calibrates on it.
    file.write_text("word\n" * 100)
    config["evaluation"], config["calibration"] = {**small, "texts": ["pydoc"]}, {**small, "text": str(file)}
    assert "recovery.text: " in error_of(preflight.check_inputs, config)
    config["recovery"]["text"] = "pydoc"
    preflight.check_inputs(config)
