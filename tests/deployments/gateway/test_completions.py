"""POST /v1/completions and /v1/models through the official client.

Its types want a finish reason on every streamed text chunk, where the real service sends null as we do: streams are read leniently.
"""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from cluster.types import Adapter
from tests.deployments.gateway.conftest import Server


@pytest.fixture
def lenient(server: Server) -> Iterator[openai.OpenAI]:
    with server.client(strict=False) as client:
        yield client


def test_continues_a_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt="a b")
    assert answer.id.startswith("cmpl-")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("a b", "stop")


def test_generates_sixteen_tokens_unless_told(client: openai.OpenAI) -> None:
    prompt = " ".join(str(i) for i in range(30))
    assert client.completions.create(model="echo", prompt=prompt).usage.completion_tokens == 16
    assert client.completions.create(model="echo", prompt=prompt, max_tokens=20).usage.completion_tokens == 20
    assert client.completions.create(model="echo", prompt=prompt, max_tokens=0).choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (["a", "b c"], ["a", "a", "b c", "b c"]),
        ([1, 2], ["<1> <2>".replace(" ", "")] * 2),
        ([[1], [2, 3]], ["<1>", "<1>", "<2><3>", "<2><3>"]),
    ],
)
def test_choice_index_is_prompt_times_n_plus_candidate(
    client: openai.OpenAI, lenient: openai.OpenAI, prompt: list[object], texts: list[str]
) -> None:
    answer = client.completions.create(model="echo", prompt=prompt, n=2)
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))
    assert [choice.text.replace(" ", "") for choice in answer.choices] == [text.replace(" ", "") for text in texts]
    streamed = [""] * len(texts)
    for chunk in lenient.completions.create(model="echo", prompt=prompt, n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in answer.choices]


def test_usage_adds_up_over_prompts_and_requests_have_ids_of_their_own(
    server: Server, client: openai.OpenAI, lenient: openai.OpenAI
) -> None:
    answer = client.completions.create(model="echo", prompt=["a", "b c"], stream=False)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (14, 3)
    assert len({request.request_id for request in server.models.requests}) == 2
    *_, last = lenient.completions.create(model="echo", prompt=["a", "b c"], stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.total_tokens == 17


def test_echo_repeats_the_prompt_before_the_answer(client: openai.OpenAI, lenient: openai.OpenAI) -> None:
    assert client.completions.create(model="echo", prompt="a b", echo=True).choices[0].text == "a ba b"
    chunks = lenient.completions.create(model="echo", prompt="a b", echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "a ba b"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_in_the_old_form(client: openai.OpenAI, lenient: openai.OpenAI, stream: bool) -> None:
    answer = (lenient if stream else client).completions.create(model="echo", prompt="né ß", logprobs=2, stream=stream)
    parts = [c.choices[0].logprobs for c in answer if c.choices[0].text] if stream else [answer.choices[0].logprobs]
    assert [t for part in parts for t in part.tokens] == ["né", " ß"]
    assert [o for part in parts for o in part.text_offset] == [0, 2]
    assert [p for part in parts for p in part.token_logprobs] == [-0.5, -0.5]
    assert [sorted(top) for part in parts for top in part.top_logprobs] == [["né", "né1"], [" ß", " ß1"]]


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("suffix", {"suffix": "x"}),
        ("best_of", {"best_of": 3, "n": 2}),
        ("echo", {"echo": True, "logprobs": 1}),
        ("echo", {"echo": True, "prompt": [1, 2]}),
        ("logprobs", {"logprobs": 6}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": ["a", 1]}),
        ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": [-1]}),
        ("prompt", {"prompt": ["a"] * 129}),
        ("prompt", {"prompt": None}),
    ],
)
def test_bad_values_are_named(client: openai.OpenAI, param: str, body: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/completions", body={"model": "echo", "prompt": "a", **body}, cast_to=object)
    assert refused.value.param == param


def test_lists_and_retrieves_models(client: openai.OpenAI) -> None:
    assert [(m.id, m.created, m.owned_by) for m in client.models.list()] == [("echo", 1_700_000_000, "mmaas")]
    assert client.models.retrieve("echo").id == "echo"
    for name in ("none", "org/none", "ft:a:b"):
        with pytest.raises(openai.NotFoundError) as missing:
            client.models.retrieve(name)
        assert missing.value.code == "model_not_found"
        assert "echo" in missing.value.message


def test_adapters_are_listed_with_their_base_and_answer_by_their_name(server: Server, client: openai.OpenAI) -> None:
    server.models.adapted = [Adapter("echo", "german", "0" * 64, 1_700_000_001.0)]
    assert [(m.id, getattr(m, "parent", None)) for m in client.models.list()] == [("echo", None), ("echo:german", "echo")]
    assert client.models.retrieve("echo:german").created == 1_700_000_001
    answer = client.completions.create(model="echo:german", prompt="a b")
    assert (answer.model, answer.choices[0].text) == ("echo:german", "a b")


@pytest.mark.parametrize(
    "name", ["echo:french", "echo:", ":german", "echo:german:german", "german", "echo:../german", "ECHO:german"]
)
def test_an_adapter_that_nobody_added_is_a_model_that_does_not_exist(server: Server, client: openai.OpenAI, name: str) -> None:
    server.models.adapted = [Adapter("echo", "german", "0" * 64)]
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model=name, prompt="a b")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
