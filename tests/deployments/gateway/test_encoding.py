"""Embeddings, reranking and classification over HTTP: the official client, LangChain's, and what is refused."""

from __future__ import annotations

import base64
import struct

import httpx
import openai
import pytest

from cluster.errors import ModelNotSupported
from deployments.gateway.openai import encoding
from mmaas.client import connect
from tests.deployments.gateway.conftest import Server, eventually, serving
from tests.fakes import KeyRing


def post(http: httpx.Client, path: str, **body: object) -> httpx.Response:
    return http.post(f"/v1/{path}", json={"model": "echo", **body})


def test_official_client_gets_the_same_numbers_in_both_encodings(server: Server, client: openai.OpenAI) -> None:
    with server.client(strict=False) as lax:  # its strict mode doesn't know the base64 that it asks for by itself
        by_default = lax.embeddings.create(model="echo", input=["one two", "three"])
    as_floats = client.embeddings.create(model="echo", input=["one two", "three"], encoding_format="float")
    assert [item.embedding for item in by_default.data] == [[7, 2, 0], [5, 1, 1]]
    assert [item.embedding for item in as_floats.data] == [item.embedding for item in by_default.data]
    assert [item.index for item in by_default.data] == [0, 1]
    assert (as_floats.model, as_floats.usage.prompt_tokens, as_floats.usage.total_tokens) == ("echo", 12, 12)


def test_base64_is_little_endian_float32(http: httpx.Client) -> None:
    (item,) = post(http, "embeddings", input="one", encoding_format="base64").json()["data"]
    assert base64.b64decode(item["embedding"]) == struct.pack("<3f", 3, 1, 0)


def test_float_is_the_default_of_the_api_itself(http: httpx.Client) -> None:
    assert post(http, "embeddings", input="one").json()["data"] == [{"object": "embedding", "index": 0, "embedding": [3, 1, 0]}]


@pytest.mark.parametrize(("given", "rows"), [([5, 6, 7], 1), ([[5, 6], [7]], 2), ("text", 1), (["a", "b", "c"], 3)])
def test_text_ids_and_lists_of_both(server: Server, http: httpx.Client, given: object, rows: int) -> None:
    assert len(post(http, "embeddings", input=given).json()["data"]) == rows
    asked = server.models.encoded[-1]
    assert len(asked.texts or asked.ids) == rows
    assert asked.tenant == "acme"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["x", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [1, "x"]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [True]}, "input"),
        ({"input": None}, "input"),
        ({}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "dimensions": "8"}, "dimensions"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": [5], "prompt_name": "query"}, "prompt_name"),
    ],
)
def test_what_can_not_be_meant_names_the_field(http: httpx.Client, body: dict[str, object], param: str) -> None:
    answer = post(http, "embeddings", **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_two_thousand_and_forty_eight_inputs_are_taken(http: httpx.Client) -> None:
    answer = post(http, "embeddings", input=["x y"] * 2048, encoding_format="base64").json()
    assert [item["index"] for item in answer["data"]] == list(range(2048))


def test_ranking_is_best_first_and_bounded(http: httpx.Client) -> None:
    documents = ["nothing", "one", {"text": "two one"}]
    ranked = post(http, "rerank", query="one two", documents=documents, return_documents=True, top_n=2).json()
    assert ranked["results"] == [
        {"index": 2, "relevance_score": 1.0, "document": {"text": "two one"}},
        {"index": 1, "relevance_score": 0.5, "document": {"text": "one"}},
    ]
    plain = post(http, "rerank", query="one two", documents=documents).json()
    assert [(result["index"], "document" in result) for result in plain["results"]] == [(2, False), (1, False), (0, False)]
    assert ranked["id"].startswith("rerank-")


@pytest.mark.parametrize(
    "body", [{"query": "", "documents": ["x"]}, {"query": "x", "documents": []}, {"query": "x", "documents": [""]}]
)
def test_a_ranking_needs_words_on_both_sides(http: httpx.Client, body: dict[str, object]) -> None:
    assert post(http, "rerank", **body).status_code == 400


def test_labels_with_their_probabilities(http: httpx.Client) -> None:
    answer = post(http, "classify", input=["ab", "abcdefgh"]).json()
    assert [(item["label"], item["probs"], item["num_classes"]) for item in answer["data"]] == [
        ("short", [0.75, 0.25], 2),
        ("long", [0.0, 1.0], 2),
    ]


def test_unknown_models_and_the_wrong_kind_are_told(server: Server, http: httpx.Client) -> None:
    assert http.post("/v1/embeddings", json={"model": "none", "input": "x"}).json()["error"]["code"] == "model_not_found"
    server.models.error = ModelNotSupported("echo is a language model: ask it for chat.", param="model")
    try:
        answer = post(http, "embeddings", input="x")
    finally:
        server.models.error = None
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_not_supported")


def test_a_key_without_the_scope_is_refused(server: Server) -> None:
    with server.http("mk_no_scope_012345") as http:
        assert {post(http, path, input="x").status_code for path in ("embeddings", "rerank", "classify")} == {403}


def test_hanging_up_cancels_the_work_and_a_deadline_ends_it() -> None:
    with serving(max_stream_s=0.3) as server, server.http() as http:
        server.models.first_delay_s = 30
        assert post(http, "embeddings", input="x").status_code == 504
        eventually(lambda: server.models.open == 0)
    with serving() as server, server.http() as http:
        server.models.first_delay_s = 30
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/embeddings", json={"model": "echo", "input": "x"}, timeout=0.3)
        eventually(lambda: server.models.open == 0)


def test_langchains_client_works_as_it_comes(server: Server) -> None:
    embeddings = pytest.importorskip("langchain_openai").OpenAIEmbeddings(
        model="echo", base_url=f"{server.url}/v1", api_key=KeyRing.USER, check_embedding_ctx_length=False
    )
    assert embeddings.embed_query("one two") == [7, 2, 0]
    assert embeddings.embed_documents(["one", "three"]) == [[3, 1, 0], [5, 1, 1]]


def test_our_client_speaks_all_three(server: Server) -> None:
    with connect(base_url=server.url, api_key=KeyRing.USER) as client:
        assert [item.embedding for item in client.embeddings.create(model="echo", input=["one two"]).data] == [[7, 2, 0]]
        assert client.rerank(model="echo", query="a", documents=["b", "a"], top_n=1).results[0].index == 1
        assert client.classify(model="echo", input="abcdefgh").data[0].label == "long"


def test_the_document_describes_them(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/embeddings", "/v1/rerank", "/v1/classify"} <= paths.keys()
    schema = paths["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"input", "encoding_format", "dimensions"} <= schema["properties"].keys()


def test_the_bound_is_openais() -> None:
    assert encoding.MAX_INPUTS == 2048
