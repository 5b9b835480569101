"""The models that engines are compared on, built on the spot: random weights, and a tokenizer trained on Python's library."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODELS: dict[str, dict[str, Any]] = {
    "S": {
        "model_type": "llama",
        "vocab_size": 16384,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "M": {
        "model_type": "qwen2",
        "vocab_size": 32768,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
"""S: 40 M parameters, Llama. M: 387 M, the geometry of Qwen2.5-0.5B with a smaller vocabulary."""
_COMMON = {"max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "dtype": "bfloat16"}


def directory(name: str, cache: Path | None = None, *, context: int | None = None) -> Path:
    """The model's Hugging Face directory, built unless it is there from last time. `context`: another context window, in tokens."""
    cache = cache or Path(os.environ.get("MMAAS_BENCH_CACHE") or Path(tempfile.gettempdir()) / "mmaas-bench")
    spec = MODELS[name] | _COMMON | ({"max_position_embeddings": context} if context else {})
    target = cache / f"{name}-{_key(spec)}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=cache))
        try:
            _tokenizer(spec["vocab_size"], unfinished)
            _weights(spec, unfinished)
            unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _key(spec: dict[str, Any]) -> str:
    """Another specification or another builder is another model."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode() + Path(__file__).read_bytes()).hexdigest()[:12]


def _weights(spec: dict[str, Any], target: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**spec)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(target)


def _tokenizer(vocab_size: int, target: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(islice(_standard_library(), 2000), trainer)
    library.save(str(target / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0], "chat_template": CHAT_TEMPLATE}
    (target / "tokenizer_config.json").write_text(json.dumps(config))


def _standard_library() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            yield path.read_text(encoding="utf-8", errors="ignore")
