"""Sleep, wake, other weights, and ranks that hang: what a served model lives through, with the official client as the witness."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.deployments.engine.families import build, reference
from tests.deployments.engine.test_orders import damaged
from tests.e2e.platform import MODEL, RunningPlatform
from tests.e2e.test_chat import until
from tests.e2e.test_operation import answers, directory_of_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]
PROMPT = [5, 6, 7, 8, 9, 10, 11]


def complete(platform: RunningPlatform, max_tokens: int = 12, **options: Any) -> Any:
    found = platform.quickstart  # the official schema has no chunk without a finish reason in this API
    client = openai.OpenAI(base_url=found["base_url"], api_key=found["api_key"], max_retries=0, timeout=120)
    extra = {"ignore_eos": True}
    return client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=max_tokens, temperature=0, logprobs=0, extra_body=extra, **options
    )


def texts(platform: RunningPlatform, directory: Path, num_tokens: int) -> list[str]:
    """What transformers says, a token each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [tokenizer.decode([token]) for token in reference(directory, [PROMPT], num_tokens)[0]]


def post(platform: RunningPlatform, path: str, key: str = "admin_key") -> httpx.Response:
    address = platform.quickstart["base_url"] + path
    return httpx.post(address, headers={"Authorization": f"Bearer {platform.quickstart[key]}"}, timeout=60, trust_env=False)


def state(platform: RunningPlatform) -> str:
    return str(json.loads(platform.mmaas("status", "--json").stdout)["models"][0]["state"])


class Reader(threading.Thread):
    """Reads a stream, slowly, to its end, and notes what came."""

    def __init__(self, platform: RunningPlatform, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.platform, self.max_tokens = platform, max_tokens
        self.text, self.reason, self.error = "", None, None

    def run(self) -> None:
        try:
            for chunk in complete(self.platform, self.max_tokens, stream=True):
                self.text += chunk.choices[0].text
                self.reason = chunk.choices[0].finish_reason or self.reason
        except openai.APIError as error:
            self.error = error


@pytest.fixture(autouse=True)
def _answers(platform: RunningPlatform) -> None:
    until(lambda: answers(platform), 120)


def test_sleeping_model_keeps_its_processes_and_wakes_for_a_request(platform: RunningPlatform) -> None:
    before = complete(platform).choices[0].text
    pids = {process.pid for process in platform.shards()}
    assert post(platform, f"/models/{MODEL}/sleep", "api_key").status_code == 403
    reader = Reader(platform, 150)
    reader.start()
    until(lambda: bool(reader.text))
    assert post(platform, f"/models/{MODEL}/sleep").status_code == 204
    reader.join(20)
    assert (reader.reason, reader.error) == ("length", None), "it was let finish"
    until(lambda: state(platform) == "ASLEEP", 30)
    assert platform.counters()["asleep"] == 1
    assert complete(platform).choices[0].text == before
    assert platform.counters()["asleep"] == 0
    platform.mmaas("sleep", MODEL)
    assert platform.counters()["asleep"] == 1
    platform.mmaas("wake", MODEL)
    assert platform.counters()["asleep"] == 0
    assert complete(platform).choices[0].text == before
    assert {process.pid for process in platform.shards()} == pids
    assert post(platform, "/models/nobody/sleep").status_code == 404


def test_new_weights_come_without_a_restart_and_broken_ones_not_at_all(platform: RunningPlatform, tmp_path: Path) -> None:
    old = Path(directory_of_model(platform))
    new = build("llama", tmp_path / "new", seed=7)
    for path in old.glob("tokenizer*"):
        shutil.copy(path, new)
    before, pids = complete(platform), {process.pid for process in platform.shards()}
    dtype = json.loads(platform.mmaas("status", "--json").stdout)["models"][0]["deployment"]["dtype"]
    words = ("deploy", MODEL, "--tp", "2", "--dtype", dtype, "--model")
    reader = Reader(platform, 150)
    reader.start()
    until(lambda: bool(reader.text))
    platform.mmaas(*words, str(new))
    reader.join(20)
    assert (reader.reason, reader.error) == ("length", None)
    assert reader.text.startswith(before.choices[0].text), "it is of the old version to its end"
    after = complete(platform)
    assert {process.pid for process in platform.shards()} == pids
    if dtype == "float32":
        assert after.choices[0].logprobs.tokens == texts(platform, new, 12)
    assert after.choices[0].text != before.choices[0].text
    broken = damaged(new, tmp_path / "broken")
    refused = platform.mmaas(*words, str(broken), check=False)
    assert refused.returncode == 1
    assert "not finite" in refused.stdout + refused.stderr
    assert complete(platform).choices[0].text == after.choices[0].text
    platform.mmaas(*words, str(old))
    assert complete(platform).choices[0].text == before.choices[0].text
    assert {process.pid for process in platform.shards()} == pids


@pytest.mark.chaos
@pytest.mark.parametrize("rank", [0, 1])
def test_stuck_rank_is_named_and_its_group_replaced_in_time(platform: RunningPlatform, rank: int) -> None:
    """SIGSTOP in the middle of a generation: the process lives, its sockets are open."""
    lost, stuck = platform.counters()["groups_lost_total"], platform.counters()["groups_stuck_total"]
    reader = Reader(platform, 200)
    victim = _rank(platform, rank)
    reader.start()
    until(lambda: bool(reader.text))
    victim.suspend()
    began = time.monotonic()
    reader.join(30)
    assert not reader.is_alive()
    assert reader.error is not None
    assert f"stuck: rank {rank} " in str(reader.error)
    assert "step" in str(reader.error)
    until(lambda: answers(platform), 60)
    crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # who else wants the cores, as in a suite of several processes
    assert time.monotonic() - began < 30 * crowd, "the promise"
    assert victim.pid not in {process.pid for process in platform.shards()}
    until(lambda: not victim.is_running())
    counters = platform.counters()
    assert (counters["groups_lost_total"], counters["groups_stuck_total"]) == (lost + 1, stuck + 1)


def _rank(platform: RunningPlatform, rank: int) -> psutil.Process:
    running = "lead" if rank == 0 else "follow"
    return next(process for process in platform.shards() if f"ShardActor.{running}" in " ".join(process.cmdline()))
