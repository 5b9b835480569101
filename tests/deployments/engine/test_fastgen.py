"""What FastGen is asked for and what is kept from it, with something in its place that has its `put` and `flush`, and no GPU."""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import ModelNotServable
from cluster.settings import EngineSettings
from deployments.engine.checkpoint import inspect
from deployments.engine.engine import Engine
from deployments.engine.fastgen import POLICIES, FastGen, why_not
from deployments.engine.rendezvous import Rendezvous
from deployments.engine.shard import Shard
from deployments.engine.shard_spec import ShardSpec
from tests.deployments.engine.arithmetic import Recall, request
from tests.deployments.engine.families import build

SIZE, BLOCKS = 4, 14
LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
ASKED = {"dtype": "bfloat16", "tp": 1, "max_model_len": 8192}


class Ragged:
    """Remembers each sequence's text by its name, as FastGen does, and holds it to the blocks that it may have."""

    def __init__(self, recall: Recall) -> None:
        self.recall = recall
        self.texts: dict[int, list[int]] = {}
        self.most = 0

    def put(self, names: Items[int], tokens: Items[torch.Tensor]) -> torch.Tensor:
        for name, new in zip(names, tokens, strict=True):
            self.texts.setdefault(name, []).extend(new.tolist())
        self.most = max(self.most, sum(-(-len(text) // SIZE) for text in self.texts.values()))
        return torch.from_numpy(np.stack([self.recall._logits(np.array(self.texts[name])) for name in names]))

    def flush(self, name: int) -> None:
        del self.texts[name]


def answers(run: Any) -> tuple[list[list[int]], int]:
    """Of more requests than fit at once; also how often one was put back."""
    settings = EngineSettings(block_size=SIZE, max_sequences=5, max_batch_tokens=16, prefix_cache=False, speculation=0)
    engine = Engine.of(run, BLOCKS, settings)
    random = np.random.default_rng(0)
    found: list[list[int]] = []
    for number in range(12):
        engine.add(request(number, random.integers(0, 12, random.integers(1, 20)).tolist(), 12))
        found.append([])
    while engine.has_work:
        for output in engine.step():
            found[output.request_id].append(output.token)
    return found, engine.stats().preemptions


def test_names_follow_from_blocks_alone_and_no_more_are_held_than_there_are() -> None:
    recall = Recall(BLOCKS, SIZE)
    expected, preemptions = answers(recall)
    assert preemptions > 0, "one that begins anew was meant to be among them"
    ragged = Ragged(recall)
    found, again = answers(FastGen(ragged, SimpleNamespace(settings=SimpleNamespace(block_size=SIZE))).run)  # type: ignore[arg-type]
    assert (found, again) == (expected, preemptions)
    assert ragged.most <= BLOCKS


def test_it_runs_what_it_has_kernels_for() -> None:
    assert why_not(LLAMA, **ASKED) is None
    assert why_not(LLAMA | {"model_type": "mistral", "sliding_window": None}, **ASKED) is None
    assert why_not(LLAMA | {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False}, **ASKED) is None


@pytest.mark.parametrize(
    ("config", "asked", "why"),
    [
        ({"model_type": "qwen3"}, {}, "no kernels for models of type"),
        ({}, {"tp": 2}, "use tp=1"),
        ({}, {"dtype": "float32"}, "not in float32"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, {}, "llama3"),
        ({"rope_scaling": {"type": "linear"}}, {}, "linear"),
        ({"head_dim": 64}, {}, "32 heads of 64"),
        ({"hidden_size": 8192}, {}, "32 heads of 256"),
        ({"num_attention_heads": 33, "head_dim": 128, "hidden_size": 4224, "num_key_value_heads": 11}, {}, "3 query heads"),
        ({"model_type": "mistral", "sliding_window": 4096}, {}, "no sliding window"),
        ({"tie_word_embeddings": True}, {}, "tie the output"),
        ({"attention_bias": True}, {}, "biases"),
    ],
)
def test_what_it_can_not_is_known_before_anything_starts(config: dict[str, Any], asked: dict[str, Any], why: str) -> None:
    found = why_not(LLAMA | config, **ASKED | asked)
    assert why in str(found)


def test_policies_are_deepspeeds() -> None:
    from deepspeed.inference.v2 import model_implementations

    assert [name for name in POLICIES.values() if not hasattr(model_implementations, name)] == []


def test_without_a_gpu_it_is_refused_by_name(tmp_path: Path) -> None:
    directory = build("llama", tmp_path / "llama")
    info = inspect(directory, tp=1, dtype="bfloat16")
    settings = EngineSettings(runner="fastgen", device="cpu")
    with pytest.raises(ModelNotServable, match=r"engine\.runner=fastgen, but .*; engine\.runner=auto"):
        Shard(ShardSpec(directory, info, 8, 1, settings, Rendezvous("", 0, 1, 60)))
