"""Single tokens through a decoder in C++: what transformers makes of them, whatever the cache went through."""

import copy

import pytest
import torch
from test_kernels import available, relative_error
from three_tiers import random_three_tier
from torch.nn.utils.parametrize import register_parametrization
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stepdown.errors import UserError
from stepdown.models.linears import replace_module
from stepdown.packed import decoding
from stepdown.packed.format import pack
from stepdown.packed.integers import pack_integers
from stepdown.packed.linear import ThreeTierLinear
from stepdown.tensors.block_rounding import round_in_blocks

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 128,
}
FAMILIES = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
}


@pytest.fixture(params=["avx512", "avx2"])
def kernel(request):
    return available(request.param)


def model_of(family, kernel, bits=None, **others):
    """A random one in bf16 whose linears are packed, its norms not all ones."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family] | others))
    model = AutoModelForCausalLM.from_config(config).bfloat16().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.normal_(1 if "norm" in name else 0, 0.3)
    for layer, names in ((f"model.layers.{i}", decoding.LINEARS) for i in range(SIZES["num_hidden_layers"])):
        for name in (f"{layer}.{own}" for own in names):
            linear = model.get_submodule(name)
            # Large enough that attention is to something.
            weight, tiers = random_three_tier(tuple(linear.weight.shape), 10, seed=len(name))
            matrix = pack(3 * weight, tiers, 10)
            if bits:
                matrix = pack_integers(3 * weight, round_in_blocks(3 * weight, tiers, bits), tiers, 10, bits)
            replace_module(model, name, ThreeTierLinear(matrix, linear.bias, kernel))
    return model


def quickened(model):
    assert decoding.quicken_decoding(model)
    return model


def slow(model):
    """The same with the decoder's own `forward`."""
    vars(model.model).pop("forward", None)
    return model


def logits_of(model, tokens, prompt, cache=None, **others):
    """Of each token after a prompt, one at a time."""
    output = model(
        tokens[:, :prompt], past_key_values=cache, use_cache=True, **{k: v[:, :prompt] for k, v in others.items()}
    )
    found = []
    for n in range(prompt, tokens.shape[1]):
        more = {name: value[:, : n + 1] for name, value in others.items()}
        output = model(tokens[:, n : n + 1], past_key_values=output.past_key_values, use_cache=True, **more)
        found.append(output.logits[0, -1])
    return torch.stack(found)


# Rounded to bf16 in other places here and there, and what is then made 8 bits can come out a step further.
NEAR = 3e-2
TOKENS = torch.arange(24)[None] * 5 % SIZES["vocab_size"]


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_is_what_the_layers_make_of_it(family, bits, kernel):
    model = quickened(model_of(family, kernel, bits))
    found, expected = logits_of(model, TOKENS, 3), logits_of(slow(model), TOKENS, 3)
    assert relative_error(found, expected.double()) < NEAR


def test_it_is_computed_in_cpp(monkeypatch, kernel):
    model = quickened(model_of("llama", kernel))
    cache = model(TOKENS[:, :3], use_cache=True).past_key_values
    monkeypatch.setattr(type(model.model.layers[0]), "forward", None)
    with pytest.raises(TypeError):
        model(TOKENS[:, 3:5], past_key_values=cache)
    model(TOKENS[:, 3:4], past_key_values=cache)
    assert cache.get_seq_length() == 4


def test_a_cache_is_cut_and_goes_on_in_other_ways(kernel):
    """What comes after a token does not change it: several at once, some taken back, one by one with more room."""
    model = quickened(model_of("llama", kernel))
    tokens = torch.arange(200)[None] * 7 % SIZES["vocab_size"]
    cache = model(tokens[:, :3], use_cache=True).past_key_values
    for cut, end in ((3, 4), (4, 5), (5, 9), (7, 8), (8, 9)):
        cache.crop(cut - cache.get_seq_length())
        model(tokens[:, cut:end], past_key_values=cache)
    found = torch.cat([model(tokens[:, n : n + 1], past_key_values=cache).logits[0] for n in range(9, 200)])
    assert relative_error(found, slow(model)(tokens).logits[0, 9:].double()) < NEAR


def test_all_that_is_asked_for_is_given(kernel):
    model = quickened(model_of("llama", kernel))
    cache = model(TOKENS[:, :3], use_cache=True).past_key_values
    states = model(TOKENS[:, 3:4], past_key_values=cache, output_hidden_states=True).hidden_states
    assert len(states) == 1 + SIZES["num_hidden_layers"]


@pytest.mark.parametrize("sizes", [{"head_dim": 8}, {"head_dim": 64}, {"num_key_value_heads": 4}])
def test_a_cache_of_another_model_is_left_to_the_decoder_and_its_error(sizes, kernel):
    model, other = quickened(model_of("llama", kernel)), model_of("llama", kernel, **sizes)
    cache = other(TOKENS[:, :3], use_cache=True).past_key_values
    with pytest.raises(RuntimeError):
        model(TOKENS[:, 3:4], past_key_values=cache)


def test_fewer_layers_are_computed_where_the_configuration_says_so(kernel):
    model = quickened(model_of("llama", kernel))
    logits_of(model, TOKENS[:, :6], 3)
    model.config.num_hidden_layers = 1
    assert torch.equal(logits_of(model, TOKENS, 3), logits_of(slow(model), TOKENS, 3))


def test_linears_of_several_kinds_in_a_layer_are_left_to_the_decoder(kernel):
    model, other = quickened(model_of("llama", kernel)), model_of("llama", kernel, bits=8)
    name = "model.layers.0.self_attn.k_proj"
    replace_module(model, name, other.get_submodule(name))
    assert torch.equal(logits_of(model, TOKENS, 3), logits_of(slow(model), TOKENS, 3))
    assert not decoding.quicken_decoding(model)


def test_what_is_not_a_number_stays_so(kernel):
    model = quickened(model_of("llama", kernel))
    cache = model(TOKENS[:, :16], use_cache=True).past_key_values
    cache.layers[0].keys[0, 0, 3] = torch.nan
    assert model(TOKENS[:, 16:17], past_key_values=cache).logits.isnan().all()


@pytest.mark.parametrize("make", ["static", "padded"])
def test_any_cache_and_padding(make, kernel):
    model = quickened(model_of("llama", kernel))
    options = {}
    if make == "padded":
        options["attention_mask"] = (torch.arange(24) >= 2)[None].long()

    def cache():
        return StaticCache(model.config, max_cache_len=40) if make == "static" else None

    found, expected = (
        logits_of(model, TOKENS, 4, cache(), **options),
        logits_of(slow(model), TOKENS, 4, cache(), **options),
    )
    assert relative_error(found, expected.double()) < NEAR


def test_several_sequences_go_through_the_decoder_itself(kernel):
    model = quickened(model_of("llama", kernel))
    tokens = torch.cat([TOKENS, TOKENS.flip(1)])
    expected = logits_of(model, TOKENS, 3)
    assert relative_error(logits_of(model, tokens, 3), expected.double()) < NEAR


def double_norms(model):
    norms = {name: 2 * weight for name, weight in model.state_dict().items() if "norm" in name}
    model.load_state_dict(norms, strict=False, assign=True)


def steer(model):
    model.model.layers[0].register_forward_hook(lambda module, given, states: states + 3)


def drop_mlp(model):
    model.model.layers[1].mlp = torch.nn.Identity()


def copy_norm(model):
    model.model.layers[1].input_layernorm = copy.deepcopy(model.model.layers[0].input_layernorm)


def drop_norm(model):
    model.model.layers[1].input_layernorm = torch.nn.Identity()


def parametrize_norm(model):
    register_parametrization(model.model.norm, "weight", torch.nn.Softplus())


def use_relu(model):
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()


def use_layer_norm(model):
    model.model.norm = torch.nn.LayerNorm(SIZES["hidden_size"]).bfloat16().requires_grad_(False)


def negate_mlp(model):
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda states: -own(states)


def use_other_attention(model):
    def doubled(module, query, key, value, mask, **others):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, 2 * value, mask, **others)

    AttentionInterface.register("doubled", doubled)
    model.set_attn_implementation("doubled")


def scale_queries(model):
    model.model.layers[0].self_attn.scaling *= 3


def widen_epsilon(model):
    model.model.layers[1].input_layernorm.variance_epsilon = 100.0


SEEN_AT_EVERY_TOKEN = use_other_attention, scale_queries, widen_epsilon
CHANGES = double_norms, steer, drop_mlp, copy_norm, drop_norm, parametrize_norm, use_relu, use_layer_norm, negate_mlp


@pytest.mark.parametrize("change", [*CHANGES, *SEEN_AT_EVERY_TOKEN])
@pytest.mark.parametrize("begun", [False, True])
def test_what_is_changed_later_is_seen(change, begun, kernel):
    model = quickened(model_of("llama", kernel))
    if begun:
        logits_of(model, TOKENS[:, :6], 3)
    change(model)
    found, expected = logits_of(model, TOKENS, 3), logits_of(slow(model), TOKENS, 3)
    assert relative_error(found, expected.double()) < NEAR


def error_after(change, kernel):
    """How far off a token is, after model or cache has changed since the one before, from what Python makes of it."""
    model = quickened(model_of("llama", kernel))
    found = []
    for each in (model, slow(copy.deepcopy(model))):
        cache = each(TOKENS[:, :3], use_cache=True).past_key_values
        each(TOKENS[:, 3:4], past_key_values=cache)
        change(each, cache)
        found.append(each(TOKENS[:, 4:5], past_key_values=cache).logits[0])
    return relative_error(found[0], found[1].double())


@pytest.mark.parametrize("change", SEEN_AT_EVERY_TOKEN)
def test_what_is_changed_between_two_tokens_is_seen(change, kernel):
    assert error_after(lambda model, _: change(model), kernel) < NEAR


def test_what_is_not_known_is_left_to_the_decoder(kernel):
    """Embeddings beside a token, and arguments by position, in the order of the family."""
    model = quickened(model_of("llama", kernel))
    cache = model.model(TOKENS[:, :3], None, TOKENS[:, 2:5], use_cache=True).past_key_values
    expected = slow(copy.deepcopy(model)).model(TOKENS[:, :3], position_ids=TOKENS[:, 2:5]).past_key_values
    assert torch.equal(cache.layers[1].keys, expected.layers[1].keys)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(TOKENS[:, 3:4], past_key_values=cache, inputs_embeds=model.model.embed_tokens(TOKENS[:, 3:4]))
    model.model(TOKENS[:, 3:4], None, torch.tensor([[3]]), cache)
    assert cache.get_seq_length() == 4


def test_it_stays_in_cpp_after_hidden_states_were_asked_for(monkeypatch, kernel):
    """transformers leaves hooks on every layer then."""
    model = quickened(model_of("llama", kernel))
    cache = model(TOKENS[:, :3], use_cache=True, output_hidden_states=True).past_key_values
    assert model.model.layers[0]._forward_hooks
    monkeypatch.setattr(type(model.model.layers[0]), "forward", None)
    model(TOKENS[:, 3:4], past_key_values=cache)
    assert cache.get_seq_length() == 4
    with pytest.raises(TypeError):
        model(TOKENS[:, 4:5], past_key_values=cache, output_hidden_states=True)


def times_three(layer):
    layer.values = 3 * layer.values


def times_three_in_place(layer):
    layer.values.mul_(3)


def shorten(layer):
    layer.keys, layer.values = layer.keys[..., 1:, :], layer.values[..., 1:, :]


@pytest.mark.parametrize("edit", [times_three, times_three_in_place, shorten])
def test_changed_keys_and_values_are_used(edit, kernel):
    def edit_all_but_first(_, cache):
        for layer in cache.layers[1:]:
            edit(layer)

    assert error_after(edit_all_but_first, kernel) < NEAR


def test_copies_of_a_cache_go_their_own_ways(kernel):
    model = quickened(model_of("llama", kernel))
    caches = [model(TOKENS[:, :3], use_cache=True).past_key_values]
    model(TOKENS[:, 3:4], past_key_values=caches[0])
    caches.append(copy.copy(caches[0]))
    caches[1].layers = [copy.copy(layer) for layer in caches[0].layers]
    caches[0].crop(-1)
    model(TOKENS[:, 3:4], past_key_values=caches[0])
    for token, cache in enumerate(caches):
        model(torch.tensor([[token]]), past_key_values=cache)
    for token, cache in enumerate(caches):
        found = model(TOKENS[:, 5:6], past_key_values=cache).logits[0]
        tokens = torch.cat([TOKENS[:, :4], torch.tensor([[token]]), TOKENS[:, 5:6]], 1)
        assert relative_error(found, slow(copy.deepcopy(model))(tokens).logits[0, -1:].double()) < NEAR


def test_a_copy_of_a_model_computes_by_itself(kernel):
    model = quickened(model_of("llama", kernel))
    expected = logits_of(model, TOKENS, 3)
    twin = copy.deepcopy(model)
    double_norms(model)
    assert torch.equal(logits_of(twin, TOKENS, 3), expected)
    assert twin.model.forward._decoder is twin.model


def test_gradients_are_refused(kernel):
    model = quickened(model_of("llama", kernel))
    states = model.model.embed_tokens(TOKENS).requires_grad_()
    with pytest.raises(UserError, match="for running, not for training"):
        model(inputs_embeds=states)
    cache = model(TOKENS[:, :3], use_cache=True).past_key_values
    model.model.norm.weight.requires_grad_()
    assert model.model(TOKENS[:, 3:4], past_key_values=cache).last_hidden_state.requires_grad


def test_others_stay_as_they_are(kernel):
    assert not decoding.quicken_decoding(model_of("llama", kernel, hidden_act="gelu"))
    assert not decoding.quicken_decoding(model_of("llama", "torch"))
    assert not decoding.quicken_decoding(model_of("mistral", kernel, sliding_window=8))
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=32, n_head=2))
    assert not decoding.quicken_decoding(dense)
