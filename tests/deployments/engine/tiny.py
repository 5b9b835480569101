"""Models of many families with a few thousand random weights, built by transformers from a configuration alone."""

from __future__ import annotations

from typing import Any

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
UNGROUPED = {"biogpt", "bloom", "gpt_neo", "gpt_neox", "mpt", "opt", "persimmon"}  # as many key/value heads as query heads
OF_GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 4, "n_head": 8, "n_positions": 256}
NARROW: dict[str, Any] = {"head_dim": 8}
WINDOW: dict[str, Any] = {"sliding_window": 16}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED: dict[str, Any] = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, **EXPERTS}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "num_key_value_heads": 8,
}

DIFFERENCES: dict[str, dict[str, Any]] = {
    "cohere2": WINDOW,
    "deepseek_v2": {**ROUTED, **LATENT},
    "deepseek_v3": {**ROUTED, **LATENT},
    "dots1": {**ROUTED, **NARROW, "n_shared_experts": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "exaone4": WINDOW,
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 4, "alibi": False},
    "gemma": NARROW,
    "gemma2": NARROW | WINDOW,
    "gemma3_text": NARROW | WINDOW,
    "glm": NARROW,
    "glm4": NARROW,
    "glm4_moe": ROUTED | NARROW,
    "gpt_neo": {"num_layers": 4, "num_heads": 8, "attention_types": [[["global", "local"], 2]]},
    "gpt_oss": EXPERTS | NARROW | WINDOW,
    "granitemoe": EXPERTS,
    "helium": NARROW,
    "hunyuan_v1_dense": NARROW,
    "hunyuan_v1_moe": NARROW | {"num_experts": 4},
    "jetmoe": {"kv_channels": 8, "num_local_experts": 4},
    "llama4_text": NARROW | {"num_local_experts": 4, "attention_chunk_size": 16, "intermediate_size_mlp": 96},
    "ministral": NARROW | WINDOW,
    "ministral3": NARROW,
    "mixtral": EXPERTS,
    "olmo3": WINDOW,
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 48},
    "qwen3": NARROW,
    "qwen3_moe": EXPERTS | NARROW,
    "seed_oss": NARROW,
    "vaultgemma": NARROW | WINDOW,
    "xglm": {"d_model": 64, "num_layers": 4, "attention_heads": 8, "ffn_dim": 96},
}


def build(family: str, attention: str = "eager", **options: Any) -> Any:
    """A causal language model in float32 whose weights are large enough for a wrong one to show in the logits; `options` are
    further entries of its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = OF_GPT2 if family in {"gpt2", "gpt_bigcode", "gptj", "codegen"} else SIZES
    if family in UNGROUPED:
        sizes = {name: size for name, size in sizes.items() if name != "num_key_value_heads"}
    config = AutoConfig.for_model(family, **(sizes | DIFFERENCES.get(family, {}) | options))
    if family in {"gptj", "codegen"}:
        config.rotary_dim = 4
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12, generator=generator)
            else:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    return model
