"""The engine under what visits decoder layers: methods of two functions, forwards and backwards, a layer in memory."""

from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import torch
from families import LAYERS, VOCABULARY, make_model
from transformers import AutoModelForCausalLM

from stepdown.models.decoder import open_decoder
from stepdown.models.layer_walk import LayerWalk
from stepdown.prune.layerwise import change_layers, visit, visit_backwards
from stepdown.prune.statistics import accumulating, squared_column_sums

TOKENS = torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(1))


def walk_through(folder, batch_size=2):
    return LayerWalk(open_decoder(folder, "cpu"), TOKENS.split(batch_size))


def in_memory(decoder):
    return {name.split(".")[2] for name, parameter in decoder.model.named_parameters() if not parameter.is_meta}


def hooked_linears(model, decoder):
    """The linears of a whole model by the names the decoder has for its own."""
    own = {stored: name for name, stored in decoder.stored.items()}
    return {name: model.get_submodule(own[f"{name}.weight"].removesuffix(".weight")) for name in decoder.linears()}


# --- a method that changes weights -----------------------------------------------------------------------------------


def scaled(_, weight, statistics):
    """What no method does, but what is easily told: a weight over the sums of its squared inputs."""
    return weight / (1 + statistics["squares"])


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_each_layer_is_changed_by_what_those_changed_before_it_give(family, tmp_path):
    folder = make_model(family, tmp_path / "model")
    gather = {"squares": partial(accumulating, of=squared_column_sums)}
    walk = walk_through(folder)
    found = {}
    for layer in change_layers(walk, "scale", gather, scaled):
        assert in_memory(walk.decoder) == {str(layer.place)} or family != "llama"
        found |= layer.weights()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    linears = hooked_linears(model, walk.decoder)
    layers = [list(group) for group in zip(*[iter(linears)] * (len(linears) // LAYERS), strict=True)]
    for names in layers:
        with torch.no_grad(), accumulating({name: linears[name] for name in names}, squared_column_sums) as sums:
            model(TOKENS)
        for name in names:
            weight = linears[name].weight.detach() / (1 + sums[name])
            torch.testing.assert_close(found[f"{name}.weight"], weight, rtol=1e-4, atol=1e-6)
            linears[name].weight.data = weight


def test_linears_are_grouped_as_they_are_called(tmp_path):
    groups = [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    for layer in visit(walk_through(make_model("llama", tmp_path / "model")), None):
        together = layer.called_together()
        assert [[name.rpartition(".")[2] for name in names] for names in together] == groups
        whole = {}
        for batch in range(3):
            with accumulating(layer.linears, squared_column_sums) as sums:
                layer.replay(advance=False, batch=batch)
            for names in together:
                squares = squared_column_sums(layer.inputs(names[0], batch))
                torch.testing.assert_close(squares, sums[names[0]])
                whole[names[0]] = whole.get(names[0], 0) + squares
        torch.testing.assert_close(layer.gather(gather_squares, advance=True)[together[0][0]], whole[together[0][0]])


def gather_squares(linears):
    return accumulating(linears, squared_column_sums)


# --- a method that looks at gradients --------------------------------------------------------------------------------


@contextmanager
def squared_output_gradients(linears):
    """While open, sums (dL/dy_i)^2 over the tokens whose gradients go back through each linear: name -> [out]."""
    sums = {}

    def add(name, gradient):
        sums[name] = sums.get(name, 0) + squared_column_sums(gradient)

    with ExitStack() as hooks:
        for name, linear in linears.items():
            see = partial(add, name)
            hooks.enter_context(
                linear.register_forward_hook(lambda _, __, output, see=see: output.register_hook(see) and None)
            )
        yield sums


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_gradients_of_outputs_are_those_of_the_whole_model(family, tmp_path):
    folder = make_model(family, tmp_path / "model")
    walk = walk_through(folder)
    found, places = {}, []
    for layer in visit_backwards(walk):
        found |= layer.gather(squared_output_gradients, advance=True)
        places.append(layer.place)
        assert all(parameter.grad is None for parameter in layer.module.parameters())
        assert in_memory(walk.decoder) == {str(layer.place)} or family != "llama"
    assert places == [4, 3, 2, 1, 0]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with squared_output_gradients(hooked_linears(model, walk.decoder)) as expected:
        for batch in TOKENS.split(2):
            model(batch, labels=batch).loss.backward()
    assert found.keys() == expected.keys() == walk.decoder.linears().keys()
    for name, sums in expected.items():
        torch.testing.assert_close(found[name], sums, rtol=1e-3, atol=1e-9)


def test_looking_twice_changes_nothing(tmp_path):
    folder = make_model("llama", tmp_path / "model")
    once = {}
    for layer in visit_backwards(walk_through(folder)):
        once |= layer.gather(squared_output_gradients, advance=True)
    for layer in visit_backwards(walk_through(folder)):
        first, second = layer.gather(squared_output_gradients), layer.gather(squared_output_gradients, advance=True)
        for name in layer.linears:
            assert torch.equal(first[name], second[name]) and torch.equal(first[name], once[name])
