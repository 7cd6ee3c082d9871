"""A packed folder where transformers loads models by itself: `from_pretrained`, `pipeline`, and what is not whole."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import make_model
from three_tiers import pack_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

import stepdown  # noqa: F401, packed folders are known from here on
from stepdown.errors import UserError
from stepdown.packed.linear import ThreeTierLinear
from stepdown.packed.model import load_packed

BUNDLED = Path(__file__).parents[2] / "resources/pydoc-llama"
SCRIPTS = Path(__file__).parents[2] / "workflow/scripts"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The bundled model pruned and packed."""
    folder = tmp_path_factory.mktemp("bundled")
    pack_model(BUNDLED, folder)
    return folder / "packed"


@pytest.fixture
def copied(packed, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(packed, tmp_path / "packed")


def tokens(count=24):
    return torch.randint(2, 128, (2, count), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_is_the_model_of_load_packed(packed, caplog):
    model, ours = AutoModelForCausalLM.from_pretrained(packed, device_map="cpu"), load_packed(packed, device="cpu")
    # No word of what transformers missed or found too much.
    assert not [record for record in caplog.records if record.name != "stepdown"]
    assert {name for name, module in model.named_modules() if isinstance(module, ThreeTierLinear)} == {
        name for name, module in ours.named_modules() if isinstance(module, ThreeTierLinear)
    }
    assert model.dtype == torch.bfloat16 and not model.training
    assert torch.equal(model(tokens()).logits, ours(tokens()).logits)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(tokens(), **options), ours.generate(tokens(), **options))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral", "zamba2", "mamba"])
@torch.no_grad()
def test_families(family, tmp_path):
    """Untied and tied heads, matrices held transposed, biases, experts, a block of several layers, weights that are
    used without calls."""
    pack_model(make_model(family, tmp_path / "base"), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map="cpu")
    assert torch.equal(model(tokens()).logits, load_packed(tmp_path / "packed", device="cpu")(tokens()).logits)


def test_a_pipeline(packed):
    generate = pipeline("text-generation", model=str(packed))
    assert any(isinstance(module, ThreeTierLinear) for module in generate.model.modules())
    prompt = "Return the length of the"
    text = generate(prompt, max_new_tokens=8, do_sample=False)[0]["generated_text"]
    inputs = AutoTokenizer.from_pretrained(packed)(prompt, return_tensors="pt").to(generate.device)
    theirs = load_packed(packed, device=generate.device.type).generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    assert text == generate.tokenizer.decode(theirs, skip_special_tokens=True)


def change_json(path, **changes):
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | changes))


def refused(folder, match, **options):
    with pytest.raises(UserError, match=match) as caught:
        AutoModelForCausalLM.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit(copied):
    file = copied / "model.layers.2.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)
    refused(copied, "model.layers.2.safetensors: .*sha256 differs")


@pytest.mark.parametrize("file", ["packed.json", "model.layers.2.safetensors"])
def test_a_missing_file(copied, file):
    (copied / file).unlink()
    refused(copied, f"{file}.*pack")


def test_a_configuration_of_another_model(copied):
    for load in (load_packed, AutoModelForCausalLM.from_pretrained):
        config = json.loads((copied / "config.json").read_text())
        config["vocab_size"] += 8
        (copied / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="take both from the same model") as caught:
            load(copied)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_packed, AutoModelForCausalLM.from_pretrained])
def test_fewer_layers_than_the_files_hold(copied, load):
    change_json(copied / "config.json", num_hidden_layers=2)
    with pytest.raises(UserError, match=r"also hold model\.layers\.2.*config\.json has no place") as caught:
        load(copied)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_a_configuration_given_by_hand_counts(copied):
    """Such as a longer context by another rotation, or another end."""
    config = AutoConfig.from_pretrained(copied)
    before = AutoModelForCausalLM.from_pretrained(copied, config=config, device_map="cpu")(tokens()).logits
    config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    found = AutoModelForCausalLM.from_pretrained(copied, config=config, device_map="cpu")(tokens()).logits
    change_json(copied / "config.json", rope_parameters=config.rope_parameters)
    assert torch.equal(found, load_packed(copied, device="cpu")(tokens()).logits)
    assert not torch.equal(found, before)


@torch.no_grad()
def test_a_model_without_its_head(packed):
    found = AutoModel.from_pretrained(packed, device_map="cpu")(tokens()).last_hidden_state
    assert torch.equal(found, load_packed(packed, device="cpu").model(tokens()).last_hidden_state)


def test_where_a_text_ends(copied):
    change_json(copied / "generation_config.json", eos_token_id=[1, 7], pad_token_id=9)
    for model in (load_packed(copied, device="cpu"), AutoModelForCausalLM.from_pretrained(copied)):
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == ([1, 7], 9)
    (copied / "generation_config.json").write_text('{"eos_token_id": [1,')
    for load in (load_packed, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(UserError, match=r"generation_config\.json: not JSON"):
            load(copied)


def test_other_devices(packed):
    refused(packed, "device_map: .*on 'cpu' or 'cuda', found 'disk'", device_map={"": "disk"})


def test_what_a_later_version_adds_to_the_configuration(copied):
    quantization = json.loads((copied / "config.json").read_text())["quantization_config"]
    change_json(copied / "config.json", quantization_config=quantization | {"groups": 4})
    AutoModelForCausalLM.from_pretrained(copied)


def test_several_devices(packed):
    refused(packed, "device_map: .*one device, found cpu, disk", device_map={"model": "cpu", "lm_head": "disk"})


def test_it_is_not_saved_as_something_else(packed, tmp_path):
    for model in (load_packed(packed, device="cpu"), AutoModelForCausalLM.from_pretrained(packed)):
        with pytest.raises(UserError, match="copy the folder"):
            model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("load", [load_packed, AutoModelForCausalLM.from_pretrained])
def test_what_a_packed_model_is_not_for(packed, load, tmp_path):
    model = load(packed)
    if model.lm_head.__class__ is not ThreeTierLinear:
        pytest.skip("there is no kernel here")
    with pytest.raises(UserError, match="not pickled: keep its folder"):
        torch.save(model, tmp_path / "model.pt")
    with pytest.raises(UserError, match="resize the model before it is packed"):
        model.resize_token_embeddings(8192)
    model.train()
    with pytest.raises(UserError, match="for running, not for training"):
        model(tokens())
    with torch.no_grad():
        model(tokens())


def run(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(SCRIPTS)})


@pytest.mark.parametrize(
    "imports", ["stepdown, transformers", "transformers, stepdown", "transformers.quantizers, stepdown"]
)
def test_in_whichever_order_the_two_are_imported(packed, imports):
    code = f"import sys, {imports}; model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    finished = run(f"{code}; print({{type(module).__name__ for module in model.modules()}})", packed)
    assert "ThreeTierLinear" in finished.stdout, finished.stderr


def test_where_the_package_is_not_imported_nothing_is_loaded(packed):
    """Rather than a model of which most is random."""
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    finished = run(code, packed)
    assert finished.returncode == 1 and "OSError" in finished.stderr and "model.safetensors" in finished.stderr


def test_importing_the_package_stays_cheap():
    finished = run("import sys, stepdown; assert not {'torch', 'transformers'} & set(sys.modules)")
    assert finished.returncode == 0, finished.stderr


def test_lm_eval(packed):
    lm_eval = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance

    harness = lm_eval.HFLM(pretrained=str(packed), device="cpu")
    assert any(isinstance(module, ThreeTierLinear) for module in harness.model.modules())
    request = Instance("loglikelihood", {}, ("Return the length", " of the list"), 0)
    ((likelihood, _),) = harness.loglikelihood([request], disable_tqdm=True)
    assert -60 < likelihood < 0
