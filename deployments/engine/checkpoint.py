"""Admission of a model directory: what it holds, or why it can't be served, before any actor starts. Light: reads JSON and headers.

Only safetensors are accepted, and no file may make a loader run code. Whether the numbers in the weights make sense is not known
here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ModelNotServable
from cluster.types import Deployment, Quantization
from deployments.engine.device import multiplies
from deployments.engine.families import NOT_SERVABLE, NOT_SHARDABLE, NOT_SHARDABLE_WITH, SHARDABLE, STAGEABLE
from deployments.engine.model_config import check_runs_no_code, context_length, positive, read_json
from deployments.engine.weights import Weights, find_weights

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_INTERMEDIATE = ("intermediate_size", "ffn_dim", "n_inner", "shared_expert_intermediate_size")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The shape of a model that can be served."""

    model_type: str
    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int  # tokens of prompt and answer together
    num_parameters: int
    weight_bytes: int  # of all parameters at `dtype`, over all ranks
    dtype: str
    quantization: Quantization | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token at `dtype`, over all layers and ranks."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]


def admit(deployment: Deployment, directory: str | Path, device: str) -> ModelInfo:
    """What a deployment's files hold, asked before anything starts and again by every replica. `device`: `engine.device`. Raises
    ModelNotServable for what can't be served as the deployment says."""
    multiplies(deployment.quantization, device)
    return inspect(
        directory,
        tp=deployment.tp,
        pp=deployment.pp,
        dtype=deployment.dtype,
        max_model_len=deployment.max_model_len,
        quantization=deployment.quantization,
    )


def inspect(
    directory: str | Path,
    *,
    tp: int,
    dtype: str,
    pp: int = 1,
    max_model_len: int | None = None,
    quantization: Quantization | None = None,
) -> ModelInfo:
    """Raises ModelNotServable, with what to change, for a directory that can't be served over `tp` x `pp` ranks at `dtype`."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ModelNotServable(f"{directory} is not a directory")
    if dtype not in DTYPE_BYTES:
        raise ModelNotServable(f"dtype must be one of {', '.join(DTYPE_BYTES)}, not {dtype!r:.40}", param="dtype")
    _check_quantization(quantization)
    config = read_json(directory / "config.json")
    if not config:
        raise ModelNotServable(f"{directory.name} has no config.json; a Hugging Face model directory is needed")
    check_runs_no_code(config)
    model_type, architecture = _check_family(config, tp)
    _check_split(config, tp)
    check_stages(config, pp)
    if not (directory / "tokenizer.json").is_file():
        raise ModelNotServable(
            f"{directory.name} has no tokenizer.json; save the model's tokenizer there with save_pretrained(...)"
        )
    weights = find_weights(directory)
    num_heads = _num_heads(config)
    return ModelInfo(
        model_type=model_type,
        architecture=architecture,
        num_layers=_num_layers(config),
        hidden_size=_hidden_size(config),
        num_heads=num_heads,
        num_kv_heads=kv_heads(config),
        head_dim=_head_dim(config, weights),
        vocab_size=positive(config, "vocab_size"),
        max_model_len=_length(config, max_model_len),
        num_parameters=weights.num_parameters,
        weight_bytes=weights.num_parameters * DTYPE_BYTES[dtype],
        dtype=dtype,
        quantization=quantization,
    )


def _check_quantization(quantization: str | None) -> None:
    """Whether the model's layers can be quantised is known when it is loaded."""
    if quantization not in (None, "int8", "fp8"):
        raise ModelNotServable(f"quantization must be int8 or fp8, not {quantization!r:.40}", param="quantization")


def check_shape(config: Mapping[str, Any], tp: int) -> str:
    """The model's type. Raises ModelNotServable, with what to change, when what config.json alone says rules serving out."""
    check_runs_no_code(config)
    model_type, _ = _check_family(config, tp)
    _check_split(config, tp)
    return model_type


def _check_family(config: Mapping[str, Any], tp: int) -> tuple[str, str]:
    """Model type and architecture. Raises for what isn't a causal language model, or one that can't be served or sharded."""
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str) or not model_type:
        raise ModelNotServable("config.json lacks model_type")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(architecture, str) or not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise ModelNotServable(f"{architecture!r:.80} is no causal language model: config.json must name a ...ForCausalLM")
    if config.get("is_encoder_decoder"):
        raise ModelNotServable(f"{model_type!r:.80} is an encoder and a decoder; only decoders are served")
    if config.get("quantization_config"):
        raise ModelNotServable("the checkpoint is quantised; use the model's 16 or 32 bit weights")
    if reason := NOT_SERVABLE.get(model_type):
        raise ModelNotServable(f"models of type {model_type!r} can't be served: {reason}")
    if tp > 1:
        _check_shardable(model_type, config)
    return model_type, architecture


def _check_shardable(model_type: str, config: Mapping[str, Any]) -> None:
    if reason := NOT_SHARDABLE.get(model_type):
        raise ModelNotServable(f"models of type {model_type!r} can't be sharded: {reason}; use tp=1", param="tp")
    if (switch := NOT_SHARDABLE_WITH.get(model_type)) and config.get(switch):
        raise ModelNotServable(f"models of type {model_type!r} with {switch} can't be sharded; use tp=1", param="tp")
    if model_type not in SHARDABLE:
        known = ", ".join(sorted(SHARDABLE))
        raise ModelNotServable(
            f"sharding of {model_type!r:.80} is untested, so it is refused; use tp=1 (tested: {known})", param="tp"
        )


def _check_split(config: Mapping[str, Any], tp: int) -> None:
    """Every rank gets whole heads and an equal share of every layer."""
    if tp < 1:
        raise ModelNotServable(f"tp must be at least 1, not {tp}", param="tp")
    sizes = {
        "attention heads": _num_heads(config),
        "key/value heads": kv_heads(config),
        "hidden size": _hidden_size(config),
        **{name: positive(config, name) for name in _INTERMEDIATE if config.get(name) is not None},
    }
    if uneven := [f"{size} ({name})" for name, size in sizes.items() if size % tp]:
        common = math.gcd(*sizes.values())
        works = ", ".join(str(n) for n in range(1, min(common, 1024) + 1) if common % n == 0)
        raise ModelNotServable(f"tp={tp} doesn't divide {' nor '.join(uneven)}; these values work: {works}", param="tp")


def check_stages(config: Mapping[str, Any], pp: int) -> None:
    """Raises ModelNotServable when the model's layers can't be cut into so many stages."""
    if pp == 1:
        return
    num_layers = _num_layers(config)
    if not 1 <= pp <= num_layers:
        raise ModelNotServable(f"pp={pp}: the model's {num_layers} layers make 1 to {num_layers} stages", param="pp")
    if (model_type := config.get("model_type")) not in STAGEABLE:
        known = ", ".join(sorted(STAGEABLE))
        raise ModelNotServable(
            f"stages of {model_type!r:.80} are untested, so they are refused; use pp=1 (tested: {known})", param="pp"
        )


def _num_layers(config: Mapping[str, Any]) -> int:
    return positive(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers")


def _num_heads(config: Mapping[str, Any]) -> int:
    return positive(config, "num_attention_heads", "n_head", "n_heads", "num_heads")


def kv_heads(config: Mapping[str, Any]) -> int:
    """Heads of keys and values: fewer than of queries in grouped attention, one if `multi_query`."""
    num_heads = _num_heads(config)
    num_kv_heads = positive(config, "num_key_value_heads", "num_kv_heads", default=1 if config.get("multi_query") else num_heads)
    if num_heads % num_kv_heads:
        raise ModelNotServable(f"config.json: {num_heads} attention heads can't share {num_kv_heads} key/value heads evenly")
    return num_kv_heads


def _hidden_size(config: Mapping[str, Any]) -> int:
    return positive(config, "hidden_size", "n_embd", "d_model")


def _head_dim(config: Mapping[str, Any], weights: Weights) -> int:
    """Width of one head: as configured, else as the weights show (families differ in their default), else the usual one."""
    if config.get("head_dim") is not None:
        return positive(config, "head_dim")
    num_kv_heads = kv_heads(config)
    for name, entry in weights.tensors.items():
        if name.endswith("layers.0.self_attn.k_proj.weight") and entry.shape and entry.shape[0] % num_kv_heads == 0:
            return max(1, entry.shape[0] // num_kv_heads)
    hidden_size, num_heads = _hidden_size(config), _num_heads(config)
    if hidden_size % num_heads:
        raise ModelNotServable(f"config.json: hidden size {hidden_size} is no multiple of {num_heads} attention heads")
    return hidden_size // num_heads


def _length(config: Mapping[str, Any], wanted: int | None) -> int:
    own = context_length(config)
    if wanted is None:
        return own
    if not 0 < wanted <= own:
        raise ModelNotServable(f"max_model_len={wanted} is not within 1 and the model's own {own}", param="max_model_len")
    return wanted
