"""Real weights: all-MiniLM-L6-v2 as it is served, beside sentence-transformers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import ContextLengthExceeded, InvalidRequest, ModelNotSupported
from cluster.types import Encode
from deployments.encode.batcher import Batcher
from deployments.encode.inspection import EncoderInfo, inspect
from deployments.encode.loading import Model, load
from deployments.encode.tasks import Tasks, unit
from pipelines import packaged

TEXTS = [
    "a",
    "How do I split a string?",
    "Größe, façade, naïve, 東京, привет, 😀",
    "  odd   spacing\tand\nlines  ",
    "str.split(sep=None, maxsplit=-1) returns a list of the words in the string, using sep as the delimiter string. " * 4,
    "word " * 250,
    "[CLS] is only text to this one [SEP] and so is [MASK]",
    *[f"{'the quick brown fox jumps ' * (n % 9)}over {n} dogs" for n in range(40)],
]


@pytest.fixture(scope="module")
def info() -> EncoderInfo:
    return inspect(packaged.files(), tp=1, dtype="float32")


@pytest.fixture(scope="module")
def model(info: EncoderInfo, cache: Path) -> Model:
    return load(packaged.files(), info, threads=2, native=True, cache=cache)


@pytest.fixture(scope="module")
def tasks(info: EncoderInfo) -> Tasks:
    return Tasks(packaged.files(), info)


@pytest.fixture(scope="module")
def reference() -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(packaged.files()), device="cpu")


def asked(*texts: str, **more: Any) -> Encode:
    return Encode("r", "acme", **{"task": "embed", "texts": texts, **more})


def test_embeddings_are_those_of_sentence_transformers(model: Model, tasks: Tasks, reference: Any) -> None:
    found = model.run(tasks.rows(asked(*TEXTS)))
    expected = reference.encode(TEXTS)
    assert (found * expected).sum(axis=1).min() >= 0.9999
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_tokens_are_those_of_sentence_transformers(tasks: Tasks, reference: Any) -> None:
    for row, text in zip(tasks.rows(asked(*TEXTS)), TEXTS, strict=True):
        assert row.ids.tolist() == reference.tokenizer(text)["input_ids"]


def test_a_row_is_the_same_alone_and_in_any_batch(model: Model, tasks: Tasks) -> None:
    rows = tasks.rows(asked(*TEXTS))
    together = model.run(rows)
    alone = np.concatenate([model.run([row]) for row in rows])
    assert np.abs(together - alone).max() < 1e-6
    backwards = model.run(rows[::-1])[::-1]
    assert np.abs(together - backwards).max() < 1e-6


def test_token_ids_are_this_models_own(model: Model, tasks: Tasks, reference: Any) -> None:
    ids = tuple(reference.tokenizer(TEXTS[1])["input_ids"])
    (found,) = model.run(tasks.rows(Encode("r", "acme", "embed", ids=(ids,))))
    np.testing.assert_allclose(found, model.run(tasks.rows(asked(TEXTS[1])))[0], atol=1e-6)
    with pytest.raises(InvalidRequest, match=r"0\.\.30521"):
        tasks.rows(Encode("r", "acme", "embed", ids=((101, 30522, 102),)))


def test_what_is_too_long_is_refused_or_cut_as_sentence_transformers_cuts(model: Model, tasks: Tasks, reference: Any) -> None:
    long = "many words " * 300
    with pytest.raises(ContextLengthExceeded, match=r"256 tokens, and an input has 602") as refused:
        tasks.rows(asked("short", long))
    assert refused.value.param == "input[1]"
    cut = tasks.rows(asked(long, "short", cut=-1))
    assert [len(row) for row in cut] == [256, 3]
    np.testing.assert_allclose(model.run(cut), reference.encode([long, "short"]), atol=1e-5)
    with pytest.raises(ContextLengthExceeded, match="characters"):
        tasks.rows(asked("x" * 300_000, cut=-1))


def test_reranking_is_by_cosine(model: Model, tasks: Tasks, reference: Any) -> None:
    call = asked("cats purr", "split a string into words", task="rerank", query="how do I split text?")
    scores = tasks.finish(call, model.run(tasks.rows(call)))[:, 0]
    expected = unit(reference.encode(list(call.texts))) @ unit(reference.encode(["how do I split text?"]))[0]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert scores[1] > scores[0] + 0.3


def test_what_this_model_does_not_offer_is_said(tasks: Tasks) -> None:
    for call, words in (
        (asked("x", dimensions=100), "384 dimensions and can't be cut"),
        (asked("x", prompt_name="query"), "no prompt of that name"),
        (asked("x", cut=257), "within 1 and 256"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            tasks.check(call, 384)
    with pytest.raises(ModelNotSupported, match="/v1/embeddings"):
        tasks.check(asked("x", task="classify"), 384)
    tasks.check(asked("x", dimensions=384), 384)


@pytest.fixture
async def batcher(model: Model) -> AsyncIterator[Batcher]:
    batcher = Batcher(model.run, model.width, target_s=0.02, limit=1 << 20)
    yield batcher
    await batcher.close()


async def test_a_single_row_passes_another_tenants_bulk(batcher: Batcher, tasks: Tasks) -> None:
    rows = tasks.rows(asked(*["some words of a document that is being indexed"] * 600))
    bulk = asyncio.ensure_future(batcher.encode(b"bulk", rows))
    await asyncio.sleep(0.05)
    await batcher.encode(b"other", tasks.rows(asked("a question")))
    assert not bulk.done(), "the row waited for all that was there before"
    assert batcher.stats["rows"] < 400
    bulk.cancel()
    await asyncio.gather(bulk, return_exceptions=True)
