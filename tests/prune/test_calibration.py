"""Calibration backwards: the gradients that the whole model has, with one layer in memory, whatever the batches."""

from dataclasses import replace

import pytest
import torch
from families import VOCABULARY, make_model

from stepdown.errors import UserError
from stepdown.models.checkpoint import save_tensors
from stepdown.models.decoder import load_whole, open_decoder
from stepdown.models.tier_maps import dense_tier_map
from stepdown.prune.calibration import as_tensors, calibrate_backwards, read_calibration, squared_input_norms

WINDOWS = torch.randint(VOCABULARY, (5, 16), generator=torch.Generator().manual_seed(0))


def gradients_of_whole_model(folder, linears):
    """Mean over windows of the squared gradients of each linear's outputs, the loss summed over a window's tokens;
    times all tokens over those the linear is given."""
    model = load_whole(folder, "cpu")
    sums, tokens = {}, {}

    def watch(name, outputs):
        outputs.register_hook(lambda gradient: sums.update({name: sums.get(name, 0) + squares(gradient)}))

    def squares(gradient):
        return gradient.flatten(0, -2).square().sum(0)

    def count(name, inputs):
        tokens[name] = tokens.get(name, 0) + inputs.shape[:-1].numel()

    for name in linears:
        model.get_submodule(name).register_forward_hook(lambda _, __, outputs, name=name: watch(name, outputs))
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: count(name, inputs[0]))
    for window in WINDOWS:
        loss = model(input_ids=window[None], labels=window[None]).loss
        (loss * len(window)).backward()
    return {name: total / len(WINDOWS) * WINDOWS.numel() / tokens[name] for name, total in sums.items()}


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "gpt_neox", "mixtral"])
def test_squared_gradients_are_the_whole_models(family, tmp_path):
    folder = make_model(family, tmp_path / "model")
    decoder = open_decoder(folder, "cpu")
    modules = {module: name for name, module in decoder.model.named_modules()}
    own = {stored: modules[linear] for stored, linear in decoder.linears().items()}
    expected = gradients_of_whole_model(folder, own.values())
    found = calibrate_backwards(decoder, WINDOWS, batch_size=2)
    for stored, name in own.items():
        torch.testing.assert_close(found.squared_gradients[stored], expected[name], rtol=1e-3, atol=1e-9)


def test_an_expert_without_tokens_costs_what_the_cheapest_linear_of_its_layer_does(tmp_path):
    changes = {"num_experts": 16, "num_experts_per_tok": 1}
    decoder = open_decoder(make_model("qwen3_moe", tmp_path / "model", **changes), "cpu")
    windows = WINDOWS[:1, :4]
    seen = squared_input_norms(decoder, windows, 1)
    found = calibrate_backwards(decoder, windows, 1)
    costs = {name: float(found.squared_norms[name].mean() * found.squared_gradients[name].mean()) for name in seen}
    layer = {name: cost for name, cost in costs.items() if name.startswith("model.layers.1.")}
    unseen = [name for name in layer if bool((seen[name] == 1).all())]
    assert len(unseen) >= 3 * 12
    rest = min(cost for name, cost in layer.items() if name not in unseen)
    assert [layer[name] for name in unseen] == [pytest.approx(rest, rel=1e-5)] * len(unseen)


def test_norms_are_those_of_the_way_forwards(tmp_path):
    folder = make_model("llama", tmp_path / "model")
    norms = squared_input_norms(open_decoder(folder, "cpu"), WINDOWS, 2)
    backwards = calibrate_backwards(open_decoder(folder, "cpu"), WINDOWS, 2).squared_norms
    torch.testing.assert_close(backwards, norms, rtol=1e-6, atol=0)
    assert not any(values.requires_grad for values in backwards.values())


def test_costs_ask_for_a_calibration_with_gradients(tmp_path):
    decoder = open_decoder(make_model("llama", tmp_path / "model"), "cpu")
    tier_map = dense_tier_map({name: tuple(m.weight.shape) for name, m in decoder.linears().items()}, 16, 10, "a")
    calibration = calibrate_backwards(decoder, WINDOWS, 5)
    save_tensors(as_tensors(calibration), tmp_path / "both", tier_map.identity)
    save_tensors(calibration.squared_norms, tmp_path / "norms", tier_map.identity)
    assert as_tensors(read_calibration(tmp_path / "both", tier_map, True)).keys() == as_tensors(calibration).keys()
    read_calibration(tmp_path / "norms", tier_map, with_gradients=False)
    with pytest.raises(UserError, match=r"None squared gradients found, .* calibrate this model again"):
        read_calibration(tmp_path / "norms", tier_map, with_gradients=True)
    with pytest.raises(UserError, match=r"both: not the calibration .*\(iteration 0 of a, not iteration 1 of a\)"):
        read_calibration(tmp_path / "both", replace(tier_map, iteration=1), True)
