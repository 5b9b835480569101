"""Two ranks that join as a replica's do: what they talk through, and what it carries."""

from __future__ import annotations

import multiprocessing
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.engine.rendezvous import Rendezvous
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
