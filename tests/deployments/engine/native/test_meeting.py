"""Ranks that talk through shared memory: right to the last bit, in step, and never waiting for one that is gone."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.errors import ReplicaLost
from deployments.engine.native import build
from deployments.engine.native.meeting import Meeting
from tests.deployments.engine.native.meeting_ranks import Ranks

pytestmark = pytest.mark.timeout(240)
CHUNK = 1 << 16
"""Float32 numbers that fit into a slot."""
UNHURRIED = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=[2, 3, 4], ids="{} ranks".format)
def ranks(request: pytest.FixtureRequest, cache: Path) -> Iterator[Ranks]:
    with Ranks(cache, request.param) as group:
        yield group


@pytest.fixture(scope="module")
def three(cache: Path) -> Iterator[Ranks]:
    with Ranks(cache, 3) as group:
        yield group


def part(rank: int, count: int) -> np.ndarray:
    """What a rank brings: numbers whose sum depends on the order in which they are added."""
    rng = np.random.default_rng([rank, count])
    return (rng.standard_normal(count) * 10.0 ** rng.integers(-6, 7, count)).astype(np.float32)


def summed(meeting: Meeting, count: int, dtype: torch.dtype) -> np.ndarray:
    tensor = torch.from_numpy(part(meeting.rank, count)).to(dtype)
    meeting.all_reduce(tensor)
    return tensor.float().numpy()


def expected_sum(size: int, count: int, dtype: torch.dtype) -> np.ndarray:
    """In the order of ranks, in float32, rounded once."""
    parts = [torch.from_numpy(part(rank, count)).to(dtype).float().numpy() for rank in range(size)]
    total = parts[0]
    for more in parts[1:]:
        with np.errstate(invalid="ignore"):  # infinities of float16
            total = total + more
    return torch.from_numpy(total).to(dtype).float().numpy()


@UNHURRIED
@given(count=st.integers(1, 3 * CHUNK), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@example(count=1, dtype=torch.float32)
@example(count=CHUNK - 1, dtype=torch.float32)
@example(count=CHUNK, dtype=torch.float32)
@example(count=CHUNK + 1, dtype=torch.float32)
@example(count=2 * CHUNK + 1, dtype=torch.bfloat16)
def test_sum_is_the_same_on_every_rank_to_the_last_bit(ranks: Ranks, count: int, dtype: torch.dtype) -> None:
    expected = expected_sum(len(ranks.pipes), count, dtype)
    for result in ranks.run(summed, count, dtype):
        np.testing.assert_array_equal(result, expected)


def sum_of_strided(meeting: Meeting) -> list[float]:
    tensor = torch.arange(6.0).reshape(2, 3)
    meeting.all_reduce(tensor.t())
    return tensor.flatten().tolist()


def test_tensor_with_gaps_is_summed_in_place(ranks: Ranks) -> None:
    size = len(ranks.pipes)
    assert ranks.run(sum_of_strided) == [[float(size * number) for number in range(6)]] * size


def sum_of_odd_numbers(meeting: Meeting) -> Tensor:
    inf, nan = float("inf"), float("nan")
    tensor = torch.tensor([inf, -inf if meeting.rank else inf, nan, 3.4e38, -0.0, 1e-40]).bfloat16()
    meeting.all_reduce(tensor)
    return tensor


def test_infinities_and_what_is_no_number_survive_bfloat16(ranks: Ranks) -> None:
    for result in ranks.run(sum_of_odd_numbers):
        assert result[0] == result[3] == float("inf")
        assert result[1:3].isnan().all()
        assert result[4] == 0
        assert result[4].signbit()


def received(meeting: Meeting, count: int) -> bool:
    """Whether rank 0's numbers came; every rank knows them."""
    batch = torch.from_numpy(np.random.default_rng(count).integers(-(2**31), 2**31, count, np.int32))
    tensor = batch.clone() if meeting.rank == 0 else torch.zeros(count, dtype=torch.int32)
    meeting.broadcast(tensor)
    return torch.equal(tensor, batch)


@UNHURRIED
@given(count=st.integers(1, 5 * CHUNK))
@example(count=4096)
@example(count=CHUNK)
@example(count=1 << 22)
def test_batch_of_any_length_reaches_every_rank(ranks: Ranks, count: int) -> None:
    assert ranks.run(received, count) == [True] * len(ranks.pipes)


def gathered(meeting: Meeting, rows: int, columns: int) -> Tensor | None:
    return meeting.gather(torch.from_numpy(part(meeting.rank, rows * columns)).reshape(rows, columns))


@UNHURRIED
@given(rows=st.integers(1, 40), columns=st.integers(1, 5000))
@example(rows=1, columns=2 * CHUNK + 3)
@example(rows=64, columns=4096)
def test_parts_come_side_by_side_to_the_leader(ranks: Ranks, rows: int, columns: int) -> None:
    whole, *others = ranks.run(gathered, rows, columns)
    parts = [part(rank, rows * columns).reshape(rows, columns) for rank in range(len(ranks.pipes))]
    np.testing.assert_array_equal(whole.numpy(), np.concatenate(parts, axis=1))
    assert others == [None] * len(others)


def mixed_rounds(meeting: Meeting, rounds: int, seed: int, most: int) -> int:
    """Collectives in an order that all ranks know, each with contents of its own; how many of them brought something else."""
    rng, wrong = np.random.default_rng(seed), 0
    for turn in range(rounds):
        kind, count = rng.integers(4), int(rng.integers(1, most))
        own = torch.full((count,), float(turn % 1000 + meeting.rank))
        total = meeting.size * (turn % 1000) + sum(range(meeting.size))
        if kind == 0:
            meeting.broadcast(own)
            wrong += not bool((own == turn % 1000).all())
        elif kind == 1:
            whole = meeting.gather(own[None])
            every = torch.arange(meeting.size).repeat_interleave(count) + turn % 1000
            wrong += whole is not None and not torch.equal(whole[0], every.float())
        else:
            meeting.all_reduce(own)
            wrong += not bool((own == total).all())
    return wrong


def test_thousands_of_rounds_are_never_mixed_up(ranks: Ranks) -> None:
    assert ranks.run(mixed_rounds, 3000, 1, 300) == [0] * len(ranks.pipes)
    assert ranks.run(mixed_rounds, 30, 2, 3 * CHUNK) == [0] * len(ranks.pipes)


def test_number_of_the_round_may_wrap(cache: Path) -> None:
    with Ranks(cache, 3, first_round=-200) as ranks:
        assert ranks.run(mixed_rounds, 1000, 3, 100) == [0] * 3


def crowded_rounds(meeting: Meeting, cores: set[int]) -> int:
    os.sched_setaffinity(0, cores)
    return mixed_rounds(meeting, 400, 4, 20_000)


@pytest.mark.parametrize("num_cores", [1, 2])
def test_four_ranks_make_way_for_each_other_on_few_cores(cache: Path, num_cores: int) -> None:
    cores = set(sorted(os.sched_getaffinity(0))[:num_cores])
    with Ranks(cache, 4) as ranks:
        assert ranks.run(crowded_rounds, cores) == [0] * 4


def cpu_of_idle_wait(meeting: Meeting, idle_s: float) -> float:
    """Seconds of processor that a rank took while the leader had nothing for it."""
    numbers = torch.zeros(8)
    meeting.all_reduce(numbers)
    before = time.process_time()
    if meeting.rank == 0:
        time.sleep(idle_s)
    meeting.broadcast(numbers)
    return time.process_time() - before


def test_rank_that_waits_sleeps(three: Ranks) -> None:
    assert max(three.run(cpu_of_idle_wait, 2.0)) < 0.2


def maps(_: Meeting) -> str:
    return Path("/proc/self/maps").read_text()


def test_segment_has_no_name_and_is_for_its_owner_alone(three: Ranks) -> None:
    for mapped in three.run(maps):
        assert "/memfd:mmaas-meeting (deleted)" in mapped
        assert "/dev/shm/" not in mapped
    found = Path(f"/proc/{three.place.pid}/fd/{three.place.fd}").stat()
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_uid == os.getuid()


def sum_of_ones(meeting: Meeting) -> float:
    tensor = torch.ones(100)
    meeting.all_reduce(tensor)
    return float(tensor[-1])


def wait_for_batch(meeting: Meeting) -> None:
    meeting.broadcast(torch.zeros(4096, dtype=torch.int32))


@pytest.mark.parametrize("waits", [sum_of_ones, wait_for_batch])
def test_killed_rank_is_noticed_by_those_who_sleep(cache: Path, waits: object) -> None:
    victim = 1 if waits is sum_of_ones else 0
    others = [rank for rank in range(3) if rank != victim]
    with Ranks(cache, 3, timeout_s=80) as ranks:
        ranks.begin(waits, ranks=others)  # type: ignore[arg-type]
        time.sleep(0.5)
        ranks.signal(victim, signal.SIGKILL)
        for error in ranks.results(others, timeout_s=40):
            assert isinstance(error, ReplicaLost)
            assert f"rank {victim} of the shard group has ended" in str(error)


def test_rank_that_left_is_lost_to_those_who_wait_but_what_it_sent_arrives(cache: Path) -> None:
    with Ranks(cache, 2) as ranks:
        ranks.begin(send_and_leave, ranks=[0])
        assert ranks.results([0]) == [None]
        ranks.begin(received, 1000, ranks=[1])
        assert ranks.results([1]) == [True]
        ranks.begin(sum_of_ones, ranks=[1])
        assert "has ended" in str(ranks.results([1])[0])


def send_and_leave(meeting: Meeting) -> None:
    received(meeting, 1000)
    meeting.leave()


def test_stopped_rank_is_late_and_finds_the_meeting_over_when_it_goes_on(cache: Path) -> None:
    with Ranks(cache, 3, timeout_s=1.5) as ranks:
        ranks.signal(2, signal.SIGSTOP)
        ranks.begin(sum_of_ones)
        for error in ranks.results([0, 1]):
            assert isinstance(error, ReplicaLost)
            assert str(error) == "rank 2 of the shard group didn't come within 1.5 s"
        ranks.signal(2, signal.SIGCONT)
        assert isinstance(ranks.results([2])[0], ReplicaLost)
        assert all(isinstance(error, ReplicaLost) for error in ranks.run(wait_for_batch)), "a meeting that is over stays over"


def test_rank_that_comes_within_the_timeout_is_not_lost(cache: Path) -> None:
    with Ranks(cache, 2, timeout_s=20) as ranks:
        ranks.signal(1, signal.SIGSTOP)
        ranks.begin(sum_of_ones)
        time.sleep(1.5)
        ranks.signal(1, signal.SIGCONT)
        assert ranks.results() == [2.0, 2.0]


def test_seat_is_taken_once_and_only_in_this_segment(three: Ranks, cache: Path) -> None:
    library, place = build.library(cache), three.place
    for reason, found, size in [
        ("Resource temporarily unavailable", place, 3),
        ("Invalid argument", place, 2),
        ("is not the segment", replace(place, inode=place.inode + 1), 3),
    ]:
        with pytest.raises(OSError, match=reason):
            Meeting(library, found, 1, size, timeout_s=1)
    assert three.run(sum_of_ones) == [3.0] * 3
