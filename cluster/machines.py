"""The machines that a model could be spread over: how many ranks each takes, and how much memory those have. Knows no models."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from cluster.dashboard import Dashboard
from cluster.errors import InvalidRequest

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True)
class Machine:
    """One node. GPUs have memory of their own; ranks on CPUs share the node's."""

    name: str
    ranks: int  # GPUs, or cores
    memory_bytes: int  # of one GPU, or of the node
    shared: bool

    def room(self, ranks: int) -> int:
        """Bytes for each of so many ranks on this node; 0 when it can't take them."""
        if ranks > self.ranks:
            return 0
        return self.memory_bytes // ranks if self.shared else self.memory_bytes


def described(nodes: int, gpus_per_node: int, memory_per_gpu: int) -> list[Machine]:
    """Equal nodes with GPUs, there or not."""
    return [Machine(f"node {number}", gpus_per_node, memory_per_gpu, shared=False) for number in range(1, nodes + 1)]


def this_machine() -> Machine:
    import psutil

    return Machine("this machine", os.cpu_count() or 1, psutil.virtual_memory().total, shared=True)


def of_cluster(dashboard: Dashboard) -> list[Machine]:
    """The CPUs and the memory that Ray counts on each living node. Raises Unavailable when the dashboard does not answer."""
    nodes = [node for node in dashboard.rows("nodes") if node["state"] == "ALIVE"]
    found = [(node["node_ip"], node["resources_total"]) for node in nodes]
    return [
        Machine(name, int(resources["CPU"]), int(resources["memory"]), shared=True)
        for name, resources in found
        if resources.get("CPU", 0) >= 1 and resources.get("memory")
    ]


def parse_bytes(text: str) -> int:
    """`80GiB`, `512M`, `1.5T` or plain bytes; units are powers of 1024. Raises InvalidRequest for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise InvalidRequest(f"{text!r:.40} is no size; write it like 80GiB", param="memory")
    return int(float(found[1]) * _UNITS[found[2].upper()])
