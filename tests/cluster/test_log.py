from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextvars import copy_context
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import log


@pytest.fixture
def output() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    stream = io.StringIO()
    log.configure("INFO", stream)
    yield stream
    root.handlers, root.level = before, level


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_record_is_one_json_object_with_bound_and_extra_fields(output: io.StringIO) -> None:
    with log.bind(request_id="r1", tenant="acme"), log.bind(model="chat"):
        logging.getLogger("here").warning("took %d", 3, extra={"tokens": 7})
    logging.getLogger("here").info("after")
    first, second = lines(output)
    wanted = {"level": "WARNING", "logger": "here", "message": "took 3", "request_id": "r1", "model": "chat", "tokens": 7}
    assert wanted.items() <= first.items()
    assert "request_id" not in second


def test_extra_fields_never_replace_the_message(output: io.StringIO) -> None:
    with log.bind(level="DEBUG", logger="forged"):
        logging.getLogger("real").info("text")
    assert lines(output)[0]["logger"] == "real"


def test_exception_is_in_the_record(output: io.StringIO) -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("here").exception("failed")
    assert "ValueError: broken" in lines(output)[0]["exception"]


def test_configuring_twice_writes_once(output: io.StringIO) -> None:
    log.configure("INFO", output)
    logging.getLogger("here").info("once")
    assert len(lines(output)) == 1


@given(st.text())
def test_no_text_can_forge_a_line_or_steer_a_terminal(text: str) -> None:
    record = logging.LogRecord("name", logging.INFO, "", 0, text, None, None)
    line = log.JsonFormatter().format(record)
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["message"] == text


async def test_tasks_do_not_see_each_others_fields(output: io.StringIO) -> None:
    async def work(name: str) -> str:
        with log.bind(request_id=name):
            await asyncio.sleep(0)
            return str(log.bound()["request_id"])

    assert await asyncio.gather(*(work(name) for name in "abc")) == ["a", "b", "c"]


async def test_a_stream_closed_from_another_context_leaves_no_error() -> None:
    async def stream() -> AsyncIterator[int]:
        with log.bind(request_id="r1"):
            yield 1
            yield 2

    items = stream()
    await anext(items)
    close = asyncio.create_task(items.aclose(), context=copy_context())  # type: ignore[attr-defined]
    await close
