"""One token at a time through the decoder layers of a Llama, all in one call of C++: else what Python does between the
linears of a small model takes longer than they do.

The model stays what transformers made it. Only its decoder's `forward` is another, which hands on to the decoder's own
whatever is not one token of one sequence on the CPU with keys and values in a `DynamicCache`, and all of it while a
module has hooks or its like. Keys and values are moved to one tensor with room for more, of which the cache is given
views, so that a token more copies nothing.
"""

import copy
import ctypes
import operator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import output_capturing

from .cpu import CpuMultiply, compiled_kernels

# `model_type` of the families whose layers compute what decoder_layer.h does: norm, rotary attention, norm, gated MLP.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LINEARS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
# The one of transformers that is computed here, to all tokens before.
ATTENTION = "sdpa"
# The kernels take vectors of so many, and have no last part of one.
WHOLE = 8
# How many more places there are where one is missing, beside as many as there were.
MORE_ROOM = 64


class _DecoderLayer(ctypes.Structure):
    """`DecoderLayer` of kernels/decoder_layer.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "key_heads", "head_size", "avx512")),
        *((name, ctypes.c_double) for name in ("epsilon", "scaling")),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_attention_norm", "query_norm", "key_norm")),
    ]


def quicken_decoding(model: nn.Module) -> bool:
    """Have a model's decoder compute single tokens in C++, if it is of a kind that is known, all its linears are packed
    for the CPU, and attention is torch's own, to all tokens before; returns whether it is."""
    config, decoder = model.config, model.base_model
    if config.model_type not in FAMILIES or config._attn_implementation != ATTENTION or config.hidden_act != "silu":
        return False
    if getattr(config, "sliding_window", None) is not None or not _fits(decoder):
        return False
    decoder.forward = OneToken(decoder)
    return True


def _fits(decoder: nn.Module) -> bool:
    rotated = 2 * decoder.rotary_emb.inv_freq.numel()
    return all(_layer_fits(layer) and layer.self_attn.head_dim == rotated for layer in decoder.layers)


def _layer_fits(layer: nn.Module) -> bool:
    try:
        multiplies = [getattr(layer.get_submodule(name), "multiply", None) for name in LINEARS]
    except AttributeError:
        return False
    sizes = layer.self_attn.head_dim, layer.mlp.gate_proj.in_features, layer.mlp.gate_proj.out_features
    if not all(isinstance(each, CpuMultiply) for each in multiplies) or any(size % WHOLE for size in sizes):
        return False
    # C++ takes all as it does the first.
    return len({(each.avx512, each.matrix.bits) for each in multiplies}) == 1


class OneToken:
    """What a decoder is called with, and gives: one token's hidden states in C++, and others by itself."""

    def __init__(self, decoder: nn.Module, kinds: list[type] | None = None):
        self._decoder, self._own, self._decode = decoder, type(decoder).forward, compiled_kernels().decode_token
        # What is replaced by another kind of module computes something else.
        self._kinds = kinds or [type(each) for each in decoder.modules()]
        self._layers: _Layers | None = None
        # When the decoder was last looked at, which takes a twentieth of a token's time: once after what went through
        # Python, such as a prompt, and once after a hook was registered anywhere or attention became another.
        self._looked_at: tuple[int, bool, str] | None = None
        self._usable = False
        # Of each cache what its keys and values are views of, and these as it was given them.
        self._memories: WeakKeyDictionary[DynamicCache, tuple[Tensor, list[Tensor]]] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict) -> "OneToken":
        return OneToken(copy.deepcopy(self._decoder, memo), self._kinds)

    def __call__(self, input_ids: Tensor | None = None, *positional, **named):
        if not positional and self._is_one_token(input_ids, **named):
            cache = named["past_key_values"]
            if self._can_step(cache):
                return self._step(input_ids, cache, named.get("position_ids"))
        self._looked_at = None
        return self._own(self._decoder, input_ids, *positional, **named)

    def _is_one_token(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **others
    ) -> bool:
        """Whether one token is to be seen with all before it, and nothing that is not known here is given."""
        one = input_ids is not None and input_ids.shape == (1, 1)
        if not one or (position_ids is not None and position_ids.shape != (1, 1)):
            return False
        seen = attention_mask is None or _sees_all(attention_mask)
        return seen and self._asks_for_no_more(others) and self._is_plain(past_key_values)

    def _is_plain(self, cache) -> bool:
        """Whether a cache keeps all of every layer's keys and values of one sequence, and has some."""
        if type(cache) is not DynamicCache or not cache.layers:
            return False
        if not all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers):
            return False
        held = _keys_and_values(cache)
        return self._are_as_given(cache, held) or (
            len(held[0]) == 1
            and all(each.shape == held[0].shape for each in held)
            and all(each.dtype == torch.bfloat16 and each.device.type == "cpu" for each in held)
        )

    def _are_as_given(self, cache: DynamicCache, held: list[Tensor]) -> bool:
        """Whether nobody has replaced the keys and values since the last token."""
        _, given = self._memories.get(cache, (None, []))
        return len(held) == len(given) and all(map(operator.is_, held, given))

    def _asks_for_no_more(self, others: dict) -> bool:
        """Whether nothing but the last hidden states is asked for, and nothing else given."""
        config = self._decoder.config
        asked = {name: getattr(config, name, False) for name in ("output_hidden_states", "output_attentions")} | others
        return asked.pop("return_dict", True) and all(each is None or each is False for each in asked.values())

    def _can_step(self, cache: DynamicCache) -> bool:
        """Whether the decoder, as somebody may have changed it since, has nothing that only Python would do, and the
        cache is one of its own."""
        now = RemovableHandle.next_id, torch.is_grad_enabled(), self._decoder.config._attn_implementation
        if self._looked_at != now or (self._usable and not self._layers.have_the_same_numbers()):
            if self._layers is None or not self._layers.are_those_of_the_decoder():
                same = [type(each) for each in self._decoder.modules()] == self._kinds
                self._layers = _Layers(self._decoder) if same and _fits(self._decoder) else None
            self._looked_at, self._usable = now, self._layers is not None and not self._layers.need_python()
        return self._usable and self._layers.are_as_in(cache)

    def _step(self, input_ids: Tensor, cache: DynamicCache, position_ids: Tensor | None) -> BaseModelOutputWithPast:
        known = cache.layers[0].keys.shape[2]
        memory = self._memory(cache, known)
        states = self._decoder.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.full((1, 1), known)
        cosines, sines = self._decoder.rotary_emb(states, position_ids=position_ids)
        self._decode(
            self._layers.parameters,
            len(self._layers.parameters),
            self._layers.norm,
            cosines.data_ptr(),
            sines.data_ptr(),
            memory.data_ptr(),
            memory.shape[-2],
            known,
            states.data_ptr(),
            torch.get_num_threads(),
        )
        seen = list(memory[..., : known + 1, :].flatten(0, 1).unbind())
        for place, layer in enumerate(cache.layers):
            layer.keys, layer.values = seen[2 * place : 2 * place + 2]
        self._memories[cache] = memory, seen
        return BaseModelOutputWithPast(last_hidden_state=states, past_key_values=cache)

    def _memory(self, cache: DynamicCache, known: int) -> Tensor:
        """[layers, keys and values, 1, key heads, room, head size], in front what the cache knows, then room."""
        held = _keys_and_values(cache)
        if self._are_as_given(cache, held):
            memory, _ = self._memories[cache]
            if memory.shape[-2] > known:
                return memory
        shape = len(cache.layers), 2, *held[0].shape[:2], 2 * known + MORE_ROOM, held[0].shape[-1]
        memory = held[0].new_empty(shape)
        for own, tensor in zip(memory.flatten(0, 1), held, strict=True):
            own[..., :known, :] = tensor
        return memory


class _Layers:
    """What C++ is told of a decoder's layers, and how to know that these are still as they were."""

    def __init__(self, decoder: nn.Module):
        self._decoder = decoder
        self._modules = list(decoder.modules())
        self._embedding = decoder.embed_tokens
        # Held, since the kernels know addresses only.
        self._multiplies = [[layer.get_submodule(name).multiply for name in LINEARS] for layer in decoder.layers]
        self._attentions = [layer.self_attn for layer in decoder.layers]
        self._norms: list[nn.Module] = []
        self._weights: list[Tensor] = []
        self.norm = self._address(decoder.norm)
        layers = zip(decoder.layers, self._multiplies, strict=True)
        self.parameters = (_DecoderLayer * len(decoder.layers))(
            *(self._parameters(layer, multiplies, decoder.config) for layer, multiplies in layers)
        )
        self._numbers = self._read_numbers()

    def _read_numbers(self) -> tuple[list[float], list[float]]:
        return [norm.variance_epsilon for norm in self._norms], [each.scaling for each in self._attentions]

    def are_as_in(self, cache: DynamicCache) -> bool:
        """Whether a cache holds keys of as many layers as are computed, and of their shape."""
        layers, first = len(self.parameters), self.parameters[0]
        shape = first.key_heads, first.head_size
        held = cache.layers[0].keys.shape[1::2]
        return layers == self._decoder.config.num_hidden_layers == len(cache.layers) and held == shape

    def have_the_same_numbers(self) -> bool:
        """Whether nobody has set an attribute whose number C++ was told; cheap enough for every token."""
        return self._read_numbers() == self._numbers

    def are_those_of_the_decoder(self) -> bool:
        """Whether no module, no weight of a norm, and no number has been replaced."""
        addresses = [norm.weight.data_ptr() for norm in self._norms]
        same = addresses == [weight.data_ptr() for weight in self._weights]
        return same and self.have_the_same_numbers() and list(self._decoder.modules()) == self._modules

    def need_python(self) -> bool:
        """Whether somebody listens to a module, has replaced its `forward`, wants gradients, or has changed types,
        attention, or the epsilon of some norms."""
        if self._decoder.config._attn_implementation != ATTENTION or len(set(self._numbers[0])) > 1:
            return True
        weights = self._embedding.weight, *(norm.weight for norm in self._norms)
        if any(weight.dtype != torch.bfloat16 or not weight.is_contiguous() for weight in weights):
            return True
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return True
        inside = self._modules[1:]
        heard = any(_is_heard(each) or each._forward_pre_hooks or "forward" in vars(each) for each in inside)
        return bool(heard or _global_forward_hooks or _global_forward_pre_hooks)

    def _parameters(self, layer: nn.Module, multiplies: list[CpuMultiply], config: PretrainedConfig) -> _DecoderLayer:
        attention = layer.self_attn
        return _DecoderLayer(
            config.hidden_size,
            attention.q_proj.out_features // attention.head_dim,
            attention.k_proj.out_features // attention.head_dim,
            attention.head_dim,
            multiplies[0].avx512,
            layer.input_layernorm.variance_epsilon,
            attention.scaling,
            *(ctypes.addressof(multiply.matrix) for multiply in multiplies),
            *map(self._address, (layer.input_layernorm, layer.post_attention_layernorm)),
            *(self._address(getattr(attention, name, None)) for name in ("q_norm", "k_norm")),
        )

    def _address(self, norm: nn.Module | None) -> int | None:
        if norm is None:
            return None
        self._norms.append(norm)
        self._weights.append(norm.weight.detach())
        return self._weights[-1].data_ptr()


def _keys_and_values(cache: DynamicCache) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _is_heard(module: nn.Module) -> bool:
    """Whether a module has hooks but those that transformers leaves for good once hidden states or attentions were
    asked for: they record nothing unless a call asks again, and that call goes through Python."""
    hooks = module._forward_hooks.values()
    return any(getattr(hook, "__module__", None) != output_capturing.__name__ for hook in hooks)


def _sees_all(mask) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all())
