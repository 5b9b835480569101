"""The official client against the whole platform: Ray, Serve, HAProxy, gateway, two DeepSpeed ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import httpx
import openai
import pydantic
import pytest

from tests.e2e.platform import MODEL, RunningPlatform

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ASK = [{"role": "user", "content": "What does str.split do?"}]
GREEDY = {"model": MODEL, "messages": ASK, "temperature": 0, "max_tokens": 24, "seed": 1}


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


def streamed(client: openai.OpenAI, **options: object) -> str:
    chunks = client.chat.completions.create(**(GREEDY | options), stream=True)
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_stream_and_plain_answer_are_the_same_text(platform: RunningPlatform) -> None:
    client = platform.client()
    plain = client.chat.completions.create(**GREEDY)
    assert plain.choices[0].message.content
    assert plain.choices[0].finish_reason in ("length", "stop")
    assert plain.usage is not None
    assert plain.usage.completion_tokens <= 24
    assert streamed(client) == plain.choices[0].message.content


def test_usage_comes_last_in_a_stream_that_asks_for_it(platform: RunningPlatform) -> None:
    chunks = list(platform.client().chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[0].choices[0].delta.role == "assistant"


def test_the_time_that_a_model_works_is_on_the_bill(platform: RunningPlatform) -> None:
    def looked() -> tuple[float, ...]:
        found = json.loads(platform.mmaas("usage", "--reconcile", "--json").stdout)[MODEL]
        assert found["held"] > found["busy"]
        return tuple(found[name] for name in ("busy", "attributed", "billed"))

    def settled() -> tuple[float, ...]:
        """Once nothing runs any more: an engine says every second what it has done."""
        seen = [looked()]
        until(lambda: seen.append(looked()) or seen[-1] == seen[-2], 60)
        return seen[-1]

    before = settled()
    platform.client().chat.completions.create(**GREEDY, n=2)
    streamed(platform.client(), max_tokens=200, messages=[{"role": "user", "content": "What is a compute second?"}])
    busy, attributed, billed = (after - earlier for after, earlier in zip(settled(), before, strict=True))
    assert busy > 0
    assert attributed == pytest.approx(busy, abs=1e-5)
    assert abs(busy - billed) < 0.01 * busy


def test_stop_string_ends_the_answer_before_itself(platform: RunningPlatform) -> None:
    client = platform.client()
    text = client.chat.completions.create(**GREEDY).choices[0].message.content or ""
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    cut = client.chat.completions.create(**GREEDY, stop=stop)
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


class Verdict(pydantic.BaseModel):
    """Short, so that a model that knows nothing of JSON comes to its end too."""

    is_method: bool
    kind: Literal["function", "class", "module"]
    score: int = pydantic.Field(ge=0, le=9)


def test_the_official_client_parses_an_answer_of_the_form_that_it_asked_for(platform: RunningPlatform) -> None:
    options = GREEDY | {"max_tokens": 200, "temperature": 1.0, "response_format": Verdict}
    parsed = platform.client().chat.completions.parse(**options).choices[0].message.parsed
    assert isinstance(parsed, Verdict)
    with platform.client().chat.completions.stream(**options) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.parsed == parsed


def test_choices_differ_and_one_seed_repeats_them(platform: RunningPlatform) -> None:
    options = GREEDY | {"temperature": 1.0, "n": 3, "seed": 11}
    first, again = (platform.client().chat.completions.create(**options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]


def test_logprobs_name_the_tokens_of_the_answer(platform: RunningPlatform) -> None:
    answer = platform.client().chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3).choices[0]
    assert answer.logprobs is not None
    content = answer.logprobs.content or []
    raw = bytes(byte for token in content for byte in token.bytes or [])
    assert raw.decode("utf-8", "replace").startswith((answer.message.content or "")[:4])
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= max(top.logprob for top in token.top_logprobs) + 1e-6


def test_completions_take_text_ids_and_lists(platform: RunningPlatform) -> None:
    client = platform.client()
    answers = client.completions.create(model=MODEL, prompt=["ab", "cd"], max_tokens=4, temperature=0)
    assert [choice.index for choice in answers.choices] == [0, 1]
    ids = client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=4, temperature=0)
    assert ids.usage is not None
    assert (ids.usage.prompt_tokens, ids.usage.completion_tokens) == (3, 4)


@pytest.mark.parametrize(
    ("change", "error", "code"),
    [
        ({"model": "absent"}, openai.NotFoundError, "model_not_found"),
        ({"max_tokens": 5000}, openai.BadRequestError, "context_length_exceeded"),
        ({"temperature": 3}, openai.BadRequestError, None),
    ],
)
def test_wrong_requests_get_their_own_error(platform: RunningPlatform, change: dict, error: type, code: str | None) -> None:
    with pytest.raises(error) as raised:
        platform.client().chat.completions.create(**(GREEDY | change))
    assert code is None or raised.value.code == code
    with pytest.raises(error):
        streamed(platform.client(), **change)


def test_wrong_key_gets_in_nowhere(platform: RunningPlatform) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=platform.quickstart["base_url"], api_key="mk_wrong", max_retries=0).models.list()


def test_leaving_a_stream_frees_its_place(platform: RunningPlatform) -> None:
    before = platform.counters()
    stream = platform.client().chat.completions.create(
        **(GREEDY | {"max_tokens": 200}), extra_body={"ignore_eos": True}, stream=True
    )
    next(iter(stream))
    stream.close()
    until(lambda: platform.counters()["aborted_total"] > before["aborted_total"])
    until(lambda: not any(platform.counters()[name] for name in ("running", "streams", "kv_blocks_used")))
    after = platform.counters()
    assert after["output_tokens_total"] - before["output_tokens_total"] < 200, "the model went on for nobody"


def test_thirty_two_streams_at_once_each_get_their_own_answer(platform: RunningPlatform) -> None:
    client = platform.client()
    questions = [[{"role": "user", "content": f"question {number}"}] for number in range(32)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda messages: streamed(client, messages=messages), questions))
    alone = [streamed(client, messages=messages) for messages in questions[:4]]
    assert together[:4] == alone
    assert len(set(together)) > 16
    until(lambda: platform.counters()["kv_blocks_used"] == 0)  # counters come once a second


def test_more_than_the_queue_holds_is_told_to_come_back(platform: RunningPlatform) -> None:
    client = platform.client()

    def ask(number: int) -> str | openai.APIStatusError:
        messages = [{"role": "user", "content": f"number {number}"}]
        try:
            return streamed(client, messages=messages, max_tokens=100, extra_body={"ignore_eos": True})
        except openai.APIStatusError as error:
            return error

    with ThreadPoolExecutor(90) as pool:
        results = list(pool.map(ask, range(90)))
    refused = [result for result in results if isinstance(result, openai.APIStatusError)]
    assert refused, "32 places and 16 in the queue can't hold 90"
    assert len(refused) < 90 - 32
    assert {(error.status_code, error.code) for error in refused} == {(503, "overloaded")}
    assert all(int(error.response.headers["retry-after"]) >= 1 for error in refused)


def test_control_headers_of_serve_have_no_effect(platform: RunningPlatform) -> None:
    found = platform.quickstart
    headers = {"Authorization": f"Bearer {found['api_key']}", "x-request-timeout-seconds": "0.001", "x-request-id": "mine"}
    answer = httpx.post(
        f"{found['base_url']}/chat/completions", headers=headers, json=GREEDY | {"max_tokens": 60}, trust_env=False, timeout=60
    )
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] != "mine"
    assert len(answer.headers.get_list("x-request-id")) == 1


def test_python_handle_gives_the_same_answer_and_the_same_refusal(platform: RunningPlatform) -> None:
    text = platform.client().chat.completions.create(**GREEDY).choices[0].message.content
    program = f"""
import json
from cluster import settings, raynode
raynode.join(settings.load())
from cluster.errors import Unauthenticated
from mmaas.client import connect
ask = {GREEDY!r}
client = connect(api_key={platform.quickstart["api_key"]!r})
plain = client.chat.completions.create(**ask)
stream = client.chat.completions.create(**ask, stream=True)
pieces = [choice.delta.content or "" for chunk in stream for choice in chunk.choices]
try:
    connect(api_key="mk_wrong").chat.completions.create(**ask)
    refused = False
except Unauthenticated:
    refused = True
print(json.dumps([plain.choices[0].message.content, "".join(pieces), refused]))
"""
    import sys

    result = platform.run(sys.executable, "-c", program)
    assert json.loads(result.stdout.splitlines()[-1]) == [text, text, True]
