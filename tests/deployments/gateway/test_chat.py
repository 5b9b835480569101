"""POST /v1/chat/completions through the official client, with its strict validation of every answer."""

from __future__ import annotations

import openai
import pytest

from tests.deployments.gateway.conftest import Server

HELLO = [{"role": "user", "content": "one two three"}]


def test_answers_whole(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="echo", messages=HELLO)
    answer = raw.parse()
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.content == "one two three"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 3, 10)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer._request_id.startswith("req_")
    assert raw.headers["content-type"] == "application/json"
    assert int(raw.headers["openai-processing-ms"]) >= 0


def test_streams_role_then_text_then_finish(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="echo", messages=HELLO, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "one two three"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1].choices[0].delta.model_dump(exclude_none=True) == {}
    assert len({(c.id, c.created, c.model) for c in chunks}) == 1
    assert all(c.usage is None and "usage" not in c.model_fields_set for c in chunks)


def test_usage_comes_last_and_only_when_asked_for(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="echo", messages=HELLO, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 10
    assert all(c.usage is None and "usage" in c.model_fields_set for c in chunks[:-1])


def test_every_choice_opens_in_index_order(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="echo", messages=HELLO, n=3) as stream:
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["one two three"] * 3
    chunks = list(client.chat.completions.create(model="echo", messages=HELLO, n=3, stream=True))
    assert [c.choices[0].index for c in chunks[:3]] == [0, 1, 2]


def test_n_answers_whole(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="echo", messages=HELLO, n=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 12


def test_logprobs_carry_bytes(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "é ß"}]
    answer = client.chat.completions.create(model="echo", messages=messages, logprobs=True, top_logprobs=2)
    tokens = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == "é ß"
    assert [len(token.top_logprobs) for token in tokens] == [2, 2]
    chunks = list(client.chat.completions.create(model="echo", messages=messages, logprobs=True, stream=True))
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.token for t in streamed] == [t.token for t in tokens]


def test_stop_and_length(client: openai.OpenAI) -> None:
    stopped = client.chat.completions.create(model="echo", messages=HELLO, stop=["three", "four"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("one two", "stop")
    short = client.chat.completions.create(model="echo", messages=HELLO, max_completion_tokens=1)
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("one", "length")


def test_the_engine_gets_what_was_asked(server: Server, client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model="echo",
        messages=[
            {"role": "developer", "content": "be short"},
            {"role": "user", "name": "ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
        temperature=0,
        top_p=0.5,
        seed=-3,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"5": -100},
        max_tokens=9,
        extra_body={
            "top_k": 40,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "ignore_eos": True,
            "min_tokens": 2,
            "stop_token_ids": [1, 2],
        },
    )
    asked = server.models.requests[-1]
    assert [(m.role, m.content, m.name) for m in asked.messages] == [("system", "be short", None), ("user", "a\nb", "ann")]
    assert asked.tenant == "acme"
    assert asked.request_id.startswith("req_")
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.max_tokens, sampling.min_tokens) == (0, 0.5, -3, 9, 2)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.logit_bias) == (1, -1, ((5, -100.0),))
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (40, 0.1, 1.1)
    assert (sampling.ignore_eos, sampling.stop_token_ids, sampling.n) == (True, (1, 2), 1)


@pytest.mark.parametrize(
    "extra",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": True},
        {"reasoning_effort": "low", "verbosity": "low", "prompt_cache_key": "k", "safety_identifier": "s", "modalities": ["text"]},
        {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "unheard_of": [1]},
        {"tool_choice": "none", "functions": None, "chat_template_kwargs": {}, "best_of": 1, "temperature": None, "stop": None},
    ],
)
def test_what_changes_nothing_is_accepted(client: openai.OpenAI, extra: dict[str, object]) -> None:
    assert client.chat.completions.create(model="echo", messages=HELLO, extra_body=extra).choices[0].message.content


@pytest.mark.parametrize(
    ("asked", "given", "priority"),
    [("auto", "default", "interactive"), ("default", "default", "interactive"), ("flex", "flex", "batch")],
)
def test_class_of_service_reaches_the_model_and_the_answer_says_it(
    client: openai.OpenAI, server: Server, asked: str, given: str, priority: str
) -> None:
    answer = client.chat.completions.create(model="echo", messages=HELLO, service_tier=asked)
    assert (answer.service_tier, server.models.requests[-1].priority) == (given, priority)
    chunks = list(client.chat.completions.create(model="echo", messages=HELLO, service_tier=asked, stream=True))
    assert {chunk.service_tier for chunk in chunks} == {given}
    text = client.completions.create(model="echo", prompt=["a", "b"], extra_body={"service_tier": asked})
    assert text.model_extra == {"service_tier": given}
    assert {request.priority for request in server.models.requests[-2:]} == {priority}


def test_class_of_service_that_nobody_named_is_not_mentioned(client: openai.OpenAI, server: Server) -> None:
    answer = client.chat.completions.create(model="echo", messages=HELLO)
    assert "service_tier" not in answer.model_fields_set
    assert server.models.requests[-1].priority == "interactive"


@pytest.mark.parametrize("tier", ["priority", "scale", "Flex", 1])
def test_class_of_service_that_is_not_there_is_refused(client: openai.OpenAI, tier: object) -> None:
    with pytest.raises(openai.BadRequestError, match="'auto', 'default' or 'flex'") as caught:
        client.chat.completions.create(model="echo", messages=HELLO, extra_body={"service_tier": tier})
    assert caught.value.param == "service_tier"


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("audio", {"voice": "x", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content", "content": "x"}),
        ("web_search_options", {}),
        ("chat_template", "{{ messages }}"),
        ("chat_template_kwargs", {"a": 1}),
        ("best_of", 2),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(client: openai.OpenAI, param: str, value: object) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="echo", messages=HELLO, extra_body={param: value})
    assert refused.value.param == param
    assert refused.value.code == "unsupported_parameter"


@pytest.mark.parametrize(
    ("param", "body", "code"),
    [
        ("model", {"messages": HELLO}, "missing_required_parameter"),
        ("messages", {"model": "echo"}, "missing_required_parameter"),
        ("messages", {"messages": []}, "invalid_value"),
        ("messages[0].content", {"messages": [{"role": "user", "content": 7}]}, "invalid_type"),
        ("messages[0].content", {"messages": [{"role": "user"}]}, "missing_required_parameter"),
        ("messages[0].role", {"messages": [{"role": "function", "content": "x"}]}, "invalid_value"),
        ("messages[0].tool_call_id", {"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "invalid_value"),
        ("temperature", {"temperature": 2.1}, "invalid_value"),
        ("temperature", {"temperature": "1"}, "invalid_type"),
        ("temperature", {"temperature": True}, "invalid_type"),
        ("n", {"n": 17}, "invalid_value"),
        ("n", {"n": True}, "invalid_type"),
        ("n", {"n": 10**12}, "invalid_value"),
        ("stop", {"stop": ["a"] * 5}, "invalid_value"),
        ("stop", {"stop": [""]}, "invalid_value"),
        ("stop", {"stop": 3}, "invalid_type"),
        ("max_tokens", {"max_tokens": 0}, "invalid_value"),
        ("min_tokens", {"min_tokens": 5, "max_tokens": 4}, "invalid_value"),
        ("top_logprobs", {"top_logprobs": 2}, "invalid_value"),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}, "invalid_value"),
        ("stream_options", {"stream_options": {"include_usage": True}}, "invalid_value"),
    ],
)
def test_bad_values_are_named(client: openai.OpenAI, param: str, body: dict[str, object], code: str) -> None:
    defaults = (
        {} if code.startswith("missing_required") and param in ("model", "messages") else {"model": "echo", "messages": HELLO}
    )
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/chat/completions", body={**defaults, **body}, cast_to=object)
    assert (refused.value.param, refused.value.code) == (param, code)


def test_an_image_is_refused_by_its_place(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="echo", messages=[{"role": "user", "content": parts}])
    assert refused.value.param == "messages[0].content[1].type"
