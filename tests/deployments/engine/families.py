"""Tiny models with random weights, one for each architecture that the engine is tested with, and what transformers says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 288

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 128,  # DeepSpeed deals out columns by 64
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
NEOX = {key: value for key, value in SHAPE.items() if key not in ("num_key_value_heads", "head_dim")}
MINIMAL = {key: value for key, value in NEOX.items() if key != "intermediate_size"}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "qwen2": SHAPE,
    "qwen3": SHAPE,
    "mistral": SHAPE | {"sliding_window": 8},
    "gemma2": SHAPE | {"sliding_window": 8, "query_pre_attn_scalar": 24},
    "phi3": SHAPE,
    "gemma": SHAPE,
    "granite": SHAPE
    | {"residual_multiplier": 0.7, "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "logits_scaling": 2.0},
    "gpt_neox": NEOX,
    "opt": MINIMAL | {"ffn_dim": 128, "word_embed_proj_dim": 32},
    "bloom": MINIMAL,  # not servable: positions come from its attention mask
    "falcon": MINIMAL,  # not servable: looks its attention up in a table of its own
}


def build(family: str, directory: Path, *, seed: int = 0) -> Path:
    """A model directory with weights large enough that every token depends on the whole context."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    if model.config.tie_word_embeddings:  # else a token's own embedding wins over everything that the layers say
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.05)
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def build_tokenizer() -> Any:
    """Byte-level BPE of `VOCABULARY` tokens with a chat template; the last token ends a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([__doc__ or ""] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": "<|end|>"})
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}assistant:"
    assert len(fast) == VOCABULARY
    return fast


def reference(directory: Path, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """What `transformers.generate` answers greedily in float32, one prompt at a time. Eager: other ways leave out Gemma's soft caps
    in some versions."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    answers = []
    for prompt in prompts:
        output = model.generate(torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False)
        answers.append(output[0, len(prompt) :].tolist())
    return answers
