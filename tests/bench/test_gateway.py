"""The gateway's benchmark: when it sends, what it reads, what it makes of the times; and its sender against a real gateway."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator

import pytest

from bench import gateway
from bench.echo import LLM, generate
from bench.gateway import Measurement, Streams, added, arrivals, dropped, rows, stream
from bench.gateway_systems import BARE, LITELLM, OURS, Entrance, litellm_config
from bench.harness import Row
from tests.deployments.gateway.conftest import Server, serving
from tests.fakes import KeyRing

MEASURED = [
    Measurement(BARE, 200, 199.0, 5.0, 20.0, 0, 3.0, 9.0),
    Measurement(OURS, 200, 199.0, 7.0, 26.0, 0, 3.0, 8.0),
    Measurement(LITELLM, 200, 150.0, 13.0, 80.0, 4, 3.0, 30.0),
]


@pytest.fixture(scope="module")
def echo() -> Iterator[Server]:
    with serving() as server:
        yield server


def entrance(server: Server, key: str = KeyRing.USER) -> Entrance:
    return Entrance(f"{server.url}/v1", key)


def test_requests_come_as_from_many_callers() -> None:
    at = arrivals(200, 50, 1)
    assert at == sorted(at) == arrivals(200, 50, 1)
    assert 0.9 < len(at) / 10_000 < 1.1
    gaps = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert 0.8 < statistics.stdev(gaps) / statistics.mean(gaps) < 1.2


def test_what_a_gateway_adds_is_over_bare_serve() -> None:
    assert rows(MEASURED) == [Row("echo", 200, 1, 2.0, 8.0, LITELLM, 4.0)]
    assert rows(MEASURED[:2]) == [Row("echo", 200, 1, 2.0, None, None, None)]
    bare, ours, theirs = added(MEASURED).lines
    assert ours[5:9] == ["+2.0", "+6.0", "4.0x", "10.0x"]
    assert theirs[5:9] == ["+8.0", "+60.0", "", ""]
    assert bare[5:9] == ["", "", "", ""]
    assert "| mmaas gateway |" in added(MEASURED).markdown()
    assert {len(line) for line in added(MEASURED).lines} == {len(added(MEASURED).columns)}


def test_plain_answers_are_timed_and_refusals_are_failures(echo: Server) -> None:
    body = {"model": "echo", "messages": [{"role": "user", "content": "one"}], "stream": False}
    said = gateway._sent(entrance(echo), [0.0, 0.05, 0.1], body)
    assert [answer["error"] for answer in said["exchanges"]] == ["", "", ""]
    assert all(0 < answer["last_s"] < 20 for answer in said["exchanges"])
    refused = gateway._sent(entrance(echo, "mk_wrong"), [0.0], body)["exchanges"][0]
    assert "401" in refused["error"]
    with pytest.raises(RuntimeError, match="401"):
        gateway._measurement(OURS, 1, [refused], 1, 0, 0.1)


def test_streams_are_whole_or_dropped(echo: Server) -> None:
    echo.models.delay_s = 0.01
    assert stream(OURS, entrance(echo), 20, 1.0).dropped == 0
    assert stream(OURS, entrance(echo, "mk_wrong"), 3, 1.0).dropped == 3
    echo.models.delay_s = 0.0
    [line] = dropped([Streams(OURS, 500, 0, 200.0, 230.0)]).lines
    assert line == [OURS, "500", "0", "200", "230"]


async def test_the_echo_model_speaks_as_ours_do() -> None:
    asked = generate({"messages": [{"role": "user", "content": "0"}], "max_tokens": 3}, "r")
    chunks = [chunk async for chunk in LLM().generate(asked)]
    assert "".join(delta.text for chunk in chunks for delta in chunk.deltas) == " word word word"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    slow = generate({"messages": [{"role": "user", "content": "0.001"}], "max_tokens": 3}, "r")
    assert len([chunk async for chunk in LLM().generate(slow)]) == 4


def test_litellm_has_one_model_behind_it_and_a_key() -> None:
    config = json.loads(json.dumps(litellm_config(Entrance("http://127.0.0.1:1/bare/v1"))))
    assert config["model_list"][0]["litellm_params"]["api_base"] == "http://127.0.0.1:1/bare/v1"
    assert config["general_settings"]["master_key"] == "sk-bench"
