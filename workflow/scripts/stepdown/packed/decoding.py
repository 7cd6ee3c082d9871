"""One token at a time through decoder layers of the Llama kind, in C++: else what stands between the linears of a small
model takes longer than they do.

A layer stays what transformers made it; only its `forward` is another, which hands on to the layer's own whatever is
not one token of one sequence on the CPU. Keys and values stay in the cache that transformers gives, of any kind.
"""

import ctypes

import torch
from torch import Tensor, nn

from .cpu import CpuMultiply, library

# `model_type` of the families whose layers compute what decoder_layer.h does: norm, rotary attention, norm, gated MLP.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LINEARS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
# The kernels take vectors of so many, and have no last part of one.
WHOLE = 8


class _DecoderLayer(ctypes.Structure):
    """`DecoderLayer` of kernels/decoder_layer.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "key_heads", "head_size", "avx512")),
        *((name, ctypes.c_double) for name in ("epsilon", "scaling")),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_attention_norm", "query_norm", "key_norm")),
    ]


class _Memory(ctypes.Structure):
    """`Memory` of kernels/decoder_layer.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("length", "key_head_stride", "key_stride")),
        *((name, ctypes.c_int64) for name in ("value_head_stride", "value_stride")),
        ("seen", ctypes.c_void_p),
    ]


def quicken_decoding(model: nn.Module) -> bool:
    """Have the decoder layers of a model compute single tokens in C++, if they are of a kind that is known, all their
    linears are packed for the CPU, and attention is torch's own; returns whether they are."""
    config = model.config
    if config.model_type not in FAMILIES or config._attn_implementation != "sdpa" or config.hidden_act != "silu":
        return False
    layers = list(model.model.layers)
    if not all(_fits(layer) for layer in layers):
        return False
    for layer in layers:
        layer.forward = OneToken(layer, config)
    return True


def _fits(layer: nn.Module) -> bool:
    multiplies = [getattr(layer.get_submodule(name), "multiply", None) for name in LINEARS]
    sizes = layer.self_attn.head_dim, layer.mlp.gate_proj.in_features, layer.mlp.gate_proj.out_features
    return all(isinstance(each, CpuMultiply) for each in multiplies) and not any(size % WHOLE for size in sizes)


class OneToken:
    """What a decoder layer is called with, and gives: one token's hidden states in C++, and others by the layer."""

    def __init__(self, layer: nn.Module, config):
        self._layer, self._own = layer, type(layer).forward
        attention, library_ = layer.self_attn, library()
        self._before, self._after = library_.decoder_layer_before, library_.decoder_layer_after
        self._place, self._head_size = attention.layer_idx, attention.head_dim
        self._heads = attention.q_proj.out_features // self._head_size
        self._key_heads = attention.k_proj.out_features // self._head_size
        norms = layer.input_layernorm, layer.post_attention_layernorm
        norms = *norms, getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        # Held, since the kernels know addresses only.
        self._norms = [None if norm is None else norm.weight.detach().contiguous() for norm in norms]
        multiplies = [layer.get_submodule(name).multiply for name in LINEARS]
        self._parameters = _DecoderLayer(
            config.hidden_size,
            self._heads,
            self._key_heads,
            self._head_size,
            multiplies[0].avx512,
            config.rms_norm_eps,
            attention.scaling,
            *(ctypes.addressof(multiply.matrix) for multiply in multiplies),
            *(None if norm is None else norm.data_ptr() for norm in self._norms),
        )

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **others,
    ) -> Tensor:
        if past_key_values is not None and self._is_one_token(hidden_states, position_embeddings, attention_mask):
            return self._step(hidden_states, attention_mask, past_key_values, *position_embeddings)
        return self._own(
            self._layer,
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **others,
        )

    def _is_one_token(self, states: Tensor, positions: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> bool:
        """Whether it is one, in bf16, whole heads are rotated, and a mask only says which keys are seen."""
        return (
            states.shape[:2] == (1, 1)
            and states.dtype == torch.bfloat16
            and states.device.type == "cpu"
            and positions is not None
            and positions[0].shape[-1] == self._head_size
            and (mask is None or (mask.dtype == torch.bool and mask.shape[:3] == (1, 1, 1) and mask.stride(-1) == 1))
        )

    def _step(self, hidden_states: Tensor, mask: Tensor | None, cache, cosines: Tensor, sines: Tensor) -> Tensor:
        states = hidden_states.clone(memory_format=torch.contiguous_format)
        query = states.new_empty(self._heads * self._head_size)
        key = states.new_empty(1, self._key_heads, 1, self._head_size)
        value, threads = torch.empty_like(key), torch.get_num_threads()
        layer = ctypes.byref(self._parameters)
        self._before(
            layer,
            states.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            threads,
        )
        keys, values = (_rows(tensor) for tensor in cache.update(key, value, self._place))
        memory = _Memory(
            keys.data_ptr(),
            values.data_ptr(),
            keys.shape[2],
            *keys.stride()[1:3],
            *values.stride()[1:3],
            None if mask is None else mask[..., : keys.shape[2]].data_ptr(),
        )
        self._after(layer, ctypes.byref(memory), query.data_ptr(), states.data_ptr(), threads)
        return states


def _rows(states: Tensor) -> Tensor:
    return states if states.stride(-1) == 1 else states.contiguous()
