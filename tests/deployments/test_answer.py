"""One answer's text from its tokens, with a real byte-level tokenizer."""

from __future__ import annotations

import pytest

from cluster.types import Chunk, Sampling, Usage
from deployments.answer import Answer
from deployments.engine.messages import Output, Request
from deployments.engine.tokenizer import Tokenizer
from tests.deployments.engine.families import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 256}')
    return Tokenizer.load(directory)


def feed(
    tokenizer: Tokenizer, text: str, *, step: int = 1, stop: tuple[str, ...] = (), n: int = 1, cost_us: int = 0
) -> tuple[list[Chunk], list[int]]:
    """The chunks of an answer `text` that arrives `step` tokens at a time, each for `cost_us`, and which choices were stopped."""
    stopped: list[int] = []
    request = Request(1, tokenizer.encode("hello"), Sampling(stop=stop, n=n), 1000, [], 0)
    answer = Answer(tokenizer, request, is_chat=True, stop_choice=stopped.append)
    tokens = tokenizer.encode(text)
    chunks = []
    for start in range(0, len(tokens), step):
        last = start + step >= len(tokens)
        outputs = [
            Output(
                *(1, index, token),
                finish_reason="length" if last and place == len(tokens[start : start + step]) - 1 else None,
                cached=3 if start + place == 0 else 0,
                compute_us=cost_us * (start + place + 1),
            )
            for index in range(n)
            for place, token in enumerate(tokens[start : start + step])
        ]
        chunks.append(answer.take(outputs))
    return chunks, stopped


def text_of(chunks: list[Chunk], index: int = 0) -> str:
    return "".join(delta.text for chunk in chunks for delta in chunk.deltas if delta.index == index)


@pytest.mark.parametrize("step", [1, 3, 100])
def test_text_is_whole_however_it_arrives(tokenizer: Tokenizer, step: int) -> None:
    text = "naïve 日本語 🙂 ok"
    chunks, _ = feed(tokenizer, text, step=step)
    assert text_of(chunks) == text
    assert not any("�" in delta.text for chunk in chunks for delta in chunk.deltas)


@pytest.mark.parametrize("step", [1, 4, 100])
def test_stop_string_cuts_the_text_and_stops_the_choice(tokenizer: Tokenizer, step: int) -> None:
    chunks, stopped = feed(tokenizer, "one two STOP three four five", step=step, stop=("STOP",))
    assert text_of(chunks) == "one two "
    final = next(chunk for chunk in chunks if chunk.usage)
    assert final.deltas[-1].finish_reason == "stop"
    assert stopped == ([0] if step < 100 else []), "a choice that has finished by itself needs no stopping"
    assert not any(chunk.deltas for chunk in chunks[chunks.index(final) + 1 :]), "nothing comes after the end"


def test_usage_counts_the_tokens_that_were_used(tokenizer: Tokenizer) -> None:
    chunks, _ = feed(tokenizer, "abc", n=2)
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage == Usage(len(tokenizer.encode("hello")), 2 * len(tokenizer.encode("abc")), cached_tokens=3)


@pytest.mark.parametrize("step", [1, 100])
def test_the_first_chunk_alone_says_what_the_prompt_takes(tokenizer: Tokenizer, step: int) -> None:
    chunks, _ = feed(tokenizer, "abc", n=3, step=step)
    assert [chunk.begun for chunk in chunks] == [Usage(len(tokenizer.encode("hello")), 0, 3)] + [None] * (len(chunks) - 1)


def test_compute_adds_up_over_chunks_and_choices(tokenizer: Tokenizer) -> None:
    chunks, _ = feed(tokenizer, "one two STOP three four five", n=2, cost_us=10)
    usage, tokens = chunks[-1].usage, len(tokenizer.encode("one two STOP three four five"))
    assert usage is not None
    assert [chunk.compute_us for chunk in chunks] == [20] * tokens
    assert usage.compute_us == 20 * tokens


def test_an_answer_that_stops_itself_has_cost_what_it_took_until_then(tokenizer: Tokenizer) -> None:
    chunks, _ = feed(tokenizer, "one two STOP three four five", stop=("STOP",), cost_us=10)
    end = next(place for place, chunk in enumerate(chunks) if chunk.usage)
    usage = chunks[end].usage
    assert usage is not None
    assert usage.compute_us == sum(chunk.compute_us for chunk in chunks) == 10 * (end + 1)


def test_held_back_text_comes_with_the_end(tokenizer: Tokenizer) -> None:
    chunks, _ = feed(tokenizer, "say ST", stop=("STOP",))
    assert text_of(chunks) == "say ST"
    assert chunks[-1].deltas[-1].finish_reason == "length"
