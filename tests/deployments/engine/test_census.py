"""Counting from config.json: exact for models of every size, and the cache's bytes are those that the engine allocates.

That a rank's parameters are those that AutoTP gives it is tested with the load (`test_load.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.errors import ModelNotServable
from deployments.engine import skeleton
from deployments.engine.attention import KvCache
from deployments.engine.batch import Batch
from deployments.engine.census import Census, take
from deployments.engine.families import SHARDABLE
from deployments.engine.layouts import Load, activation_bytes, kv_bytes, weight_bytes
from deployments.engine.runner import Runner, load_model
from tests.deployments.engine.families import build

LLAMA_405B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "hidden_size": 16_384,
    "intermediate_size": 53_248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}
MIXTRAL_8X22B: dict[str, Any] = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32_000,
    "hidden_size": 6_144,
    "intermediate_size": 16_384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 65_536,
}
QWEN25_72B: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 152_064,
    "hidden_size": 8_192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32_768,
}


def config(directory: Path, entries: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(entries))
    return directory


@pytest.mark.parametrize(
    ("entries", "parameters", "experts"),
    [
        (LLAMA_405B, 405_853_388_800, 0),
        (MIXTRAL_8X22B, 140_620_634_112, 56 * 8 * 3 * 6_144 * 16_384),
        (QWEN25_72B, 72_706_203_648, 0),
        (QWEN25_72B | {"tie_word_embeddings": True}, 72_706_203_648 - 152_064 * 8_192, 0),
    ],
)
def test_published_models_have_their_published_number_of_parameters(
    tmp_path: Path, entries: dict[str, Any], parameters: int, experts: int
) -> None:
    found = take(config(tmp_path, entries))
    assert found.num_parameters == parameters
    assert found.expert_parameters == experts
    assert found.head_dim == 128
    assert take(tmp_path / "config.json") == found, "the file alone is enough"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox", "opt", "phi3"])
def test_counts_and_cache_are_those_of_the_running_model(tmp_path: Path, family: str) -> None:
    directory = build(family, tmp_path)
    found = take(directory)
    model = load_model(directory, "bfloat16")
    runner = Runner(model, KvCache(num_blocks=16, block_size=16))
    runner.check()
    load = Load("bfloat16", max_model_len=16 * 16, sequences=1, batch_tokens=64)
    assert weight_bytes(found, load, 1, 1) == sum(parameter.nbytes for parameter in model.parameters())
    assert kv_bytes(found, load, 1, 1) == runner.cache.num_bytes


@pytest.mark.slow
def test_every_family_is_counted_like_its_model(tmp_path: Path) -> None:
    from tests.deployments.engine.tiny import build as tiny

    wrong = {}
    for family in sorted(SHARDABLE):
        model = tiny(family)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(tmp_path / family)
        found = take(tmp_path / family)
        if found.num_parameters != sum(parameter.numel() for parameter in model.parameters()):
            wrong[family] = found.num_parameters
    assert wrong == {}


class Peak(TorchDispatchMode):
    """The most bytes that new tensors hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._alive and not self._shared(args, key):
                    self._alive.add(key)
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, key, size)
        return result

    def _shared(self, args: Any, key: int) -> bool:
        flat = [x for arg in args for x in (arg if isinstance(arg, (tuple, list)) else [arg])]
        return any(isinstance(x, torch.Tensor) and x.untyped_storage()._cdata == key for x in flat)

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


@pytest.mark.parametrize(("tokens", "past"), [(512, 0), (256, 256), (64, 448)])
def test_a_step_stays_below_what_is_planned_and_not_far(tmp_path: Path, tokens: int, past: int) -> None:
    """A prompt's chunk with and without tokens before it."""
    import numpy as np

    entries = LLAMA_405B | {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}
    directory = config(tmp_path, entries | {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512})
    found = take(directory)
    model = skeleton.build(directory, torch.float32).to_empty(device="cpu")
    runner = Runner(model, KvCache(num_blocks=64, block_size=16))
    table, one = np.arange(32, dtype=np.int32)[None], np.zeros(1, np.int32)

    def chunk(start: int, count: int) -> Batch:
        return Batch(np.ones(count, np.int32), one + start, one + count, one, table)

    runner.run(chunk(0, 16))  # the cache is made
    with Peak() as peak:
        runner.run(chunk(past, tokens))
    planned = activation_bytes(found, Load("float32", past + tokens, 1, tokens), 1)
    assert 0.5 * planned < peak.most <= planned


def test_what_can_not_be_served_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotServable, match="no causal language model"):
        take(config(tmp_path, LLAMA_405B | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(ModelNotServable, match="make the loader run other code"):
        take(config(tmp_path, LLAMA_405B | {"auto_map": {"AutoConfig": "a.B"}}))
    with pytest.raises(ModelNotServable, match=r"no config\.json"):
        take(tmp_path / "nothing")


def test_tensor_ranks_hold_everything_together(tmp_path: Path) -> None:
    """Cut parameters add up to the whole at any number of ranks, even and uneven ones."""
    found: Census = take(config(tmp_path, QWEN25_72B))
    for tp in (2, 3, 8):
        for parameter in found.parameters:
            if parameter.kind != "whole":
                assert sum(found.size_on(parameter, rank, tp) for rank in range(tp)) == parameter.size, parameter.name
