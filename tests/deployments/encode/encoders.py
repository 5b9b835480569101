"""Tiny encoders with random weights, saved the way real ones come: six families, as embedding models and as classifiers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "modernbert")
TEXT = "the quick brown fox jumps over a lazy dog split join text into words list of numbers red blue green cat house"
WORDS = TEXT.split()
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
OFFSET = {"pad_token_id": 1, "max_position_embeddings": 66, "type_vocab_size": 1}
DIFFERENCES: dict[str, dict[str, Any]] = {
    "bert": {"pad_token_id": 1},
    "roberta": OFFSET,
    "xlm-roberta": OFFSET,
    "distilbert": {"pad_token_id": 1, "dim": 64, "hidden_dim": 96, "n_heads": 2, "n_layers": 2},
    "mpnet": {"pad_token_id": 1, "max_position_embeddings": 66},
    "modernbert": {"pad_token_id": 1, "local_attention": 8, "global_attn_every_n_layers": 2, "sep_token_id": 2, "cls_token_id": 0},
}


def config(family: str, **more: Any) -> transformers.PretrainedConfig:
    sizes = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    return transformers.AutoConfig.for_model(family, **{**sizes, **DIFFERENCES[family], **more})


def build(family: str, directory: Path, **more: Any) -> Path:
    """An embedding model: mean pooling, unless `pooling` says otherwise."""
    modes = more.pop("pooling", "mean")
    torch.manual_seed(7)
    transformers.AutoModel.from_config(config(family, **more)).save_pretrained(directory)
    _tokenizer(directory)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    name = "sentence_transformers.models"
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"{name}.{kind}"} for i, (path, kind) in enumerate(kinds)]
    write(directory / "modules.json", modules)
    write(directory / "1_Pooling" / "config.json", {"embedding_dimension": 64, "pooling_mode": modes})
    write(directory / "sentence_bert_config.json", {"max_seq_length": 48, "do_lower_case": False})
    return directory


def build_classifier(family: str, directory: Path, labels: int = 3, **more: Any) -> Path:
    names = {i: f"label {i}" for i in range(labels)}
    torch.manual_seed(11)
    settings = config(family, id2label=names, label2id={name: i for i, name in names.items()}, **more)
    model = transformers.AutoModelForSequenceClassification.from_config(settings)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(directory)
    _tokenizer(directory)
    return directory


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _tokenizer(directory: Path) -> None:
    """A word a token, `<s> … </s>` around it, a pair's second text in segment 1. Left alone it truncates and pads."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    library = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(SPECIAL)
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    library.enable_truncation(12)
    library.enable_padding(pad_id=1, pad_token="<pad>", length=12)
    library.save(str(directory / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
    write(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, "unk_token": "<unk>", **tokens},
    )
