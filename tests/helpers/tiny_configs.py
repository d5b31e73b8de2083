"""A configuration of a few thousand weights for any architecture of transformers, made by rules on its settings."""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

LAYERS, HEADS, HEAD, WIDTH = 2, 4, 8, 32
# the settings of one size have many names
SIZES: dict[int, str] = {
    WIDTH: "hidden_size d_model n_embd dim embed_dim embedding_size hidden_dim word_embed_proj_dim lru_width "
    "rnn_hidden_size attention_hidden_size decoder_hidden_size output_hidden_size out_hidden_size output_dim "
    "projection_dim hidden_size_per_layer_input embed_dim_per_layer cross_attention_hidden_size adapter_dim n_hidden",
    48: "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size block_ff_dim encoder_ffn_dim decoder_ffn_dim "
    "shared_intermediate_size mlp_hidden_size dense_intermediate_size prefix_intermediate_size block_multiple_of "
    "attention_ffn_dim mamba_intermediate_size intermediate_size_mlp feed_forward_size",
    16: "moe_intermediate_size expert_ffn_hidden_size kv_lora_rank q_lora_rank shared_expert_intermediate_size "
    "moe_shared_expert_intermediate_size o_lora_rank intermediate_size_moe expert_intermediate_size "
    "moe_latent_size index_lora_rank zaya_mlp_expansion adapter_rank block_size local_attn_chunk_length "
    "lsh_attn_chunk_length window_size attention_window_size local_window_size sliding_window index_topk",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_blocks num_experts_per_tok experts_per_token num_experts_per_token moe_topk moe_k "
    "num_ngram_hash num_attention_layers top_k_experts moe_top_k "
    "num_selected_experts top_k num_key_value_heads num_kv_heads n_head_kv multi_query_group_num "
    "linear_num_key_heads swa_num_key_value_heads num_global_key_value_heads",
    HEADS: "num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts linear_num_value_heads index_n_heads index_num_heads swa_num_attention_heads "
    "num_mem_heads num_shared_heads num_routed_experts attention_num_heads",
    HEAD: "head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim qk_head_dim kv_channels d_kv attention_key_size "
    "linear_key_head_dim linear_value_head_dim index_head_dim swa_head_dim swa_v_head_dim global_head_dim "
    "mamba_d_head mamba_head_dim mamba_d_state ssm_state_size state_size d_state mamba_num_heads mamba_n_heads "
    "mamba_expert_heads chunk_size mamba_chunk_size dt_rank time_step_rank mamba_dt_rank attention_head_dim "
    "attention_head_size qkv_head_dim patch_size",
    64: "vocab_size decoder_vocab_size text_vocab_size n_positions n_ctx max_position_embeddings "
    "max_source_positions max_target_positions vocab_size_per_layer_input "
    "max_sequence_length original_max_position_embeddings mamba_d_ssm image_size audio_vocab_size",
    1: "n_group topk_group n_groups mamba_n_groups mamba_ngroups first_k_dense_replace n_shared_experts "
    "num_shared_experts moe_num_shared_experts num_nextn_predict_layers",
}
BY_NAME = {name: size for size, names in SIZES.items() for name in names.split()}
# one id of each special token within the vocabulary
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
# what follows from the sizes, where the rules by name don't give it
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "codegen": {"rotary_dim": 4},
    "bailing_hybrid": {"num_group": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
    "dots1": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling2_loop_text": {"unpadded_vocab_size": 64},
    "inkling2_text": {"unpadded_vocab_size": 64},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {
        "num_key_value_heads": 4,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "head_dim": 8,
        "qk_head_dim": 16,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 64,
        "shape_embed_dim": 8,
        "shape_vocab_size": 64,
    },
    "xlm": {"emb_dim": 32, "n_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid"] * 3, "attention_hidden_size": 64},
    "zamba2": {"mamba_headdim": 8, "n_mamba_heads": 8, "attention_hidden_size": 64},
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A config of `model_type` whose sizes are tiny, with a layer of every kind that its default has."""
    return _shrunk(CONFIG_MAPPING[model_type], model_type)


def _shrunk(cls: type[PreTrainedConfig], model_type: str) -> PreTrainedConfig:
    default = cls()
    settings = _settings(vars(default))
    for name, sub in (getattr(cls, "sub_configs", None) or {}).items():
        mine = getattr(default, name, None)
        kind = type(mine) if isinstance(mine, PreTrainedConfig) else sub
        if kind.__name__ != "AutoConfig":
            settings[name] = _shrunk(kind, kind.model_type)
    if "kv_lora_rank" in settings:
        # latent attention has as many heads of keys as of queries
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings |= OWN.get(model_type, {})
    return cls(**{name: value for name, value in settings.items() if value is not None})


def _settings(default: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, value in default.items():
        if name in BY_NAME and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            settings[name] = min(value, BY_NAME[name])
        elif name.endswith("_token_id") and isinstance(value, int):
            settings[name] = TOKENS.get(name, 3)
        elif "dropout" in name or name.endswith("pdrop") or name == "layerdrop":
            settings[name] = 0.0 if isinstance(value, float) else value
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = default.get(name)
        if isinstance(kinds, list) and kinds:
            settings[name] = _first_of_each(kinds)
    count = max([LAYERS, *(len(each) for each in settings.values() if isinstance(each, list))])
    for name, value in settings.items():
        if isinstance(value, list):
            settings[name] = value + [value[-1]] * (count - len(value))
        elif name in ("num_hidden_layers", "n_layer", "num_layers"):
            settings[name] = count
    return settings


def _first_of_each(kinds: list[str]) -> list[str]:
    return list(dict.fromkeys(kinds))
