"""Planning: what fits is listed, what can't be is refused with a reason, and the best layout is the one a person would take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.machines import Machine, described
from deployments.engine.census import Census, take
from deployments.engine.layouts import HEADROOM, Load, Plan, kv_bytes, plan, weight_bytes
from tests.deployments.engine.test_census import LLAMA_405B, MIXTRAL_8X22B, QWEN25_72B

GIB = 1 << 30
LOAD = Load("bfloat16", 8192, 8, 1024)


@pytest.fixture(scope="module")
def census(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Census]:
    root = tmp_path_factory.mktemp("configs")
    found = {}
    for name, entries in {"llama": LLAMA_405B, "mixtral": MIXTRAL_8X22B, "qwen": QWEN25_72B}.items():
        path: Path = root / f"{name}.json"
        path.write_text(json.dumps(entries))
        found[name] = take(path)
    return found


def planned(found: Census, entries: dict[str, Any], machines: list[Machine], load: Load = LOAD, **only: int) -> Plan:
    return plan(found, entries, machines, load, **only)


def test_llama_405b_takes_two_nodes_of_eight(census: dict[str, Census]) -> None:
    made = planned(census["llama"], LLAMA_405B, described(4, 8, 80 * GIB))
    best = made.fits[0]
    assert (best.tp, best.pp, best.nodes, best.replicas) == (8, 2, 2, 2)
    assert not best.crosses_nodes
    assert best.weight_bytes == pytest.approx(405.85e9 * 2 / 16, rel=0.1)
    assert "these values work: 1, 2, 4, 8" in made.refused[16]
    assert "16" in made.reason


def test_experts_stay_whole_so_only_stages_help(census: dict[str, Census]) -> None:
    made = planned(census["mixtral"], MIXTRAL_8X22B, described(1, 8, 80 * GIB))
    assert (made.fits[0].tp, made.fits[0].pp) == (1, 4)
    assert weight_bytes(census["mixtral"], LOAD, 8, 1) > 0.9 * weight_bytes(census["mixtral"], LOAD, 1, 1)


def test_qwen_72b_fits_one_node_without_stages(census: dict[str, Census]) -> None:
    best = planned(census["qwen"], QWEN25_72B, described(2, 8, 80 * GIB)).fits[0]
    assert (best.tp, best.pp, best.nodes, best.replicas) == (4, 1, 1, 4)


def test_what_fits_nowhere_says_what_is_too_large(census: dict[str, Census]) -> None:
    made = planned(census["llama"], LLAMA_405B, described(1, 4, 80 * GIB))
    assert made.fits == ()
    assert "weights" in made.reason
    made = planned(census["qwen"], QWEN25_72B, described(1, 8, 80 * GIB), Load("bfloat16", 32_768, 512, 1024))
    assert "512 x 32768 tokens" in made.reason


def test_a_family_that_can_not_be_sharded_is_refused_for_every_number_of_ranks(census: dict[str, Census]) -> None:
    made = planned(census["qwen"], QWEN25_72B | {"model_type": "phi3"}, described(1, 4, 800 * GIB))
    assert {layout.tp for layout in made.fits} == {1}
    assert all("one matrix" in made.refused[tp] for tp in (2, 4))


def test_ranks_on_cpus_share_their_node(census: dict[str, Census]) -> None:
    machines = [Machine(f"cpu {number}", 64, 256 * GIB, shared=True) for number in range(2)]
    best = planned(census["qwen"], QWEN25_72B, machines).fits[0]
    assert (best.tp, best.nodes, best.replicas) == (1, 1, 2)
    made = planned(census["qwen"], QWEN25_72B, [Machine("small", 64, 100 * GIB, shared=True)] * 2)
    assert {layout.nodes for layout in made.fits} == {2}, "one node's memory is too small, however many ranks share it"


def test_only_what_was_asked_for(census: dict[str, Census]) -> None:
    made = planned(census["qwen"], QWEN25_72B, described(2, 8, 80 * GIB), tp=8, pp=2)
    assert [(layout.tp, layout.pp) for layout in made.fits] == [(8, 2)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.sampled_from([1, 2, 4, 6, 8]),
    st.sampled_from([24, 40, 80, 141]),
    st.sampled_from([1024, 8192]),
    st.integers(1, 64),
    st.booleans(),
)
def test_every_listed_layout_fits_the_machines(
    census: dict[str, Census], nodes: int, ranks: int, memory: int, length: int, sequences: int, shared: bool
) -> None:
    machines = [Machine(str(number), ranks, memory * GIB, shared=shared) for number in range(nodes)]
    load = Load("bfloat16", length, sequences, 1024)
    made = planned(census["qwen"], QWEN25_72B, machines, load)
    for layout in made.fits:
        assert layout.nodes <= nodes
        assert layout.ranks_per_node * layout.nodes == layout.ranks
        assert layout.ranks_per_node <= ranks
        assert layout.rank_bytes <= machines[0].room(layout.ranks_per_node) * HEADROOM
        assert layout.replicas >= 1
        assert layout.tp in (1, 2, 4, 8)
    assert len(set(made.fits)) == len(made.fits)
    assert made.reason


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 80))
def test_ranks_and_stages_never_hold_less_than_the_whole(census: dict[str, Census], tp: int, pp: int) -> None:
    found = census["qwen"]
    assert weight_bytes(found, LOAD, tp, pp) * tp * pp >= weight_bytes(found, LOAD, 1, 1)
    assert kv_bytes(found, LOAD, tp, pp) * tp * pp >= kv_bytes(found, LOAD, 1, 1)
