"""What is known of model families, by `model_type`: found by trying them (those with a recurrent state: by what they are).

Each was built with small random weights and run in float32 with transformers 5.23 and DeepSpeed 0.19.8: its logits with an
attention function of ours against its own, and sharded by AutoTP over two processes against whole.
`tests/deployments/engine/test_families.py` tries them again, so that a new release that changes an answer is noticed.
"""

from __future__ import annotations

# fmt: off
SHARDABLE = frozenset({
    "apertus", "arcee", "biogpt", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "gpt_neox", "granite", "helium", "llama", "ministral", "ministral3", "mistral", "olmo", "opt", "phi", "qwen2",
    "qwen3", "seed_oss", "smollm3", "starcoder2", "vaultgemma",
    # These have experts, which stay whole on every rank: only attention and dense layers are split.
    "dots1", "ernie4_5_moe", "glm4_moe", "granitemoe", "mixtral", "qwen2_moe", "qwen3_moe",
})
# fmt: on
"""Sharded logits equal whole ones."""

NOT_SHARDABLE_WITH = {"cohere": "use_qk_norm"}
"""Shardable families with a switch that ends it: a norm with a weight for every head, of which a rank has only some."""

_FUSED = "its query, key and value are one matrix, which AutoTP cuts across heads"
_WIDE_NORM = "it normalises queries and keys over all heads, and a rank has only some of them"
_CUT_ROUTER = "AutoTP cuts its experts' router, and the ranks wait for each other for ever"

NOT_SHARDABLE = {
    "phi3": _FUSED,
    "persimmon": _FUSED,
    "gpt2": "AutoTP refuses it",
    "gpt_bigcode": "its heads share one key and value, which can't be divided",
    "olmo2": _WIDE_NORM,
    "olmo3": _WIDE_NORM,
    "olmoe": _WIDE_NORM,
    "bitnet": "it normalises attention outputs over all heads, and a rank has only some of them",
    "hunyuan_v1_dense": "sharded, its logits are wrong",
    "hunyuan_v1_moe": "sharded, its logits are wrong",
    "jetmoe": "AutoTP fails on its experts",
    "phimoe": _CUT_ROUTER,
    "granitemoeshared": _CUT_ROUTER,
}
"""Good on one rank; what goes wrong on two."""

STAGEABLE = SHARDABLE | NOT_SHARDABLE.keys()
"""Cut into stages, their logits equal whole ones to the last bit: each was tried with 2, 3 and 4 stages."""

_OWN_ATTENTION = "its attention can't be replaced through transformers' AttentionInterface, so its keys and values can't be paged"
_RECURRENT = "it keeps a recurrent state beside keys and values"
_NO_WAY_IN = "it doesn't pass what paged attention needs on to its attention"
_UNEQUAL = "its keys and values differ in width"

NOT_SERVABLE = {
    **dict.fromkeys(["bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt", "xglm"], _OWN_ATTENTION),
    **dict.fromkeys(["bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "mamba", "mamba2"], _RECURRENT),
    **dict.fromkeys(["minimax", "nemotron_h", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"], _RECURRENT),
    **dict.fromkeys(["nemotron", "stablelm"], _NO_WAY_IN),
    **dict.fromkeys(["deepseek_v2", "deepseek_v3"], _UNEQUAL),
    "llama4_text": "its layers attend in chunks, which only its mask says",
    "doge": "its mask is computed from values",
    "diffllama": "it attends twice in one layer",
    "gpt_oss": "its attention has sinks",
    "gemma3n_text": "its layers share keys and values",
}
"""Not served on any number of ranks, and why."""
