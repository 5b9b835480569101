"""Two ranks that join as a replica's do: what they talk through, and what it carries."""

from __future__ import annotations

import multiprocessing
import pkgutil
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import ModelNotServable
from deployments.engine.rendezvous import Rendezvous
from deployments.engine.stages import Place
from deployments.engine.wire import interface_of

pytestmark = pytest.mark.timeout(240)
LENGTHS = (1, 4095, 4096, 300_000)


@dataclass(frozen=True)
class Report:
    """Of one rank: whether it shares memory, the batches that it had, and what DeepSpeed's all-reduce made of its rank + 1."""

    shares: bool
    batches: list[np.ndarray]
    reduced: float


def batches() -> list[np.ndarray]:
    return [np.arange(length, dtype=np.int32) for length in LENGTHS]


def _rank(rendezvous: Rendezvous, native: Path | None, report: Connection) -> None:
    import deepspeed.comm
    import torch

    from deployments.engine.group import Group

    group = Group(rendezvous, native=native)
    had: list[Any] = []
    if rendezvous.rank == 0:
        for batch in batches():
            group.send(batch)
            group.ping()
    else:
        had = [group.receive() for _ in LENGTHS]  # a ping is answered by the next `receive`
    ones = torch.full((3,), float(rendezvous.rank + 1))
    if rendezvous.rank == 0:
        group.stop()
    else:
        assert group.receive() is None
    deepspeed.comm.inference_all_reduce(ones)
    report.send(Report(group.meeting is not None, had, float(ones[2])))
    report.recv()


def shard(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """As a rank does whose DeepSpeed raises this."""
    import deepspeed
    import torch

    from deployments.engine.group import Group

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(deepspeed, "init_inference", fails)
    group: Group = object.__new__(Group)
    group.rank, group.size, group.place = 0, 2, Place(tp=2)
    group.shard(torch.nn.Linear(2, 2), torch.float32)


@pytest.mark.parametrize("error", [AssertionError("no policy"), ValueError("heads"), NotImplementedError("tied")])
def test_what_deepspeed_refuses_can_not_be_served(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(ModelNotServable, match=f"can't cut Linear into 2 parts: {error}"):
        shard(monkeypatch, error)


@pytest.mark.parametrize("name", ["torch.OutOfMemoryError", "torch.distributed.DistBackendError", "builtins.RuntimeError"])
def test_a_lost_rank_or_full_memory_is_no_refusal(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind = pkgutil.resolve_name(name)
    with pytest.raises(kind, match=r"^gone$"):
        shard(monkeypatch, kind("gone"))


def meet(*native: Path | None) -> list[Report]:
    """Of ranks with these directories of compiled parts."""
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in native]
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{folder}/{Path(folder).name}"
        ranks = [
            spawn.Process(target=_rank, args=(Rendezvous(address, rank, len(native), 100), own, pipes[rank][1]), daemon=True)
            for rank, own in enumerate(native)
        ]
        for process in ranks:
            process.start()
        try:
            assert all(ours.poll(100) for ours, _ in pipes), "a rank hangs"
            return [ours.recv() for ours, _ in pipes]
        finally:
            for process in ranks:
                process.kill()


def check(reports: list[Report], *, shares: bool) -> None:
    assert [report.shares for report in reports] == [shares] * len(reports)
    assert [report.reduced for report in reports] == [sum(range(1, len(reports) + 1))] * len(reports)
    for report in reports[1:]:
        for had, sent in zip(report.batches, batches(), strict=True):
            np.testing.assert_array_equal(had, sent)


def test_ranks_of_one_node_share_memory(cache: Path) -> None:
    check(meet(cache, cache), shares=True)


@pytest.mark.parametrize("without", [0, 1])
def test_one_rank_that_cannot_share_memory_leaves_all_to_gloo(cache: Path, without: int) -> None:
    check(meet(*(None if rank == without else cache for rank in range(2))), shares=False)


def test_gloo_listens_where_the_node_is_known() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None, "no interface of this machine"
    assert interface_of("") is None
    assert interface_of("fd00::1") is None
