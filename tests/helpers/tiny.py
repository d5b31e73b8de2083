"""Models of a few thousand weights, one of each architecture that stores its weights in a way of its own."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
DECODER = {**SHAPE, **TOKENS, "max_position_embeddings": 128}
DEEPSEEK = {
    **DECODER,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
MOE = {"intermediate_size": 16, "num_experts_per_tok": 2, "num_key_value_heads": 2}

CONFIGS = {
    "llama": ("LlamaConfig", {**DECODER, "intermediate_size": 48, "num_key_value_heads": 2}),
    "gemma3": (
        "Gemma3TextConfig",
        {**DECODER, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
    ),
    "gpt2": (
        "GPT2Config",
        {**TOKENS, **NO_DROPOUT, "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ),
    "bert": ("BertConfig", {**SHAPE, "intermediate_size": 48, "max_position_embeddings": 128}),
    "olmoe": ("OlmoeConfig", {**DECODER, **MOE, "num_experts": 8}),
    "mixtral": ("MixtralConfig", {**DECODER, **MOE, "num_local_experts": 8}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**DECODER, **MOE, "num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8, "mlp_only_layers": []},
    ),
    "deepseek_v2": ("DeepseekV2Config", {**DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "deepseek_v3": ("DeepseekV3Config", {**DEEPSEEK, "q_lora_rank": 16, "n_group": 2, "topk_group": 1}),
    "gpt_oss": ("GptOssConfig", {**DECODER, **MOE, "num_local_experts": 8, "head_dim": 8}),
}
MOE_KINDS = ("olmoe", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss")


# of a model that sees, for its class
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
QWEN_VL = {
    "text_config": {**CONFIGS["llama"][1], "rope_parameters": _ROPE, "model_type": "qwen2_vl_text"},
    "vision_config": {**_VISION, "spatial_merge_size": 1},
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}


def tiny_model(
    kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, vocab_size: int = 64, **overrides: object
) -> PreTrainedModel:
    """A random model of two layers; `overrides` go to its config."""
    torch.manual_seed(seed)
    name, settings = CONFIGS[kind]
    config = getattr(transformers, name)(**{**settings, "vocab_size": vocab_size, **overrides})
    auto = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=dtype, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        # larger than the default initialization, so that a wrong slice changes a loss in its first digits
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most 300 tokens, with pad and eos apart."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<unk>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat", "yes no good bad"] * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        bos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
    )
