"""Walking a model layer by layer equals its own forward pass, for every family, with one layer in memory."""

import json

import pytest
import torch
from families import FAMILIES, VOCABULARY, make_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from stepdown.errors import UserError
from stepdown.measure.evaluation import Settings, protocol
from stepdown.measure.perplexity import perplexity, window_losses
from stepdown.models.decoder import choose_device, in_float32, loaded_around_layers, open_decoder
from stepdown.models.layer_walk import LayerWalk
from stepdown.prune.calibration import squared_input_norms


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return make_model(request.param, tmp_path_factory.mktemp("models") / request.param)


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_logits_are_the_models_own(folder, tokens):
    walk = LayerWalk(open_decoder(folder, "cpu"), list(tokens.split(2)))
    for _, _, replay in walk.layers("test"):
        replay()
    with torch.no_grad():
        for batch, logits in zip(tokens.split(2), walk.logits(), strict=True):
            # Logits of size 1 after sums of float32, in an order that is the processor's choice.
            torch.testing.assert_close(logits, load(folder)(batch).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("folder", ["llama", "opt"], indirect=True)  # without and with a tied head
def test_an_embedding_holds_the_rows_that_are_asked_for(folder, tokens):
    decoder, model = open_decoder(folder, "cpu"), load(folder)
    with loaded_around_layers(decoder, batches=[tokens]):
        found = decoder.model.get_input_embeddings().weight[tokens]
        assert torch.equal(found, model.get_input_embeddings().weight[tokens])
        assert torch.equal(decoder.model.get_output_embeddings().weight, model.get_output_embeddings().weight)


@pytest.mark.parametrize("folder", ["llama", "opt"], indirect=True)
def test_a_head_holds_the_rows_that_are_asked_for(folder, tokens):
    decoder, model = open_decoder(folder, "cpu"), load(folder)
    with loaded_around_layers(decoder, batches=[tokens], head_of_tokens=True):
        for find in ("get_input_embeddings", "get_output_embeddings"):
            found, whole = (getattr(of, find)().weight for of in (decoder.model, model))
            assert torch.equal(found[tokens], whole[tokens]) and found.shape == whole.shape


def test_what_is_tied_is_one_tensor_in_another_type(tmp_path):
    decoder = in_float32(open_decoder(make_model("opt", tmp_path / "model", dtype="bfloat16"), "cpu"))
    with loaded_around_layers(decoder):
        embedding, head = decoder.model.get_input_embeddings().weight, decoder.model.get_output_embeddings().weight
        assert embedding.dtype == torch.float32 and embedding.data_ptr() == head.data_ptr()


def routed(fused, hidden, index, _weights):
    """What each linear of fused experts is given: stored name within the experts -> inputs [tokens, in]."""
    gate, up, down = ("w1", "w3", "w2") if "Mixtral" in type(fused).__name__ else ("gate_proj", "up_proj", "down_proj")
    for number in range(len(fused.gate_up_proj)):
        seen = hidden[(index == number).any(-1)]
        gated, lifted = (seen @ fused.gate_up_proj[number].T).chunk(2, dim=-1)
        yield from ((f"{number}.{name}", seen) for name in (gate, up))
        yield f"{number}.{down}", fused.act_fn(gated) * lifted


def test_calibration_is_what_hooks_on_the_whole_model_see(folder, tokens):
    model, sums = load(folder), {}

    def add(name, inputs):
        sums[name] = sums.get(name, 0) + inputs.double().square().flatten(0, -2).sum(0)

    def hook(name):
        return lambda _, inputs: add(name, inputs[0])

    def hook_experts(name):
        stored = name.replace("mlp", "block_sparse_moe") if "Mixtral" in type(model).__name__ else name

        def add_all(fused, inputs):
            for part, seen in routed(fused, *inputs):
                add(f"{stored}.{part}", seen)

        return add_all

    decoder = open_decoder(folder, "cpu")
    modules = dict(model.named_modules())
    for name in decoder.linears().keys() & modules:
        modules[name].register_forward_pre_hook(hook(name))
    for name, module in modules.items():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(hook_experts(name))
    with torch.no_grad():
        model(tokens)
    norms = squared_input_norms(decoder, tokens, batch_size=2)
    assert norms.keys() == sums.keys()
    for name, norm in norms.items():
        assert norm.dtype == torch.float32
        expected = sums[name] / len(tokens)
        # Roundings of a float32 forward are as large as its inputs, also where one of these is small.
        torch.testing.assert_close(norm.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.mean()))


def test_an_expert_that_sees_no_token_goes_by_magnitude(tmp_path, tokens, caplog):
    decoder = open_decoder(make_model("qwen2_moe", tmp_path / "model", num_experts=40), "cpu")
    norms = squared_input_norms(decoder, tokens[:1, :4], batch_size=1)
    unseen = [name for name in norms if f"{name} saw no token" in caplog.text]
    assert unseen and all((norms[name] == 1).all() for name in unseen)
    assert norms.keys() == decoder.linears().keys()


def test_one_layer_in_memory_at_a_time(folder, tokens):
    decoder = open_decoder(folder, "cpu")
    walk = LayerWalk(decoder, [tokens])
    for name, layer, replay in walk.layers("test"):
        real = {key for key, parameter in decoder.model.named_parameters() if not parameter.is_meta}
        assert real and all(key.startswith(name + ".") for key in real)
        assert not any(parameter.is_meta for parameter in layer.parameters())
        replay()


def test_embeddings_and_head_are_not_pruned(folder):
    names = open_decoder(folder, "cpu").linears()
    assert names and not [name for name in names if "embed" in name or "lm_head" in name]
    assert all(any(part.isdigit() for part in name.split(".")) for name in names)


def test_replaying_without_advancing_leaves_the_states(tmp_path, tokens):
    walk = LayerWalk(open_decoder(make_model("llama", tmp_path / "model"), "cpu"), [tokens])
    for _, _, replay in walk.layers("test"):
        before = walk.states[0].clone()
        replay(advance=False)
        assert torch.equal(walk.states[0], before)
        replay()
        assert not torch.equal(walk.states[0], before)


def test_weights_stored_without_the_models_prefix_are_found(tmp_path, tokens):
    """Old OPT folders on the hub leave out `model.`; every name outside the walk is the stored one."""
    folder = make_model("opt", tmp_path / "model")
    expected = window_losses(open_decoder(folder, "cpu"), tokens, 2)
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    decoder = open_decoder(folder, "cpu")
    assert all(name.startswith("decoder.layers.") for name in decoder.linears())
    assert torch.equal(window_losses(decoder, tokens, 2), expected)


def test_positions_are_held_once(tmp_path, tokens):
    walk = LayerWalk(open_decoder(make_model("llama", tmp_path / "model"), "cpu"), list(tokens.split(1)))
    cosines = {id(calls[0][1]["position_embeddings"][0]) for calls in walk._calls}
    assert len(cosines) == 1


def test_perplexity_protocol(tmp_path, tokens):
    folder = make_model("llama", tmp_path / "model")
    model = load(folder)
    with torch.no_grad():
        losses = [cross_entropy(model(window[None]).logits[0, :-1], window[1:]) for window in tokens]
    expected = torch.stack(losses).mean().exp().item()
    for batch_size in (1, 2, 5):
        assert perplexity(open_decoder(folder, "cpu"), tokens, batch_size) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("limit", "windows"), [(8, 1), (16, 1), (47, 2)])
def test_the_protocol_says_how_many_windows_there_are(limit, windows):
    told = protocol(Settings(("pydoc",), 16, 1, limit, "cpu", False, "device"))
    assert f"the mean over windows, the first {windows} of them" in told


def test_window_losses_equal_the_reference(golden):
    expected = load_file(golden / "models/llama_window_nll.safetensors")["dense"]
    stream = load_file(golden / "models/tokens.safetensors")["stream"]
    losses = window_losses(open_decoder(golden / "models/llama", "cpu"), stream.view(len(expected), -1), 8)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


def test_calibration_equals_the_reference(golden):
    expected = load_file(golden / "models/llama_wanda_u50_scaler_rows.safetensors")
    tokens = load_file(golden / "models/tokens.safetensors")["calib"]
    norms = squared_input_norms(open_decoder(golden / "models/llama", "cpu"), tokens, 2)
    # The first layer's inputs are the same in the reference, which prunes on its way.
    first = [name for name in expected if name.startswith("0.")]
    assert first
    for name in first:
        torch.testing.assert_close(norms[f"model.layers.{name}"], expected[name], rtol=1e-5, atol=0)


def test_nan_in_a_weight_is_named_by_layer(tmp_path, tokens):
    folder = make_model("llama", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"inputs of model\.layers\.1\.mlp\.down_proj are not finite"):
        squared_input_norms(open_decoder(folder, "cpu"), tokens, 2)


def test_models_that_are_none_are_named(tmp_path):
    folder = make_model("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no_such_family"}))
    with pytest.raises(UserError, match="not a causal language model"):
        open_decoder(folder, "cpu")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    decoder = open_decoder(folder, "cpu")
    with pytest.raises(UserError, match=r"no tensor 'model\.layers\.5\."):
        squared_input_norms(decoder, torch.zeros(1, 8, dtype=torch.int64), 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    assert choose_device("auto").type == "cpu"
    with pytest.raises(UserError, match="no GPU"):
        choose_device("cuda")
    for name in ("cuda:1", "gpu"):
        with pytest.raises(UserError, match=f"'{name}': give one of auto, cpu, cuda"):
            choose_device(name)
