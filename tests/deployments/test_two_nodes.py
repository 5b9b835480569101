"""A model in two stages on two Ray nodes of this machine, each with room for one: placed, answering as transformers does, and gone
as one when a stage is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.settings import Settings
from cluster.types import Deployment, Generate, Sampling
from tests.deployments.engine.families import build, reference
from tests.deployments.gateway.conftest import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(280)]

ROOT = Path(__file__).parents[2]
GREEDY = Sampling(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPT = [5, 17, 101, 33, 7, 64, 250]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def model(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A handle of the deployment."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from deployments.llm import Edition
    from deployments.llm import build as application

    node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**{name: value for name, value in node.items() if name != "include_dashboard"})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(proxy_location="Disabled")
        engine = {
            "kv_cache_bytes": 1 << 22,
            "block_size": 4,
            "threads": 1,
            "cpus_per_shard": 1,
            "native": False,
            "step_deadline_s": 20,
        }
        settings = Settings(home=tmp_path_factory.mktemp("home"), engine=engine)
        deployment = Deployment("staged", str(directory), pp=2)
        made = application(deployment, Edition(str(directory), "digest", "frame", "1"), b"secret", settings)
        serve.run(made, name="model-staged", route_prefix=None)
        yield serve.get_app_handle("model-staged")
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()
        monkeypatch.undo()


def answers(model: Any, count: int = 1) -> list[list[int]]:
    """Greedy tokens of several calls at once."""

    calls = [Generate(str(number), "tenant", prompt_ids=tuple(PROMPT), sampling=GREEDY) for number in range(count)]
    streams = [model.options(stream=True).generate.remote(call) for call in calls]
    return [[token for chunk in stream for delta in chunk.deltas for token in delta.token_ids] for stream in streams]


def stats(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = model.stats.remote().result(timeout_s=30)
    return found


def test_stages_are_on_two_nodes_and_answer_like_transformers(model: Any, directory: Path) -> None:
    found = stats(model)
    assert len(found["nodes"]) == len(set(found["nodes"])) == 2
    assert len(set(found["pids"])) == 2
    info = model.info.remote().result(timeout_s=30)
    assert (info["tp"], info["pp"]) == (1, 2)
    expected = reference(directory, [PROMPT], 12)[0]
    assert answers(model, 6) == [expected] * 6


def test_a_lost_stage_ends_the_group_and_another_starts(model: Any, directory: Path) -> None:
    pids = stats(model)["pids"]
    os.kill(pids[1], signal.SIGKILL)

    def is_back() -> bool:
        found = stats(model)["pids"]
        return len(found) == 2 and not set(found) & set(pids)

    eventually(is_back, seconds=120)
    assert answers(model) == reference(directory, [PROMPT], 12)
