from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cluster.occupancy import observe
from cluster.placement import Demand, Holder, Node, View, explain, fits

HALF = {"CPU": 0.5}


def node(free: float, total: float = 2.0, name: str = "n") -> Node:
    return Node(name, {"CPU": total}, {"CPU": free})


def test_sentence_says_who_waits_for_what_and_who_holds_it() -> None:
    demand = Demand("shard group demo", (HALF, HALF))
    view = View((node(0.3),), (demand,), (Holder("training job X", {"CPU": 1.0}), Holder("idle", {"GPU": 1.0})))
    assert explain(view) == ["shard group demo needs 2 x 0.5 CPU, 0.3 CPU free of 2 CPU; training job X holds 1 CPU"]


def test_what_can_never_fit_is_told_apart_from_what_waits() -> None:
    assert "even when empty" in explain(View((node(2.0),), (Demand("big", ({"CPU": 4.0},)),), ()))[0]
    assert "even when empty" in explain(View((node(2.0),), (Demand("gpu", ({"GPU": 1.0},)),), ()))[0]
    assert "Ray is placing it" in explain(View((node(2.0),), (Demand("small", (HALF,)),), ()))[0]


def test_nothing_waiting_says_nothing() -> None:
    assert explain(View((node(0.0),), (), ())) == []


def test_bundles_may_spread_unless_they_must_share_a_node() -> None:
    nodes = [node(0.5), node(0.5)]
    assert fits(Demand("d", (HALF, HALF)), nodes)
    assert not fits(Demand("d", (HALF, HALF), same_node=True), nodes)
    assert not fits(Demand("d", ({"CPU": 1.0},)), nodes)


def test_a_bundle_that_asks_for_nothing_of_a_missing_resource_fits() -> None:
    assert fits(Demand("d", ({"CPU": 0.5, "GPU": 0.0},)), [node(1.0)])


amounts = st.floats(0, 4).map(lambda value: round(value, 2))


@given(st.lists(amounts, max_size=4), st.lists(amounts, max_size=4))
def test_a_yes_never_promises_more_than_there_is(free: list[float], asked: list[float]) -> None:
    nodes = [node(amount, 4.0) for amount in free]
    demand = Demand("d", tuple({"CPU": amount} for amount in asked))
    if fits(demand, nodes):
        assert sum(asked) <= sum(free) + 1e-4
        assert max(asked, default=0) <= max([*free, 0]) + 1e-4


@given(st.lists(amounts, min_size=1, max_size=5))
def test_bundles_with_a_node_of_just_their_size_each_fit(asked: list[float]) -> None:
    nodes = [node(amount, 4.0) for amount in sorted(asked, reverse=True)]
    assert fits(Demand("d", tuple({"CPU": amount} for amount in asked)), nodes)


class Rows:
    """A dashboard with fixed answers, of the shape that Ray 2.60 gives."""

    def __init__(self, **rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return self._rows.get(kind, [])


def actor(name: str, state: str, cpu: float, group: str | None = None) -> dict[str, Any]:
    required = {"CPU": cpu} if cpu else {}
    row = {"class_name": "A", "name": name, "state": state, "required_resources": required}
    return row | {"placement_group_id": group, "node_id": "n1" if state == "ALIVE" else None}


def group(name: str, state: str, *cpus: float) -> dict[str, Any]:
    bundles = [{"unit_resources": {"CPU": cpu}, "node_id": "n1" if state == "CREATED" else ""} for cpu in cpus]
    return {"name": name, "state": state, "bundles": bundles}


def test_rows_of_the_dashboard_become_nodes_holders_and_waiting() -> None:
    total = {"CPU": 2.0, "memory": 1e9, "node:127.0.0.1": 1.0, "CPU_group_0_ab": 0.5}
    rows = Rows(
        nodes=[{"node_id": "n1", "node_ip": "127.0.0.1", "state": "ALIVE", "resources_total": total}],
        actors=[
            actor("SERVE_REPLICA::gateway#Gateway#x", "ALIVE", 0.1),
            actor("inside", "ALIVE", 0.5, group="g"),
            actor("lone", "PENDING_CREATION", 1.5),
            actor("free of charge", "PENDING_CREATION", 0),
        ],
        placement_groups=[
            group("SERVE_REPLICA::model-chat#LLM#y", "CREATED", 0.5, 0.5),
            group("SERVE_REPLICA::model-big#LLM#z", "PENDING", 1.0, 1.0),
        ],
    )
    view = observe(rows)  # type: ignore[arg-type]
    assert [round(found.free["CPU"], 3) for found in view.nodes] == [0.9]
    assert set(view.nodes[0].total) == {"CPU"}
    assert {holder.name: holder.held for holder in view.holders} == {
        "replica of gateway": {"CPU": 0.1},
        "shard group chat": {"CPU": 1.0},
    }
    assert [demand.name for demand in view.waiting] == ["lone", "shard group big"]
    assert "shard group chat holds 1 CPU" in explain(view)[1]
