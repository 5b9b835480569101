"""Tokenizers for tests, trained in a moment on a few lines and written the way real models come."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. 0123456789 (a + b) * c == d; {'key': [1, 2, 3]}",
    "def split(self, sep=None, maxsplit=-1):\n    return a list of the words in the string\n\n\t# comments",
    "Größe, façade, naïve, 東京, привет, 😀 emoji, system user assistant",
] * 20

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ROLE_TOKENS = """{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}
<|{{ message.role }}|>
{{ message.content | trim }}<|end|>
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def byte_level(directory: Path, template: str | None = CHATML, **config: Any) -> Path:
    """GPT-2's kind, with tokens of ChatML and of `<|role|>` templates, the latter swallowing the whitespace behind them."""
    spec = json.loads(_byte_level())
    return _write(directory, spec, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **config}, template)


def sentencepiece(directory: Path, template: str | None = INST, *, legacy: bool = True, **config: Any) -> Path:
    """Llama 2's kind: `▁` for spaces, bytes for what no piece covers, `<s>` in front. `legacy`: by normalizer, else Metaspace."""
    spec = json.loads(_sentencepiece(legacy))
    return _write(directory, spec, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config}, template)


@cache
def _byte_level() -> str:
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    library.train_from_iterator(CORPUS, trainer)
    library.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end|>"])
    library.add_special_tokens([AddedToken(f"<|{role}|>", rstrip=True) for role in ("system", "user", "assistant")])
    library.add_tokens(["<think>", "</think>"])
    return library.to_str()


@cache
def _sentencepiece(legacy: bool) -> str:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    library = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=pieces, show_progress=False, limit_alphabet=60)
    library.train_from_iterator([line for text in CORPUS for line in text.split("\n")], trainer)
    if legacy:
        library.pre_tokenizer = None
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        library.decoder = decoders.Sequence(steps)
    else:
        library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    spec = json.loads(library.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    spec["model"]["fuse_unk"], spec["model"]["byte_fallback"] = True, True
    return json.dumps(spec)


def _write(directory: Path, spec: dict[str, Any], config: dict[str, Any], template: str | None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 2048}))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory
