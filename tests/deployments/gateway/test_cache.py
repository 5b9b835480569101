from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import Overloaded
from cluster.types import Adapter, Encode, Generate, Message, Sampling
from deployments.gateway.cache import key_of
from deployments.gateway.flight import Flight
from deployments.gateway.kept import OVERHEAD, Kept
from tests.deployments.gateway.conftest import Server, eventually, serving
from tests.fakes import EchoModels, KeyRing

ASKED: dict[str, Any] = {
    "model": "echo",
    "messages": [{"role": "user", "content": "one two three"}],
    "temperature": 0,
    "max_completion_tokens": 50,
}


@pytest.fixture(scope="module")
def caching() -> Iterator[Server]:
    with serving(cache_bytes=1 << 20, cache_tenant_bytes=1 << 19) as server:
        yield server


@pytest.fixture
def cached(caching: Server, request: pytest.FixtureRequest) -> Server:
    """The server with fresh models of a version that no other test has seen."""
    eventually(lambda: caching.models.open == 0)
    vars(caching.models).update(vars(EchoModels()))
    caching.models.version = request.node.name
    return caching


def outcome(server: Server, key: str = KeyRing.USER, **body: Any) -> tuple[str | None, Any]:
    with server.client(key) as client:
        raw = client.chat.completions.with_raw_response.create(**(ASKED | body))
        return raw.headers.get("x-cache"), raw.parse()


def test_without_memory_nothing_is_kept_or_said(server: Server) -> None:
    assert outcome(server)[0] is None
    assert outcome(server)[0] is None
    assert len(server.models.requests) == 2


def test_the_second_of_two_equal_calls_is_answered_from_the_cache(cached: Server) -> None:
    first, second = outcome(cached), outcome(cached)
    assert (first[0], second[0]) == ("miss", "hit")
    assert second[1].choices == first[1].choices
    assert second[1].usage == first[1].usage
    assert second[1].id != first[1].id
    assert len(cached.models.requests) == 1


def test_streams_and_whole_answers_are_served_from_one_another(cached: Server) -> None:
    whole = outcome(cached)[1]
    with cached.client() as client:
        stream = client.chat.completions.with_raw_response.create(**ASKED, stream=True, stream_options={"include_usage": True})
        assert stream.headers["x-cache"] == "hit"
        chunks = list(stream.parse())
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert len(cached.models.requests) == 1


def test_a_stream_fills_the_cache_for_a_whole_answer(cached: Server) -> None:
    with cached.client() as client:
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ASKED, stream=True))
    assert outcome(cached)[0] == "hit"
    assert outcome(cached)[1].choices[0].message.content == streamed


def test_logprobs_and_several_choices_come_back_as_they_were(cached: Server) -> None:
    first, second = (outcome(cached, n=3, logprobs=True, top_logprobs=2) for _ in range(2))
    assert (first[0], second[0]) == ("miss", "hit")
    assert second[1].choices == first[1].choices


@pytest.mark.parametrize("body", [{"temperature": 1}, {"temperature": None}, {"temperature": 0.7, "top_p": 1e-6}])
def test_answers_of_chance_are_not_kept(cached: Server, body: dict[str, Any]) -> None:
    assert [outcome(cached, **body)[0] for _ in range(2)] == ["bypass", "bypass"]
    assert len(cached.models.requests) == 2


def test_a_seed_makes_chance_repeatable(cached: Server) -> None:
    assert [outcome(cached, temperature=1, seed=seed)[0] for seed in (7, 7, 8)] == ["miss", "hit", "miss"]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "one two  three"}]},
        {"messages": [{"role": "system", "content": "one two three"}]},
        {"max_completion_tokens": 49},
        {"stop": "two"},
        {"presence_penalty": 0.5},
        {"logprobs": True},
        {"logit_bias": {"5": 1}},
        {"response_format": {"type": "json_object"}},
        {"seed": 1},
    ],
)
def test_whatever_could_change_the_answer_is_another_call(cached: Server, body: dict[str, Any]) -> None:
    assert [outcome(cached)[0], outcome(cached, **body)[0]] == ["miss", "miss"]


def test_what_can_not_change_the_answer_is_the_same_call(cached: Server) -> None:
    body = {"service_tier": "flex", "user": "somebody", "metadata": {"a": "b"}, "stop": []}
    assert [outcome(cached)[0], outcome(cached, **body)[0]] == ["miss", "hit"]


def test_no_tenant_sees_that_another_asked(cached: Server) -> None:
    cached.keys.principals["mk_rival_0123456789"] = replace(
        cached.keys.principals[KeyRing.USER], tenant="rival", key_id="key_rival"
    )
    assert [outcome(cached)[0], outcome(cached, "mk_rival_0123456789")[0], outcome(cached)[0]] == ["miss", "miss", "hit"]


def test_another_version_of_the_model_answers_anew(cached: Server) -> None:
    assert outcome(cached)[0] == "miss"
    cached.models.version = "newer"
    assert outcome(cached)[0] == "miss"
    cached.models.version = None  # nobody knows which answers
    assert outcome(cached)[0] == "bypass"


def test_an_adapter_is_not_its_base(cached: Server) -> None:
    cached.models.adapted = [Adapter("echo", "legal", "a" * 64)]
    assert [outcome(cached)[0], outcome(cached, model="echo:legal")[0], outcome(cached, model="echo:legal")[0]] == [
        "miss",
        "miss",
        "hit",
    ]


def test_a_version_that_changed_under_way_is_not_kept(cached: Server) -> None:
    cached.models.delay_s = 0.1
    thread = threading.Thread(target=outcome, args=(cached,))
    thread.start()
    eventually(lambda: cached.models.open == 1)
    cached.models.version = "newer yet"
    thread.join()
    assert outcome(cached)[0] == "miss"
    cached.models.version = "test_a_version_that_changed_under_way_is_not_kept"
    assert outcome(cached)[0] == "miss"


def test_failures_are_not_kept(cached: Server) -> None:
    cached.models.error, cached.models.fail_after = Overloaded("full", retry_after_s=1), 2
    with pytest.raises(openai.InternalServerError):
        outcome(cached)
    cached.models.error = None
    assert outcome(cached)[0] == "miss"


def test_an_answer_with_a_failed_choice_is_not_kept(cached: Server) -> None:
    cached.models.fails = {1: 1}
    assert [len(outcome(cached, n=2)[1].choices) for _ in range(2)] == [1, 1]
    assert len(cached.models.requests) == 2


def test_equal_calls_at_once_are_one_call_of_the_model(cached: Server) -> None:
    cached.models.first_delay_s = 0.5
    found: list[tuple[str | None, Any]] = []
    threads = [threading.Thread(target=lambda: found.append(outcome(cached))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cached.models.requests) == 1
    assert sorted(str(said) for said, _ in found) == ["miss", *["shared"] * 7]
    assert len({answer.choices[0].message.content for _, answer in found}) == 1


def test_a_caller_who_leaves_does_not_end_the_others_answer_and_the_last_one_does(cached: Server) -> None:
    cached.models.delay_s = 0.2
    found: list[tuple[str | None, Any]] = []
    with cached.client() as client:
        leaving = client.chat.completions.create(**ASKED, stream=True)
        next(iter(leaving))
        other = threading.Thread(target=lambda: found.append(outcome(cached)))
        other.start()
        eventually(lambda: len(cached.keys.principals) > 0 and cached.models.open == 1)
        leaving.close()
    other.join()
    assert found[0][1].choices[0].message.content == "one two three"
    cached.models.delay_s = 5
    with cached.client() as client:
        stream = client.chat.completions.create(**(ASKED | {"seed": 3}), stream=True)
        next(iter(stream))
        stream.close()
    eventually(lambda: cached.models.open == 0, 4)
    cached.models.delay_s = 0
    assert outcome(cached, seed=3)[0] == "miss"


def test_prompts_of_one_call_are_kept_each_for_itself(cached: Server) -> None:
    with cached.client() as client:
        create = client.completions.with_raw_response.create
        asked: dict[str, Any] = {"model": "echo", "temperature": 0}
        outcomes = [
            create(**asked, prompt=prompt).headers["x-cache"] for prompt in (["a b", "c d"], "a b", ["c d", "e"], ["c d", "a b"])
        ]
        texts = [choice.text for choice in create(**asked, prompt=["c d", "a b"]).parse().choices]
    assert outcomes == ["miss", "hit", "miss", "hit"]
    assert texts == ["c d", "a b"]


def test_embeddings_are_kept(cached: Server) -> None:
    with cached.client() as client:
        create = client.embeddings.with_raw_response.create
        answers = [create(model="echo", input=["one two", "three"], encoding_format=form) for form in ("float", "base64", "float")]
    assert [answer.headers["x-cache"] for answer in answers] == ["miss", "hit", "hit"]
    assert answers[0].parse().data == answers[2].parse().data
    assert len(cached.models.encoded) == 1


REQUEST = Generate("req_1", "acme", (Message("user", "hi"),), sampling=Sampling(temperature=0), open=frozenset({"top_p", "top_k"}))


@given(
    st.sampled_from(["tenant", "prompt", "adapter", "open"]),
    st.text(min_size=1),
)
def test_keys_differ_wherever_calls_do(field: str, text: str) -> None:
    value: Any = {"adapter": Adapter("a", text, text), "open": frozenset({text})}.get(field, text)
    changed = replace(REQUEST, **{field: value})
    assert (key_of("m", "1", changed) == key_of("m", "1", REQUEST)) == (changed == REQUEST)
    assert key_of("m", "1", replace(REQUEST, request_id=text)) == key_of("m", "1", REQUEST)
    assert key_of("m", "1" + text, REQUEST) != key_of("m", "1", REQUEST) != key_of("m" + text, "1", REQUEST)


def test_a_key_names_the_operation() -> None:
    one, other = (Encode("r", "acme", task, ("text",)) for task in ("embed", "classify"))
    assert key_of("m", "1", one) != key_of("m", "1", other)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 20), st.integers(0, 400)), max_size=120))
def test_no_tenant_and_not_all_together_take_more_than_they_may(puts: list[tuple[str, int, int]]) -> None:
    kept = Kept(5000, 2500, 100, lambda: 0)
    last: dict[tuple[str, int], int] = {}
    for tenant, key, size in puts:
        kept.put(tenant, bytes([key]), b"x" * size)
        last[tenant, key] = size
        assert kept.size <= 5000
        assert all(kept.size_of(tenant) <= 2500 for tenant in "abc")
        assert kept.get(tenant, bytes([key])) == b"x" * size
    found = [(tenant, size) for (tenant, key), size in last.items() if kept.get(tenant, bytes([key])) is not None]
    assert sum(size + OVERHEAD for _, size in found) == kept.size
    assert all(len(kept.get(tenant, bytes([key])) or b"x" * size) == size for (tenant, key), size in last.items())


def test_a_flood_drives_out_nobody_who_keeps_less() -> None:
    kept = Kept(10_000, 8_000, 100, lambda: 0)
    kept.put("small", b"k", b"v" * 1000)
    for number in range(1000):
        kept.put("flood", str(number).encode(), b"x" * 500)
    assert kept.get("small", b"k") is not None
    assert kept.size_of("flood") <= 8_000


def test_answers_end_after_their_time_and_the_longest_unused_goes_first() -> None:
    now = [0.0]
    kept = Kept(10_000, 3 * (OVERHEAD + 10), 50, lambda: now[0])
    for key in (b"1", b"2", b"3"):
        kept.put("a", key, b"x" * 10)
    kept.get("a", b"1")
    kept.put("a", b"4", b"x" * 10)
    assert [kept.get("a", key) is not None for key in (b"1", b"2", b"3", b"4")] == [True, False, True, True]
    kept.put("a", b"big", b"x" * 5000)
    assert kept.get("a", b"big") is None
    now[0] = 51
    assert kept.get("a", b"1") is None
    assert kept.size == 2 * (OVERHEAD + 10)


def test_every_follower_gets_every_item_and_the_same_error() -> None:
    async def walk() -> None:
        async def source() -> AsyncGenerator[int, None]:
            for number in range(5):
                await asyncio.sleep(0)
                yield number
            raise Overloaded("full", retry_after_s=1)

        ends: list[Any] = []

        async def end(items: Any) -> None:
            ends.append(items)

        flight = Flight(source(), end)

        async def follow() -> list[int]:
            seen: list[int] = []
            try:
                async for item in flight.follow():
                    seen.append(item)
            except Overloaded:
                return seen
            raise AssertionError("the error was lost")

        assert await asyncio.gather(*(follow() for _ in range(20))) == [[0, 1, 2, 3, 4]] * 20
        assert ends == [None]

    asyncio.run(walk())
