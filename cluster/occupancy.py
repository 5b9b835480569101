"""Who holds and who waits for a cluster's resources, read from Ray's dashboard into the terms of `cluster.placement`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.dashboard import Dashboard
from cluster.placement import Demand, Holder, Node, View, named, summed


def observe(dashboard: Dashboard) -> View:
    """The cluster as it is. Raises Unavailable when the dashboard does not answer."""
    actors, groups = dashboard.rows("actors"), dashboard.rows("placement_groups")
    placed = [_actor_use(actor) for actor in actors if actor["state"] == "ALIVE" and not actor["placement_group_id"]]
    placed += [use for group in groups if group["state"] == "CREATED" for use in _group_use(group)]
    nodes = [node for node in dashboard.rows("nodes") if node["state"] == "ALIVE"]
    lone = [actor for actor in actors if actor["state"].startswith("PENDING") and not actor["placement_group_id"]]
    waiting = [Demand(_actor_name(actor), (_counted(actor["required_resources"]),)) for actor in lone]
    waiting += [_group_demand(group) for group in groups if group["state"] in ("PENDING", "RESCHEDULING")]
    return View(tuple(_node(node, placed) for node in nodes), tuple(filter(_asks, waiting)), tuple(_holders(placed)))


_Use = tuple[str, str, dict[str, float]]  # node id, holder's name, resources


def _node(row: Mapping[str, Any], placed: Sequence[_Use]) -> Node:
    total = _counted(row["resources_total"])
    used = summed(held for node_id, _, held in placed if node_id == row["node_id"])
    return Node(row["node_ip"], total, {name: max(0.0, amount - used.get(name, 0.0)) for name, amount in total.items()})


def _holders(placed: Sequence[_Use]) -> Iterable[Holder]:
    names = dict.fromkeys(name for _, name, held in placed if held)
    return (Holder(name, summed(held for _, other, held in placed if other == name)) for name in names)


def _actor_use(actor: Mapping[str, Any]) -> _Use:
    return actor["node_id"], _actor_name(actor), _counted(actor["required_resources"])


def _group_use(group: Mapping[str, Any]) -> list[_Use]:
    return [(bundle["node_id"], _group_name(group), _counted(bundle["unit_resources"])) for bundle in group["bundles"]]


def _group_demand(group: Mapping[str, Any]) -> Demand:
    return Demand(_group_name(group), tuple(_counted(bundle["unit_resources"]) for bundle in group["bundles"]))


def _asks(demand: Demand) -> bool:
    return any(named(bundle) for bundle in demand.bundles)


def _actor_name(actor: Mapping[str, Any]) -> str:
    served = _served(actor["name"])
    return f"replica of {served}" if served else actor["name"] or actor["class_name"]


def _group_name(group: Mapping[str, Any]) -> str:
    served = _served(group["name"])
    return f"shard group {served}" if served else f"group {group['name'] or 'without a name'}"


def _served(name: str | None) -> str | None:
    """The model in Serve's name of a replica, `SERVE_REPLICA::model-NAME#LLM#id`; None for other names."""
    parts = (name or "").split("#")
    return parts[0].removeprefix("SERVE_REPLICA::").removeprefix("model-") if len(parts) == 3 else None


def _counted(resources: Mapping[str, float]) -> dict[str, float]:
    """Only what is scarce by count: node markers, memory and the copies that Ray makes for placement groups are left out."""
    skipped = ("node:", "memory", "object_store_memory", "bundle_group")
    return {name: amount for name, amount in resources.items() if not name.startswith(skipped) and "_group_" not in name}
