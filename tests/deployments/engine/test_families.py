"""The tables of families, tried again: attention through our own function, and AutoTP over two processes against one."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from deployments.engine.families import NOT_SERVABLE, NOT_SHARDABLE, NOT_SHARDABLE_WITH, SHARDABLE
from tests.deployments.engine.tiny import build
from tests.free_ports import free_port

pytestmark = pytest.mark.slow
HANGS = {"phimoe", "granitemoeshared"}  # the ranks wait for each other until a timeout ends both: not tried again
LENGTH = 40


@cache
def tokens() -> Any:
    import torch

    return torch.randint(3, 128, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model(input_ids=tokens(), position_ids=torch.arange(LENGTH)[None], use_cache=False).logits


def watched_attention(calls: list[Any]) -> str:
    """Registers plain causal attention under a name, with all that transformers passes in words; `calls` collects its layers."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, **_):
        calls.append(getattr(module, "layer_idx", None))
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = torch.tanh(scores / softcap) * softcap if softcap else scores
        at = torch.arange(scores.shape[-1])
        distance = at[:, None] - at
        seen = (distance >= 0) & (distance < (sliding_window or LENGTH))
        return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("watched", attend)
    AttentionMaskInterface.register("watched", lambda *_, **__: None)
    return "watched"


def replaces_attention(family: str) -> bool:
    """Whether our attention, told everything in words and nothing by a mask, gives the model's own logits, once in every layer."""
    calls: list[Any] = []
    own = logits(build(family, "eager"))
    try:
        ours = logits(build(family, watched_attention(calls)))
    except KeyError as error:
        if error.args != ("watched",):
            raise
        return False  # it has a table of its own, of classes of attention
    except AttributeError as error:
        if "'NoneType'" not in str(error):
            raise
        return False  # it looks into the mask
    layers = list(range(len(calls)))
    return len(calls) == 4 and calls == layers and (ours - own).abs().max().item() < 1e-4


def shard(rank: int, families: list[str], port: int, results: str) -> None:
    """One of two processes: the largest difference of sharded from whole logits by family, or what failed."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    import deepspeed
    import torch
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # plain gloo, which needs no compiler
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60))
    outcome: dict[str, Any] = {}
    watched_attention([])
    for named in families:
        family, _, switch = named.partition(" with ")
        options = {switch: True} if switch else {}
        whole = logits(build(family, "watched", **options))
        try:
            sharded = deepspeed.init_inference(
                build(family, "watched", **options),
                tensor_parallel={"tp_size": 2},
                dtype=torch.float32,
                replace_with_kernel_inject=False,
            )
            outcome[named] = (logits(sharded.module) - whole).abs().max().item()
        except Exception as error:
            outcome[named] = repr(error)
    if rank == 0:
        Path(results).write_text(json.dumps(outcome))


def shard_all(families: list[str], port: int, tmp_path: Path) -> dict[str, Any]:
    import torch.multiprocessing

    results = tmp_path / "results.json"
    torch.multiprocessing.start_processes(shard, args=(families, port, str(results)), nprocs=2, start_method="spawn")
    return json.loads(results.read_text())


def test_a_family_stands_in_one_table():
    assert not SHARDABLE & NOT_SHARDABLE.keys()
    assert not (SHARDABLE | NOT_SHARDABLE.keys()) & NOT_SERVABLE.keys()


@pytest.mark.parametrize("family", sorted(SHARDABLE | NOT_SHARDABLE.keys() - HANGS))
def test_attention_of_served_families_can_be_replaced(family):
    assert replaces_attention(family)


@pytest.mark.parametrize(
    "family", ["bloom", "codegen", "diffllama", "doge", "falcon", "gpt_neo", "gpt_oss", "gptj", "llama4_text", "mpt", "xglm"]
)
def test_attention_of_other_families_can_not_be_replaced(family):
    assert not replaces_attention(family)


def test_sharded_logits_equal_whole_ones(tmp_path):
    outcome = shard_all(sorted(SHARDABLE), free_port(), tmp_path)
    assert {family: error for family, error in outcome.items() if isinstance(error, str) or error > 1e-4} == {}


def test_other_families_fail_when_sharded(tmp_path):
    sharded_well = {"gpt_bigcode"}  # right, but only its dense layers are split: its one key/value head is not divisible
    switched = [f"{family} with {switch}" for family, switch in NOT_SHARDABLE_WITH.items()]
    outcome = shard_all([*sorted(NOT_SHARDABLE.keys() - HANGS - sharded_well), *switched], free_port(), tmp_path)
    assert {family for family, error in outcome.items() if not isinstance(error, str) and error < 1e-4} == set()
