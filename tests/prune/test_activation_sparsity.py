"""Activation sparsity: thresholds that give the share asked for, in the walk as in a loaded model."""

from fractions import Fraction

import pytest
import torch
from families import VOCABULARY, make_model
from hypothesis import given
from hypothesis import strategies as st

from stepdown.errors import UserError
from stepdown.files import write_json
from stepdown.measure.perplexity import perplexity
from stepdown.models.decoder import open_decoder
from stepdown.models.layer_walk import LayerWalk
from stepdown.plan.compressions import Dynamic
from stepdown.prune.activation_sparsity import BINS, FORMAT, Quantiles, _bins, calibrate_thresholds, switch_on

TOKENS = torch.randint(0, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(1))


def calibrate(folder, path, allocation="uniform", share="0.5"):
    found = calibrate_thresholds(open_decoder(folder, "cpu"), TOKENS, 4, Dynamic(allocation, Fraction(share)))
    write_json(path, {"format": FORMAT, "linears": found})
    return found


@given(st.integers(0, 99), st.floats(0, 1), st.floats(1e-6, 1e6))
def test_a_threshold_leaves_the_share_below_it(seed, share, scale):
    values = scale * torch.randn(2000, generator=torch.Generator().manual_seed(seed))
    quantiles = Quantiles(torch.bincount(_bins(values), minlength=BINS))
    threshold = quantiles.threshold(share)
    below = (values.abs() < threshold).double().mean().item()
    assert below == pytest.approx(quantiles.share_below(threshold), abs=1e-9)
    # Magnitudes within 1/2048 of one another are not told apart.
    assert below == pytest.approx(share, abs=0.01)


def test_a_share_that_no_whole_step_reaches_is_met(tmp_path):
    folder = make_model("llama", tmp_path / "model")
    found = calibrate(folder, tmp_path / "thresholds.json", "greedy", "0.93")
    sizes = {name: linear.weight.numel() for name, linear in open_decoder(folder, "cpu").linears().items()}
    for layer in range(5):
        names = [name for name in found if f".{layer}." in name]
        share = sum(sizes[name] * found[name]["target"] for name in names) / sum(sizes[name] for name in names)
        assert share == pytest.approx(0.93, abs=1e-6)


@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
def test_the_share_is_met_over_each_layer_and_in_a_loaded_model(allocation, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = make_model("llama", tmp_path / "model")
    found = calibrate(folder, tmp_path / "thresholds.json", allocation)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    sizes = {name: model.get_submodule(name).weight.numel() for name in found}
    assert len(found) == 35
    for layer in range(5):
        names = [name for name in found if f".{layer}." in name]
        for key, tolerance in (("target", 1e-6), ("achieved", 0.02)):
            share = sum(sizes[name] * found[name][key] for name in names) / sum(sizes[name] for name in names)
            assert share == pytest.approx(0.5, abs=tolerance)
    dense = model(TOKENS).logits
    zeros = dict.fromkeys(found, 0)
    switch_off = switch_on(model, tmp_path / "thresholds.json")
    for name in found:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: zeros.update({name: (inputs[0] == 0).double().mean().item()})
        )
    sparse = model(TOKENS).logits
    assert not torch.allclose(dense, sparse, atol=1e-3)
    for name, linear in found.items():
        assert zeros[name] == pytest.approx(linear["achieved"], abs=0.01), name
    switch_off()
    assert torch.equal(model(TOKENS).logits, dense)


def test_it_is_measured_as_a_loaded_model_runs(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = make_model("llama", tmp_path / "model")
    calibrate(folder, tmp_path / "thresholds.json")
    decoder = open_decoder(folder, "cpu")
    dense = perplexity(decoder, TOKENS, 4)
    switch_on(decoder.model, tmp_path / "thresholds.json")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    switch_on(model, tmp_path / "thresholds.json")
    losses = torch.stack([model(row[None], labels=row[None]).loss for row in TOKENS])
    assert losses.mean().exp().item() == pytest.approx(perplexity(decoder, TOKENS, 4), rel=1e-4)
    assert perplexity(decoder, TOKENS, 4) != pytest.approx(dense, rel=1e-3)


def test_greedy_changes_a_layers_output_less(tmp_path):
    folder = make_model("llama", tmp_path / "model", num_hidden_layers=1)

    def error(allocation):
        calibrate(folder, tmp_path / "thresholds.json", allocation)
        outputs = []
        for sparse in (False, True):
            decoder = open_decoder(folder, "cpu")
            if sparse:
                switch_on(decoder.model, tmp_path / "thresholds.json")
            walk = LayerWalk(decoder, [TOKENS[:4]])
            for _, _, replay in walk.layers(""):
                replay()
            outputs.append(walk.states[0])
        return (outputs[0] - outputs[1]).norm()

    assert error("greedy") < error("uniform")


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "opt"])
def test_other_families(family, tmp_path):
    folder = make_model(family, tmp_path / "model")
    found = calibrate(folder, tmp_path / "thresholds.json")
    decoder = open_decoder(folder, "cpu")
    assert len(found) == len(decoder.linears())
    switch_on(decoder.model, tmp_path / "thresholds.json")
    assert perplexity(decoder, TOKENS, 4) > 1


def test_no_zeros_change_nothing(tmp_path):
    folder = make_model("llama", tmp_path / "model")
    calibrate(folder, tmp_path / "thresholds.json", share="0")
    decoder = open_decoder(folder, "cpu")
    dense = perplexity(decoder, TOKENS, 4)
    switch_on(decoder.model, tmp_path / "thresholds.json")
    assert perplexity(decoder, TOKENS, 4) == dense


def test_wrong_files_are_told(tmp_path):
    folder = make_model("llama", tmp_path / "model")
    calibrate(folder, tmp_path / "thresholds.json")
    smaller = open_decoder(make_model("llama", tmp_path / "smaller", num_hidden_layers=2), "cpu")
    with pytest.raises(UserError, match=r"model\.layers\.2.* is no linear of this LlamaForCausalLM"):
        switch_on(smaller.model, tmp_path / "thresholds.json")
    (tmp_path / "thresholds.json").write_text("{}")
    with pytest.raises(UserError, match="not a file of activation thresholds"):
        switch_on(smaller.model, tmp_path / "thresholds.json")
