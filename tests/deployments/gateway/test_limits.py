from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidRequest, PayloadTooLarge
from deployments.gateway.errors import ClientGone, RequestTooSlow
from deployments.gateway.limits import decode_json, read_body, through_json

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), values))
def test_json_means_what_it_means_everywhere(tree: dict[str, object]) -> None:
    assert decode_json(json.dumps(tree).encode(), 64) == tree
    assert through_json(tree, 1 << 20, 64) == tree


@given(st.integers(1, 200))
def test_depth_is_counted_exactly(depth: int) -> None:
    raw = b'{"a":' + b"[" * (depth - 1) + b'"[[["' + b"]" * (depth - 1) + b"}"
    if depth <= 64:
        decode_json(raw, 64)
    else:
        with pytest.raises(InvalidRequest, match="deeper"):
            decode_json(raw, 64)


def test_brackets_and_digits_inside_strings_do_not_count() -> None:
    text = "[{" * 1000 + "9" * 30
    assert decode_json(json.dumps({"a": text}).encode(), 64) == {"a": text}


@pytest.mark.parametrize("number", [1 << 63, -(1 << 63) - 1, 10**400])
def test_integers_beyond_64_bits_are_refused(number: int) -> None:
    with pytest.raises(InvalidRequest):
        decode_json(b'{"a":[[%d]]}' % number, 64)


def test_objects_from_a_handle_are_held_to_the_same_bounds() -> None:
    endless: list[object] = []
    endless.append(endless)
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for tree in ({"a": float("nan")}, {"a": b"x"}, {"a": endless}, {"a": deep}, {"a": "\ud800"}, {"a": 1 << 70}, [1], "x", None):
        with pytest.raises(InvalidRequest):
            through_json(tree, 1 << 20, 64)
    with pytest.raises(PayloadTooLarge):
        through_json({"a": "x" * 100}, 100, 64)


async def test_a_body_is_read_to_its_end_and_no_further() -> None:
    parts = iter([(b"ab", True), (b"cd", True), (b"", False), (b"not ours", False)])

    async def receive() -> dict[str, object]:
        body, more = next(parts)
        return {"type": "http.request", "body": body, "more_body": more}

    assert await read_body(receive, 4, 1) == b"abcd"
    with pytest.raises(PayloadTooLarge):
        await read_body(receive, 4, 1)


async def test_a_body_that_stops_or_dribbles_is_given_up() -> None:
    import asyncio

    async def gone() -> dict[str, object]:
        return {"type": "http.disconnect"}

    async def dribble() -> dict[str, object]:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    with pytest.raises(ClientGone):
        await read_body(gone, 10, 1)
    with pytest.raises(RequestTooSlow):
        await read_body(dribble, 1000, seconds=0.1)
