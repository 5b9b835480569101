"""The packaged encoder on the running platform: from the library to an answer over HTTP and over a handle's door."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import openai
import pytest

from mmaas.client import connect
from pipelines import packaged
from tests.e2e.platform import MODEL, RunningPlatform

pytestmark = [pytest.mark.e2e]


@pytest.fixture(scope="module")
def served(platform: RunningPlatform) -> Iterator[RunningPlatform]:
    assert packaged.register(platform.settings).ref == packaged.register(platform.settings).ref, "the second time it is there"
    platform.mmaas("deploy", "minilm", "--model", str(packaged.ENCODER))
    yield platform
    platform.mmaas("undeploy", "minilm")


def test_minilm_answers_with_embeddings_that_mean_something(served: RunningPlatform) -> None:
    texts = ["How do I split a string?", "str.split returns a list of words", "Cats sleep most of the day"]
    with served.client() as client:
        answer = client.embeddings.create(model="minilm", input=texts, encoding_format="float")
    vectors = np.array([item.embedding for item in answer.data])
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
    assert answer.usage.prompt_tokens == 28
    with connect(base_url=served.quickstart["base_url"], api_key=served.quickstart["api_key"]) as ours:
        ranking = ours.rerank(model="minilm", query=texts[0], documents=texts[1:])
        assert [result.index for result in ranking.results] == [0, 1]


def test_each_kind_of_model_says_what_the_other_is_for(served: RunningPlatform) -> None:
    with served.client() as client:
        with pytest.raises(openai.BadRequestError, match="an encoder, which makes embeddings") as refused:
            client.chat.completions.create(model="minilm", messages=[{"role": "user", "content": "x"}])
        assert refused.value.code == "model_not_supported"
        with pytest.raises(openai.BadRequestError, match="is a language model") as refused:
            client.embeddings.create(model=MODEL, input="x", encoding_format="float")
        assert refused.value.code == "model_not_supported"
        with pytest.raises(openai.BadRequestError, match="256 tokens") as refused:
            client.embeddings.create(model="minilm", input="word " * 300, encoding_format="float")
        assert refused.value.code == "context_length_exceeded"


def test_encoders_count_what_they_do(served: RunningPlatform) -> None:
    with served.client() as client:
        client.embeddings.create(model="minilm", input=["one", "two"], encoding_format="float")
    assert served.counters(model="minilm", prefix="mmaas_encoder_")["rows_total"] >= 2
