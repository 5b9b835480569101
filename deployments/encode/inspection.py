"""Admission of an encoder's directory: what it holds and what is made of its hidden states, or why it can't be served.

Light: reads JSON and headers, before any process starts. What a directory says in sentence-transformers' files (`modules.json`,
`1_Pooling/config.json`, `sentence_bert_config.json`, `config_sentence_transformers.json`) is followed or refused, never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.errors import ModelNotServable
from deployments.engine.model_config import check_runs_no_code, positive, read_json
from deployments.engine.weights import find_weights

FAMILIES = frozenset({"bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "modernbert"})
"""Model types that were tried against transformers."""
OFFSET = frozenset({"roberta", "xlm-roberta", "mpnet"})
"""Those whose first position is the one behind the padding token's id."""
DTYPES = ("float32", "bfloat16")
CLASSIFIER = "ForSequenceClassification"

Task = Literal["embed", "classify"]
Pooling = Literal["cls", "mean", "max", "mean_sqrt_len_tokens", "lasttoken"]
_POOLINGS: dict[str, Pooling] = {
    "cls": "cls",
    "mean": "mean",
    "max": "max",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "lasttoken": "lasttoken",
}
_OLD_POOLINGS = {  # before sentence-transformers 5.4, in the order in which it joins them
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS = ("Tanh", "Identity", "ReLU", "GELU", "Sigmoid")
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer behind the pooling: its folder, and the name of the activation in `torch.nn`."""

    folder: str
    activation: str


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """An encoder that can be served."""

    model_type: str
    task: Task
    hidden_size: int
    vocab_size: int
    max_tokens: int  # of one row, special tokens included
    num_parameters: int
    dtype: str
    poolings: tuple[Pooling, ...] = ()  # joined one behind the other
    dense: tuple[Dense, ...] = ()
    normalised: bool = False
    matryoshka: tuple[int, ...] = ()  # lengths that an embedding may be cut to
    any_length: bool = False  # it may be cut to any length
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt: str | None = None
    lowercase: bool = False
    labels: tuple[str, ...] = ()
    multi_label: bool = False


def is_encoder(directory: Path) -> bool:
    """Whether it holds an encoder rather than a language model. Raises ModelNotServable for an unreadable config.json."""
    config = read_json(directory / "config.json")
    architecture = _architecture(config)
    if (directory / "modules.json").is_file() or architecture.endswith(CLASSIFIER):
        return True
    return config.get("model_type") in FAMILIES and not architecture.endswith(("ForCausalLM", "LMHeadModel"))


def is_classifier(directory: Path) -> bool:
    """Whether an encoder has labels rather than embeddings."""
    return _architecture(read_json(directory / "config.json")).endswith(CLASSIFIER)


def inspect(directory: str | Path, *, tp: int, dtype: str, max_model_len: int | None = None) -> EncoderInfo:
    """Raises ModelNotServable, with what to change, for an encoder that can't be served as asked."""
    directory = Path(directory)
    config = read_json(directory / "config.json")
    check_runs_no_code(config)
    model_type, architecture = config.get("model_type"), _architecture(config)
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelNotServable(f"encoders of type {model_type!r:.80} can't be served; those that can are {known}")
    if tp != 1:
        raise ModelNotServable(f"an encoder is served whole, by one process: use tp=1, not {tp}, and replicas for more", param="tp")
    if dtype not in DTYPES:
        raise ModelNotServable(f"an encoder's dtype must be {' or '.join(DTYPES)}, not {dtype!r:.40}", param="dtype")
    if config.get("quantization_config"):
        raise ModelNotServable("the checkpoint is quantised; use the model's 16 or 32 bit weights")
    if not (directory / "tokenizer.json").is_file():
        raise ModelNotServable(
            f"{directory.name} has no tokenizer.json; save the model's tokenizer there with save_pretrained(...)"
        )
    weights = find_weights(directory)
    is_classifier = architecture.endswith(CLASSIFIER)
    facts = _labels(config) if is_classifier else _sentence_facts(directory)
    return EncoderInfo(
        model_type=model_type,
        task="classify" if is_classifier else "embed",
        hidden_size=positive(config, "hidden_size", "dim"),
        vocab_size=positive(config, "vocab_size"),
        max_tokens=_length(directory, config, max_model_len),
        num_parameters=weights.num_parameters,
        dtype=dtype,
        lowercase=bool(read_json(directory / "sentence_bert_config.json").get("do_lower_case")),
        **facts,
    )


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""


def _length(directory: Path, config: Mapping[str, Any], wanted: int | None) -> int:
    """Tokens of a row: as the deployment wants, else as the model's makers recommend, never more than it has positions for."""
    own = positive(config, "max_position_embeddings")
    if config["model_type"] in OFFSET:
        own -= positive(config, "pad_token_id", default=1) + 1
    if wanted is not None:
        if not 0 < wanted <= own:
            raise ModelNotServable(f"max_model_len={wanted} is not within 1 and the model's own {own}", param="max_model_len")
        return wanted
    recommended = read_json(directory / "sentence_bert_config.json").get("max_seq_length")
    if recommended is None:
        recommended = read_json(directory / "tokenizer_config.json").get("model_max_length")
    return min(own, int(recommended)) if isinstance(recommended, (int, float)) and recommended >= 1 else own


def _labels(config: Mapping[str, Any]) -> dict[str, Any]:
    names = config.get("id2label")
    names = names if isinstance(names, dict) and names else {"0": "LABEL_0", "1": "LABEL_1"}  # transformers' own default
    if not all(str(i) in names and isinstance(names[str(i)], str) for i in range(len(names))):
        raise ModelNotServable("config.json: id2label must name the labels 0, 1, 2 and so on")
    if config.get("problem_type") == "regression":
        raise ModelNotServable("the model's problem_type is regression: it has no labels to give")
    return {
        "labels": tuple(names[str(i)][:256] for i in range(len(names))),
        "multi_label": config.get("problem_type") == "multi_label_classification",
    }


def _sentence_facts(directory: Path) -> dict[str, Any]:
    """What sentence-transformers' files say about the way from hidden states to a vector."""
    modules = _modules(directory)
    if [kind for kind, _ in modules[:2]] != ["Transformer", "Pooling"]:
        raise ModelNotServable(f"modules.json must begin with Transformer and Pooling, not {[kind for kind, _ in modules[:2]]}")
    if modules[0][1]:
        raise ModelNotServable(f"modules.json: the Transformer must lie in the directory itself, not in {modules[0][1]!r}")
    dense, normalised = list[Dense](), False
    for kind, folder in modules[2:]:
        if kind == "Normalize":
            normalised = True
        elif kind == "Dense" and not normalised:
            dense.append(_dense(directory, folder))
        else:
            raise ModelNotServable(f"modules.json: {kind!r} is not supported here; Transformer, Pooling, Dense and Normalize are")
    return {
        "poolings": _poolings(directory, modules[1][1]),
        "dense": tuple(dense),
        "normalised": normalised,
        **_prompts(read_json(directory / "config_sentence_transformers.json")),
        **_cuts(read_json(directory / "config.json") | read_json(directory / "config_sentence_transformers.json")),
    }


def _modules(directory: Path) -> list[tuple[str, str]]:
    """Class and folder of each module."""
    path = directory / "modules.json"
    if not path.is_file():
        raise ModelNotServable(
            f"{directory.name} doesn't say how its hidden states become one vector: save it with sentence-transformers, which"
            " writes modules.json and 1_Pooling/config.json"
        )
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        modules = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise ModelNotServable(f"modules.json can't be read: {error!r:.200}") from None
    for _, folder in modules:
        if folder and not _FOLDER.fullmatch(folder):
            raise ModelNotServable(f"modules.json names {folder!r:.100}, which is no folder of this directory")
    return modules


def _poolings(directory: Path, folder: str) -> tuple[Pooling, ...]:
    config = read_json(directory / folder / "config.json")
    if not config:
        raise ModelNotServable(f"{folder}/config.json is missing: how hidden states become one vector is not known")
    if config.get("include_prompt") is False:
        raise ModelNotServable(f"{folder}/config.json: pooling without the prompt (include_prompt: false) is not supported")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _OLD_POOLINGS.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or not all(mode in _POOLINGS for mode in modes):
        raise ModelNotServable(f"{folder}/config.json: pooling {modes!r:.100} is not supported; known: {', '.join(_POOLINGS)}")
    return tuple(_POOLINGS[mode] for mode in modes)


def _dense(directory: Path, folder: str) -> Dense:
    config = read_json(directory / folder / "config.json")
    module, _, activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")
    if not module.startswith("torch.nn") or activation not in _ACTIVATIONS:
        raise ModelNotServable(f"{folder}/config.json: the activation {activation!r:.80} is not among {', '.join(_ACTIVATIONS)}")
    if config.get("use_residual") or config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise ModelNotServable(f"{folder}/config.json: only a plain linear layer behind the pooling is supported")
    find_weights(directory / folder)
    return Dense(folder, activation)


def _prompts(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("similarity_fn_name") not in (None, "cosine", "dot"):
        raise ModelNotServable(f"similarity by {config['similarity_fn_name']!r:.40} is not supported; cosine and dot are")
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise ModelNotServable("config_sentence_transformers.json: prompts must be texts by name")
    default = config.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ModelNotServable(f"config_sentence_transformers.json has no prompt of the name {default!r:.80}")
    return {"prompts": tuple(prompts.items()), "default_prompt": default}


def _cuts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Whether embeddings may be cut (Kusupati et al. 2022), by the keys that vLLM reads, too."""
    if config.get("truncate_dim") is not None:
        raise ModelNotServable("config_sentence_transformers.json: truncate_dim is not supported; name matryoshka_dimensions")
    cuts = config.get("matryoshka_dimensions") or []
    if not isinstance(cuts, list) or not all(isinstance(cut, int) and cut > 0 for cut in cuts):
        raise ModelNotServable("matryoshka_dimensions must be a list of positive integers")
    return {"matryoshka": tuple(sorted(cuts)), "any_length": config.get("is_matryoshka") is True and not cuts}
