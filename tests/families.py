"""Tiny random models of each family, made from their transformers config classes."""

from pathlib import Path

import torch
from tiny_configurations import LAYERS, VOCABULARY, tiny_configuration
from torch import nn
from transformers.pytorch_utils import Conv1D

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
GATED = SIZES | {"intermediate_size": 72, "num_key_value_heads": 2, "max_position_embeddings": 64}
# Heads that do not divide the hidden size.
UNEVEN = {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 12}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}

FAMILIES = {
    "llama": ("LlamaConfig", GATED),
    "llama_tied": ("LlamaConfig", GATED | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", GATED | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", GATED | UNEVEN),
    "opt": ("OPTConfig", SIZES | {"ffn_dim": 72, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "gpt_neox": ("GPTNeoXConfig", SIZES | {"intermediate_size": 72, "max_position_embeddings": 64}),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}),
    "mixtral": ("MixtralConfig", GATED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeConfig", GATED | EXPERTS | {"shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3MoeConfig", GATED | EXPERTS | UNEVEN),
    # Not asked for by name: families whose layers return tuples, and one with two kinds of attention mask.
    "bloom": ("BloomConfig", SIZES),
    "falcon": ("FalconConfig", SIZES | {"bias": True}),
    "gemma2": ("Gemma2Config", GATED | {"head_dim": 10, "sliding_window": 8}),
}


def make_model(family: str, folder: Path, seed: int = 0, dtype: str = "float32", **changes: object) -> Path:
    """Save a random model of the family, one of `FAMILIES` or any `model_type`, into `folder`; returns the folder."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None if family != "opt" else 1}
    if family in FAMILIES:
        name, sizes = FAMILIES[family]
        config = getattr(transformers, name)(**sizes | special | changes)
    else:
        config = tiny_configuration(family, **changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    # Larger than the usual initial weights, so that mistakes show in the logits.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def with_uneven_norms(folder: Path) -> Path:
    """The model of a folder as if it were trained: its norms are not all ones any more, nor its shifts zeros."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def as_it_computes(model):
    """Every matrix [out, in] of the decoder layers of a Hugging Face model, whatever form it has there."""
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            yield module.weight.T
        elif isinstance(module, nn.Linear) and "." in name and any(part.isdigit() for part in name.split(".")):
            yield module.weight
        elif name.endswith(".experts"):
            for fused in (module.gate_up_proj, module.down_proj):
                yield from fused
