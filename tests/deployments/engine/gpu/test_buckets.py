"""Which sizes get graphs, which graph a batch takes, how much memory is left for the cache, and where shards compute."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ModelNotServable
from cluster.settings import EngineSettings
from deployments.engine.device import bundle, choose, reserved
from deployments.engine.gpu.buckets import MOST, bucket, sizes
from deployments.engine.gpu.inputs import splits
from deployments.engine.gpu.memory import blocks_that_fit


@given(most=st.integers(1, 4096))
def test_sizes_grow_up_to_the_largest_batch(most: int) -> None:
    found = sizes(most)
    assert found == sorted(set(found))
    assert found[-1] == min(most, MOST)
    assert found[0] == 1


@given(most=st.integers(1, 1000), count=st.integers(1, 1000))
def test_a_batch_takes_the_smallest_bucket_that_holds_it(most: int, count: int) -> None:
    found = bucket(count, sizes(most))
    if count > min(most, MOST):
        assert found is None
    else:
        assert found is not None
        assert found >= count
        assert found < 2 * count or found - count < 16
        assert not any(count <= size < found for size in sizes(most))


@given(programs=st.integers(1, 10_000), processors=st.integers(1, 200))
def test_pages_are_dealt_out_only_where_processors_would_idle(programs: int, processors: int) -> None:
    found = splits(programs, processors)
    assert found in (1, 2, 4, 8, 16, 32)
    assert found == 1 or found * programs <= 2 * processors
    assert found == 32 or 2 * found * programs > 2 * processors


def test_the_cache_gets_what_weights_and_steps_leave() -> None:
    gib = 1 << 30
    room = {"free": 60 * gib, "total": 80 * gib, "share": 0.9, "step": 2 * gib, "block": 2 << 20}
    assert blocks_that_fit(**room, graphs=False) == (60 - 8 - 2) * 512
    assert blocks_that_fit(**room, graphs=True) == (60 - 8 - 4) * 512
    assert blocks_that_fit(**room | {"free": 9 * gib}, graphs=True) <= 0


@pytest.mark.parametrize(
    ("wanted", "gpu", "visible", "device"),
    [("auto", None, 8, "cpu"), ("auto", 0, 0, "cpu"), ("auto", 1, 2, "cuda:1"), ("cpu", 0, 1, "cpu"), ("cuda", 0, 1, "cuda:0")],
)
def test_a_rank_computes_where_it_was_given_a_place(wanted: str, gpu: int | None, visible: int, device: str) -> None:
    assert choose(wanted, gpu, lambda: visible) == device


@pytest.mark.parametrize(("gpu", "visible", "why"), [(None, 4, "no GPU was reserved"), (1, 1, "sees 1 of the 2")])
def test_a_gpu_that_is_demanded_and_not_there_is_refused(gpu: int | None, visible: int, why: str) -> None:
    with pytest.raises(ModelNotServable, match=why):
        choose("cuda", gpu, lambda: visible)


def test_shards_reserve_gpus_where_there_are_enough_for_all() -> None:
    settings = EngineSettings()
    assert bundle(reserved(settings, 2, 1)) == {"CPU": 0.5}
    assert bundle(reserved(settings, 2, 2)) == {"CPU": 0.5, "GPU": 1.0}
    half = EngineSettings(gpus_per_shard=0.5)
    assert bundle(reserved(half, 2, 1)) == {"CPU": 0.5, "GPU": 0.5}
    assert bundle(reserved(EngineSettings(device="cuda"), 2, 0)) == {"CPU": 0.5, "GPU": 1.0}, "Ray then says what waits for what"
    assert bundle(reserved(EngineSettings(device="cpu"), 1, 8)) == {"CPU": 0.5}
