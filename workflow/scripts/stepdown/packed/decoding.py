"""One token at a time through the decoder layers of a Llama, all in one call of C++: else what Python does between the
linears of a small model takes longer than they do.

The model stays what transformers made it. Only its decoder's `forward` is another, which hands on to the decoder's own
whatever is not one token of one sequence on the CPU with keys and values in a `DynamicCache`. These are moved to one
tensor with room for more, of which the cache is given views, so that a token more copies nothing.
"""

import ctypes

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cpu import CpuMultiply, compiled_kernels

# `model_type` of the families whose layers compute what decoder_layer.h does: norm, rotary attention, norm, gated MLP.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LINEARS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
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
    for the CPU, and attention is torch's own; returns whether it is."""
    config = model.config
    if config.model_type not in FAMILIES or config._attn_implementation != "sdpa" or config.hidden_act != "silu":
        return False
    rotated = 2 * model.model.rotary_emb.inv_freq.numel()
    if not all(_fits(layer) and layer.self_attn.head_dim == rotated for layer in model.model.layers):
        return False
    model.model.forward = OneToken(model.model)
    return True


def _fits(layer: nn.Module) -> bool:
    multiplies = [getattr(layer.get_submodule(name), "multiply", None) for name in LINEARS]
    sizes = layer.self_attn.head_dim, layer.mlp.gate_proj.in_features, layer.mlp.gate_proj.out_features
    return all(isinstance(each, CpuMultiply) for each in multiplies) and not any(size % WHOLE for size in sizes)


class OneToken:
    """What a decoder is called with, and gives: one token's hidden states in C++, and others by itself."""

    def __init__(self, decoder: nn.Module):
        self._decoder, self._own, self._decode = decoder, type(decoder).forward, compiled_kernels().decode_token
        attention = decoder.layers[0].self_attn
        self._head_size = attention.head_dim
        self._key_heads = attention.k_proj.out_features // self._head_size
        # Held, since the kernels know addresses only.
        self._norms: list[Tensor] = []
        self._norm = self._address(decoder.norm)
        self._layers = (_DecoderLayer * len(decoder.layers))(*map(self._parameters, decoder.layers))

    def _parameters(self, layer: nn.Module) -> _DecoderLayer:
        attention, config = layer.self_attn, self._decoder.config
        multiplies = [layer.get_submodule(name).multiply for name in LINEARS]
        return _DecoderLayer(
            config.hidden_size,
            attention.q_proj.out_features // self._head_size,
            self._key_heads,
            self._head_size,
            multiplies[0].avx512,
            config.rms_norm_eps,
            attention.scaling,
            *(ctypes.addressof(multiply.matrix) for multiply in multiplies),
            *map(self._address, (layer.input_layernorm, layer.post_attention_layernorm)),
            *(self._address(getattr(attention, name, None)) for name in ("q_norm", "k_norm")),
        )

    def _address(self, norm: nn.Module | None) -> int | None:
        if norm is None:
            return None
        self._norms.append(norm.weight.detach().contiguous())
        return self._norms[-1].data_ptr()

    def __call__(self, input_ids: Tensor | None = None, attention_mask=None, past_key_values=None, **others):
        one = input_ids is not None and input_ids.shape == (1, 1) and self._is_plain(past_key_values)
        if one and self._is_all(others) and (attention_mask is None or _sees_all(attention_mask)):
            return self._step(input_ids, past_key_values, others.get("position_ids"))
        call = {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": past_key_values}
        return self._own(self._decoder, **call, **others)

    def _is_plain(self, cache) -> bool:
        """Whether a cache keeps all of every layer's keys and values of one sequence, and has some."""
        return (
            type(cache) is DynamicCache
            and len(cache.layers) == len(self._layers)
            and all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)
            and len(keys := cache.layers[0].keys) == 1
            and keys.dtype == torch.bfloat16
            and keys.device.type == "cpu"
        )

    def _is_all(self, others: dict) -> bool:
        """Whether nothing but the last hidden states is asked for."""
        config = self._decoder.config
        more = (
            others.get(name, getattr(config, name, False)) for name in ("output_hidden_states", "output_attentions")
        )
        return not any(more) and others.get("return_dict", True)

    def _step(self, input_ids: Tensor, cache: DynamicCache, position_ids: Tensor | None) -> BaseModelOutputWithPast:
        known = cache.layers[0].keys.shape[2]
        memory = self._memory(cache, known)
        states = self._decoder.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.full((1, 1), known)
        cosines, sines = self._decoder.rotary_emb(states, position_ids=position_ids)
        self._decode(
            self._layers,
            len(self._layers),
            self._norm,
            cosines.data_ptr(),
            sines.data_ptr(),
            memory.data_ptr(),
            memory.shape[-2],
            known,
            states.data_ptr(),
            torch.get_num_threads(),
        )
        seen = memory[..., : known + 1, :].flatten(0, 1).unbind()
        for place, layer in enumerate(cache.layers):
            layer.keys, layer.values = seen[2 * place : 2 * place + 2]
        return BaseModelOutputWithPast(last_hidden_state=states, past_key_values=cache)

    def _memory(self, cache: DynamicCache, known: int) -> Tensor:
        """[layers, keys and values, 1, key heads, room, head size], in front what the cache knows, then room."""
        keys, memory = cache.layers[0].keys, getattr(cache, "memory", None)
        if memory is None or keys.data_ptr() != memory.data_ptr() or memory.shape[-2] == known:
            room = 2 * known + MORE_ROOM
            memory = keys.new_empty(len(cache.layers), 2, 1, self._key_heads, room, self._head_size)
            for own, layer in zip(memory, cache.layers, strict=True):
                own[0, ..., :known, :], own[1, ..., :known, :] = layer.keys, layer.values
            cache.memory = memory
        return memory


def _sees_all(mask) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all())
