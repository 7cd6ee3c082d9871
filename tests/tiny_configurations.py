"""A tiny configuration of any family that transformers has, by the names of its fields."""

import re
from dataclasses import fields

from transformers import CONFIG_MAPPING

VOCABULARY = 128
LAYERS = 5
# The first pattern that a field's name matches says how large it is at most; a larger one of another name becomes 16.
SIZES = (
    (r"(unpadded_)?vocab_size(_per_layer_input)?|vocabulary_size", VOCABULARY),
    (r"(num_|n_)?(hidden_|decoder_|text_)?layers?|n_layers?", LAYERS),
    (r"(num_)?encoder_layers|depth", 2),
    (r"hidden_size|n_embd|d_model|embed_dim|dim|embedding_size|embedding_dim|word_embed_proj_dim", 48),
    (r".*num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num", 2),
    (r"(num_|n_)?.*heads?", 4),
    (r".*_rank", 16),
    (r"qk_rope_head_dim", 4),
    (r"qk_nope_head_dim", 8),
    (r".*head_dim|d_head|d_kv|.*_head_size", 12),
    (r".*shared_experts", 1),
    (r".*(per_tok|per_token|topk|top_k)", 2),
    (r"n_group|topk_group", 1),
    (r".*experts", 4),
    (r"(shared_)?(moe_|expert_).*(intermediate|ffn|hidden).*(size|dim)", 24),
    (r".*intermediate_size|.*ffn.*(dim|size)|n_inner|d_ff|.*mlp_dim", 72),
    (r".*max_position.*|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length|max_target_positions", 64),
    (r".*window_size|sliding_window.*", 8),
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 12}
# What the names do not tell, of families whose sizes depend on each other; where a family allows it, heads that do not
# divide the hidden size, and a block of each of its kinds.
CHANGES = {
    "axk2": {"num_key_value_heads": 4},
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), ROPE)},
    "codegen": {"rotary_dim": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 48},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v32": {"num_key_value_heads": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": {}},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 10},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16, "intermediate_size": 72},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2], [["global"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**MAMBA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 12},
    "hunyuan_v1_moe": {"head_dim": 12},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"]},
    "longcat_flash": {"head_dim": 4, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 12},
    "marian": {"pad_token_id": 1, "decoder_vocab_size": VOCABULARY},
    "ministral": {"head_dim": 12},
    "mistral": {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 12},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {
        **{"mamba_num_heads": 8, "mamba_head_dim": 12, "n_groups": 2},
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
    },
    "prophetnet": {"num_buckets": 32, "relative_max_distance": VOCABULARY},
    "qwen3": {"num_attention_heads": 5, "num_key_value_heads": 1},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 12},
        **{"indexer_budget": 16, "indexer_compress_ratio": 4, "ngram_vocab_size_base": 100, "split_ngram_parts": 2},
    },
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 32], "axial_pos_shape": [8, 8]},
    "rwkv": {"attention_hidden_size": 48},
    "stablelm": {"partial_rotary_factor": 0.5},
    "xlnet": {"d_head": 12},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 9, "attn_layer_period": 3, "attn_layer_offset": 2, "attention_hidden_size": 96},
    "zamba2": {
        "num_hidden_layers": 7,
        "layers_block_type": [
            *["linear_attention", "hybrid"],
            *["linear_attention"] * 2,
            *["hybrid", "hybrid", "hybrid"],
        ],
    },
}


# Of which a token sees those after it, unless they are told to be decoders.
ENCODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)


def tiny_configuration(family: str, **changes: object):
    """The configuration of a family, by its `model_type`, with every size small; changes: fields as they are given."""
    told = {"is_decoder": True} if family in ENCODERS else {}
    return _tiny(CONFIG_MAPPING[family], told | CHANGES.get(family, {}) | changes)


def _tiny(configuration: type, changes: dict):
    default = configuration()
    small = {}
    for field in fields(configuration):
        value = vars(default).get((configuration.attribute_map or {}).get(field.name, field.name))
        if not field.init or field.name in changes:
            continue
        if field.name in (configuration.sub_configs or {}):
            if hasattr(value, "to_dict"):
                small[field.name] = _tiny(type(value), CHANGES.get(value.model_type, {}))
        elif field.name in TOKEN_IDS:
            if isinstance(value, list) or (isinstance(value, int) and value >= VOCABULARY):
                small[field.name] = 1
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in SIZES if re.fullmatch(pattern, field.name)), None)
            if value > (64 if size is None else size):
                small[field.name] = size or 16
    return configuration(**small | changes)
