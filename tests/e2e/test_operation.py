"""Starting, looking, losing a shard, stopping: what an operator does. The last test takes the platform down."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import threading
import time

import openai
import pytest

from cluster import launch, ports
from cluster.desired import Desired
from cluster.private_files import Secrets
from cluster.store import Store
from tests.e2e.platform import MODEL, ROOT, RunningPlatform
from tests.e2e.test_chat import GREEDY, streamed, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def answers(platform: RunningPlatform) -> bool:
    try:
        return bool(streamed(platform.client(timeout=20)))
    except openai.APIError:
        return False


def directory_of_model(platform: RunningPlatform) -> str:
    store = Store(platform.settings.store_url)
    try:
        return Desired(store).get(MODEL).model
    finally:
        store.close()


def test_second_up_changes_nothing_and_says_so(platform: RunningPlatform) -> None:
    before = platform.quickstart
    result = platform.mmaas("up")
    assert "Already up" in result.stdout
    assert platform.quickstart == before


def test_secrets_are_for_the_owner_alone(platform: RunningPlatform) -> None:
    home = platform.settings.home
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "quickstart.json").stat().st_mode) == 0o600


def test_doctor_finds_no_fault_in_what_up_has_made(platform: RunningPlatform) -> None:
    checks = json.loads(platform.mmaas("doctor", "--security", "--json", check=False).stdout)
    assert len(checks) > 10, "the gateway was knocked at, too"
    assert [check for check in checks if check["status"] == "fail"] == []


def test_status_tells_what_is_served(platform: RunningPlatform) -> None:
    found = json.loads(platform.mmaas("status", "--json").stdout)
    assert MODEL in json.dumps(found)
    assert MODEL in platform.mmaas("status").stdout


def test_everything_listens_on_loopback_alone(platform: RunningPlatform) -> None:
    found = ports.listeners({process.pid for process in launch.family(platform.settings)})
    assert found
    assert [listener for listener in found if not listener.is_loopback] == []


def test_ranks_go_before_what_is_around_them(platform: RunningPlatform) -> None:
    family = {" ".join(process.cmdline()): process for process in launch.family(platform.settings)}
    around = [process for title, process in family.items() if "ServeReplica:gateway" in title or ":LLM" in title]
    assert len(around) >= 2, f"a gateway and a model's replica among {list(family)}"
    assert max(process.nice() for process in platform.shards()) < min(process.nice() for process in around)


def test_example_job_runs_under_ray_job_submit(platform: RunningPlatform) -> None:
    address = f"http://127.0.0.1:{platform.settings.ray.dashboard_port}"
    words = ("job", "submit", "--address", address, "--working-dir", str(ROOT / "examples"), "--", "python", "chat_job.py")
    token = Secrets(platform.settings.home).ray_token_path
    result = platform.run(
        sys.executable, "-m", "ray.scripts.scripts", *words, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token)
    )
    assert "succeeded" in result.stdout


def test_model_that_cannot_be_sharded_so_is_refused_before_anything_starts(platform: RunningPlatform) -> None:
    directory = directory_of_model(platform)
    before = {process.pid for process in platform.shards()}
    result = platform.mmaas("deploy", "other", "--model", directory, "--tp", "3", check=False)
    assert result.returncode == 1
    assert "heads" in result.stdout + result.stderr
    assert {process.pid for process in platform.shards()} == before
    names = [row["deployment"]["name"] for row in json.loads(platform.mmaas("status", "--json").stdout)["models"]]
    assert names == [MODEL], "a refused wish is not kept"


@pytest.mark.slow
def test_new_version_takes_over_without_cutting_a_stream(platform: RunningPlatform) -> None:
    old = {process.pid for process in platform.shards()}
    directory = directory_of_model(platform)
    chunks: list[object] = []
    request = GREEDY | {"max_tokens": 220}

    def read() -> None:
        for chunk in platform.client(timeout=120).chat.completions.create(**request, extra_body={"ignore_eos": True}, stream=True):
            chunks.append(chunk)
            time.sleep(0.02)

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: bool(chunks))
    platform.mmaas("deploy", MODEL, "--model", directory, "--tp", "2", "--dtype", "bfloat16")
    assert answers(platform)
    reader.join(60)
    assert not reader.is_alive()
    assert chunks[-1].choices[0].finish_reason == "length", "the old version finished what it had begun"  # type: ignore[attr-defined]
    until(lambda: not old & {process.pid for process in platform.shards()}, 60)


@pytest.mark.chaos
def test_killed_shard_ends_its_streams_with_an_error_and_the_group_comes_back(platform: RunningPlatform) -> None:
    until(lambda: answers(platform), 60)
    victim = platform.shards()[-1]
    seen: list[object] = []

    def read() -> None:
        try:
            for chunk in platform.client().chat.completions.create(
                **(GREEDY | {"max_tokens": 200}), extra_body={"ignore_eos": True}, stream=True
            ):
                seen.append(chunk)
        except openai.APIError as error:
            seen.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    until(lambda: len(seen) >= 3)
    os.kill(victim.pid, signal.SIGKILL)
    killed = time.monotonic()
    for reader in readers:
        reader.join(15)
    assert not any(reader.is_alive() for reader in readers), "a stream hangs"
    assert time.monotonic() - killed < 15
    errors = [item for item in seen if isinstance(item, openai.APIError)]
    assert len(errors) == 3
    assert all("shard" in str(error) for error in errors)
    until(lambda: answers(platform), 90)
    assert victim.pid not in {process.pid for process in platform.shards()}
    assert len(platform.shards()) == 2


@pytest.mark.slow
@pytest.mark.chaos
def test_stopped_shard_is_taken_for_lost_and_replaced(platform: RunningPlatform) -> None:
    """SIGSTOP: the process lives, its sockets are open, and only the progress clock can tell."""
    until(lambda: answers(platform), 90)
    victim = platform.shards()[0]
    victim.suspend()
    began = time.monotonic()
    with pytest.raises(openai.APIError):
        streamed(platform.client(timeout=60))
    assert time.monotonic() - began < 3 * platform.settings.engine.step_deadline_s
    until(lambda: answers(platform), 120)
    assert victim.pid not in {process.pid for process in platform.shards()}
