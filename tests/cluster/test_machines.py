"""Machines as they are described, and as Ray tells of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cluster.errors import InvalidRequest
from cluster.machines import Machine, described, of_cluster, parse_bytes, this_machine


@pytest.mark.parametrize(
    ("text", "number"),
    [("80GiB", 80 << 30), ("80G", 80 << 30), ("80 gb", 80 << 30), ("1.5T", 3 << 39), ("512", 512), ("4096KiB", 4 << 20)],
)
def test_sizes_are_read_as_people_write_them(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GiB", "-1G", "80 apples", "1e3G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is no size"):
        parse_bytes(text)


def test_a_gpu_has_its_own_memory_and_cpus_share_the_nodes() -> None:
    (gpus,) = described(1, 8, 80)
    assert [gpus.room(ranks) for ranks in (1, 8, 9)] == [80, 80, 0]
    cpus = Machine("node", 4, 80, shared=True)
    assert [cpus.room(ranks) for ranks in (1, 4, 5)] == [80, 20, 0]


def test_a_cluster_is_its_living_nodes_with_cpus() -> None:
    rows = [
        {"state": "ALIVE", "node_ip": "10.0.0.1", "resources_total": {"CPU": 16.0, "memory": 64e9, "node:10.0.0.1": 1.0}},
        {"state": "ALIVE", "node_ip": "10.0.0.2", "resources_total": {"memory": 64e9}},
        {"state": "DEAD", "node_ip": "10.0.0.3", "resources_total": {"CPU": 16.0, "memory": 64e9}},
    ]
    dashboard = SimpleNamespace(rows=lambda kind: rows)
    assert of_cluster(dashboard) == [Machine("10.0.0.1", 16, 64_000_000_000, shared=True)]  # type: ignore[arg-type]


def test_this_machine_has_cores_and_memory() -> None:
    here = this_machine()
    assert here.ranks >= 1
    assert here.memory_bytes > 1 << 28
