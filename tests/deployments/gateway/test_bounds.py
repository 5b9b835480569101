"""What a call may take at most."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.types import Generate, Message, Sampling, Usage
from deployments.gateway.bounds import bound
from tests.fakes import echo_chunks


@given(
    st.lists(st.text(max_size=50), max_size=4), st.integers(1, 4), st.one_of(st.none(), st.integers(0, 200)), st.integers(1, 300)
)
def test_the_worst_case_is_never_passed(turns: list[str], n: int, most: int | None, room: int) -> None:
    """Against a tokenizer that makes a token of every byte, and a model that says all it may."""
    messages = tuple(Message("user", turn) for turn in turns)
    request = Generate("r", "t", messages, sampling=Sampling(max_tokens=most, n=n))
    prompt = sum(len(turn.encode()) for turn in turns)
    if prompt <= room:
        output = room - prompt if most is None else min(most, room - prompt)
        assert Usage(prompt, n * output).total_tokens <= bound([request], room).total


def test_a_prompt_of_the_tests_model_is_within_its_bound() -> None:
    request = Generate("r", "t", (Message("user", "one two three"),), sampling=Sampling(max_tokens=10))
    spent = next(chunk.usage for chunk in echo_chunks(request) if chunk.usage)
    assert spent.total_tokens <= bound([request], 8192).total
