"""What waits for what: compares the resources that are asked for with those that are free, and says so in sentences.

Pure: `cluster.occupancy` reads a running cluster into these terms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Resources = Mapping[str, float]
_EPSILON = 1e-6  # Ray counts resources in ten-thousandths; sums of floats are off by less


@dataclass(frozen=True)
class Node:
    """A node with its resources in Ray's units (CPU, GPU, custom); memory is left out."""

    name: str
    total: Resources
    free: Resources


@dataclass(frozen=True)
class Demand:
    """Something that needs all its bundles at once; a bundle must fit on one node."""

    name: str
    bundles: tuple[Resources, ...]
    same_node: bool = False


@dataclass(frozen=True)
class Holder:
    """Something that holds resources now."""

    name: str
    held: Resources


@dataclass(frozen=True)
class View:
    """A cluster at one moment."""

    nodes: tuple[Node, ...]
    waiting: tuple[Demand, ...]
    holders: tuple[Holder, ...]


def explain(view: View) -> list[str]:
    """One sentence for each demand that waits; empty when nothing does."""
    return [_sentence(demand, view) for demand in view.waiting]


def fits(demand: Demand, nodes: Iterable[Node]) -> bool:
    """Whether the bundles find room, largest first on the first node that has it. May say no in rare cases where a cleverer
    packing exists; never says yes wrongly."""
    rooms = [dict(node.free) for node in nodes]
    if demand.same_node:
        return any(_covers(room, summed(demand.bundles)) for room in rooms)
    for bundle in sorted(demand.bundles, key=lambda bundle: -sum(bundle.values())):
        room = next((room for room in rooms if _covers(room, bundle)), None)
        if room is None:
            return False
        for name, amount in bundle.items():
            room[name] = room.get(name, 0.0) - amount
    return True


def _sentence(demand: Demand, view: View) -> str:
    needs = f"{demand.name} needs {_bundles(demand)}"
    total = summed(node.total for node in view.nodes)
    if not fits(demand, [Node(node.name, node.total, node.total) for node in view.nodes]):
        return f"{needs}; the whole cluster has {_amounts(_of(total, demand))} and can't hold it even when empty"
    if fits(demand, view.nodes):
        return f"{needs}; there is room, Ray is placing it"
    free = summed(node.free for node in view.nodes)
    asked = {name for bundle in demand.bundles for name in bundle}
    holding = [f"{holder.name} holds {_amounts(_of(holder.held, demand))}" for holder in view.holders if asked & named(holder.held)]
    return "; ".join([f"{needs}, {_amounts(_of(free, demand))} free of {_amounts(_of(total, demand))}", *holding])


def _bundles(demand: Demand) -> str:
    counted = Counter(_amounts(bundle) for bundle in demand.bundles)
    text = " + ".join(f"{count} x {amounts}" if count > 1 else amounts for amounts, count in counted.items())
    return f"{text} on one node" if demand.same_node and len(demand.bundles) > 1 else text


def _amounts(resources: Resources) -> str:
    return " and ".join(f"{amount:.4g} {name}" for name, amount in sorted(resources.items())) or "nothing"


def _of(resources: Resources, demand: Demand) -> dict[str, float]:
    return {name: resources.get(name, 0.0) for bundle in demand.bundles for name in bundle}


def named(resources: Resources) -> set[str]:
    """The resources of which there is any."""
    return {name for name, amount in resources.items() if amount > _EPSILON}


def _covers(room: Resources, bundle: Resources) -> bool:
    return all(room.get(name, 0.0) + _EPSILON >= amount for name, amount in bundle.items())


def summed(parts: Iterable[Resources]) -> dict[str, float]:
    """Amounts added up by name."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)  # a Counter adds floats as well
    return dict(total)
