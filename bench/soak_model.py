"""The soak's model: a Llama of two layers with random weights, a tokenizer of a few hundred tokens, and adapters that change it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import lora
from cluster.types import Adapter
from deployments.engine.adapter_files import content_digest

VOCABULARY = 320
"""Of the model. Its last token is none of the tokenizer's, the one before ends a turn."""
NUM_ADAPTERS = 12
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": VOCABULARY - 2,
    "pad_token_id": 0,
}
SPREAD = 0.3
"""Of all random numbers: large enough that every token depends on the whole context, and every answer on its adapter."""


def build(directory: Path) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE)).float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=SPREAD)
    model.save_pretrained(directory)
    _tokenizer(directory)
    return directory


def adapters(base: Path, count: int = NUM_ADAPTERS) -> dict[Adapter, Path]:
    """Each with its files."""
    folder = lora.adapters(base, 4, count, spread=SPREAD)
    found = [folder / f"{number:03}" for number in range(1, count + 1)]
    return {Adapter("soak", path.name, content_digest(path).hex()): path for path in found}


def _tokenizer(target: Path) -> None:
    """Byte-level BPE that has seen JSON, with the marks of calls that Qwen has, which are no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 4, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(['{"name": "switch", "arguments": {"on": true, "steps": 0}}', __doc__ or ""] * 4, trainer)
    library.add_tokens(["<tool_call>", "</tool_call>"])
    library.add_special_tokens(["<|end|>"])
    assert library.get_vocab_size() == VOCABULARY - 1
    library.save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"})
    )
