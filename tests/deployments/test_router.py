"""How the desired state is read, and what becomes of a call. Calls of real replicas are in test_serve.py."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from cluster.errors import ModelNotFound, Unavailable
from cluster.types import Adapter, Chunk, Delta, Generate, Predict, Predicted, Usage
from deployments.models import Facts
from deployments.router import FACTS_S, ServeModels, summed
from tests.fakes import ECHO


async def test_the_desired_state_is_read_once_a_second() -> None:
    reads, now = [], [0.0]
    models = ServeModels(lambda: reads.append(1) or [ECHO], clock=lambda: now[0])
    for now[0] in (0.0, 0.5, 0.99, 1.0, 1.5):
        assert await models.list() == [ECHO]
    assert len(reads) == 2


class Answering:
    """Stands for a handle and its response: two chunks, then an end of the call that takes its time."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.may_end, self.is_over, self.cancelled = error, asyncio.Event(), False, False
        self.generate = self
        self.asked: list[Generate] = []

    def options(self, **_: object) -> Answering:
        return self

    def remote(self, request: Generate) -> Answering:
        self.asked.append(request)
        return self

    def cancel(self) -> None:
        self.cancelled = True

    async def _fetch_future_result_async(self) -> None:
        self.chunks = iter((Chunk((Delta(0, "a"),)), Chunk((Delta(0, "b", finish_reason="stop"),), Usage(1, 2))))

    def __aiter__(self) -> Answering:
        return self

    async def __anext__(self) -> Chunk:
        for chunk in self.chunks:
            return chunk
        await self.may_end.wait()
        self.is_over = True
        raise self.error or StopAsyncIteration


def models_with(handle: Answering) -> ServeModels:
    models = ServeModels(lambda: [ECHO])
    models._handles._handles["echo"] = handle
    return models


def test_replicas_add_up_and_the_oldest_says_since_when() -> None:
    replicas = [{"steps": 3, "held_s": 10.0, "pids": [1]}, {"steps": 4, "held_s": 2.5, "pids": [2]}]
    assert summed(replicas) == {"steps": 7, "held_s": 12.5, "oldest_s": 10.0}
    assert summed([{"steps": 3}]) == {"steps": 3}
    assert summed([]) == {}


@pytest.mark.parametrize("error", [None, ActorDiedError()])
async def test_nobody_waits_for_the_end_of_a_call_whose_last_chunk_has_come(error: Exception | None) -> None:
    answering = Answering(error)
    models = models_with(answering)
    async with asyncio.timeout(5):
        texts = [chunk.deltas[0].text async for chunk in models.generate("echo", Generate("r", "t", prompt="x"))]
        assert (texts, answering.is_over) == (["a", "b"], False)
        answering.may_end.set()
        await asyncio.gather(*models._handles._ending)
    assert answering.is_over
    assert not answering.cancelled


async def test_a_caller_who_leaves_before_the_last_chunk_cancels_the_call() -> None:
    answering = Answering()
    stream = models_with(answering).generate("echo", Generate("r", "t", prompt="x"))
    await anext(stream)
    await stream.aclose()
    assert answering.cancelled


async def test_an_unknown_model_is_told_with_what_there_is() -> None:
    with pytest.raises(ModelNotFound, match="echo"):
        await anext(ServeModels(lambda: [ECHO]).generate("other", Generate("r", "t", prompt="x")))


async def test_an_adapter_is_asked_of_its_base_and_only_while_that_is_served() -> None:
    german, orphan = Adapter("echo", "german", "0" * 64), Adapter("gone", "german", "0" * 64)
    models = ServeModels(lambda: [ECHO], lambda: [german, orphan])
    models._handles._handles["echo"] = answering = Answering()
    answering.may_end.set()
    assert await models.adapters() == [german]
    asked = Generate("r", "t", prompt="x")
    assert [chunk.deltas[0].text async for chunk in models.generate("echo:german", asked)] == ["a", "b"]
    assert answering.asked == [replace(asked, adapter=german)]
    for name in ("echo:french", "gone:german", "echo:"):
        with pytest.raises(ModelNotFound, match="echo"):
            await anext(models.generate(name, asked))


class Telling:
    """Stands for a handle whose replica tells facts of itself."""

    def __init__(self) -> None:
        self.digest, self.times, self.error = "v1", 0, None
        self.info = self

    async def remote(self) -> dict[str, object]:
        self.times += 1
        if self.error is not None:
            raise self.error
        return {"digest": self.digest, "max_model_len": 256}


async def test_facts_are_a_second_old_asked_beside_the_calls_and_of_nobody_when_too_old() -> None:
    now, telling = [0.0], Telling()
    german = Adapter("echo", "german", "a" * 64)
    models = ServeModels(lambda: [ECHO], lambda: [german], clock=lambda: now[0])
    models._handles._handles["echo"] = telling
    assert await asyncio.gather(*(models.facts("echo") for _ in range(9))) == [Facts("v1", 256)] * 9
    assert await models.facts("echo:german") == Facts(f"v1:{german.address}", 256)
    assert telling.times == 1
    now[0], telling.digest = 1.0, "v2"
    assert await models.facts("echo") == Facts("v1", 256)
    await asyncio.sleep(0.01)
    assert await models.facts("echo") == Facts("v2", 256)
    now[0], telling.error = 1.0 + FACTS_S, ValueError("away")
    assert await models.facts("echo") is None
    with pytest.raises(ModelNotFound):
        await models.facts("nobody")


class Tensors:
    """Stands for a handle whose model tells of itself and predicts."""

    def __init__(self, **info: object) -> None:
        self.known, self.info, self.predict = info, self, self
        self.asked: list[Predict] = []

    def options(self, **_: object) -> Tensors:
        return self

    def remote(self, *request: Predict) -> Any:
        self.asked += request
        return self if request else self._info()

    async def _info(self) -> dict[str, object]:
        return self.known

    async def _fetch_future_result_async(self) -> None:
        self.items = iter([Predicted((), 3, "7")])

    def __aiter__(self) -> Tensors:
        return self

    async def __anext__(self) -> Predicted:
        for item in self.items:
            return item
        raise StopAsyncIteration


async def test_a_model_of_tensors_is_asked_and_tells_of_itself() -> None:
    models = ServeModels(lambda: [ECHO])
    models._handles._handles["echo"] = telling = Tensors(library_version="7", asleep=True)
    asked = Predict("r", "t", ())
    assert (await models.predict("echo", asked)).rows == 3
    assert telling.asked == [asked]
    assert (await models.info("echo"))["library_version"] == "7"
    assert await models.asleep() == ["echo"]
    for call in (models.info("other"), models.predict("other", asked)):
        with pytest.raises(ModelNotFound, match="echo"):
            await call
    models._probed = (float("inf"), {"echo": False})
    with pytest.raises(Unavailable):
        await models.info("echo")
