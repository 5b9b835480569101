"""A replica of a tabular model, without Serve: answers, batches, versions, sleep."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import InvalidRequest, ModelNotSupported, NotFound, Overloaded
from cluster.settings import Settings
from cluster.types import Deployment, Encode, Generate
from deployments import encoder, predictor
from deployments.predict.tensors import array_of
from tests.deployments.predict.tables import FLOWERS, answer, flowers, irises, replica, tensor


async def test_everybody_gets_the_answers_to_its_own_rows(iris: Path) -> None:
    made, model = await replica(iris), irises()
    sizes = [1, 3, 300, 2, 1000, 7] * 5
    asked = [FLOWERS[np.arange(start, start + size) % 150] for start, size in enumerate(sizes)]
    found = await asyncio.gather(
        *(answer(made, tensor("input-0", "FP64", rows), tenant=f"t{n % 3}") for n, rows in enumerate(asked))
    )
    for rows, one in zip(asked, found, strict=True):
        assert [tensor.name for tensor in one.outputs] == ["predict", "predict_proba"]
        np.testing.assert_allclose(array_of(one.outputs[1]), model.predict_proba(rows), rtol=1e-12)
        assert (one.rows, one.version) == (len(rows), "3")
    stats = await made.stats()
    assert stats["predicted_rows"] == sum(sizes)
    assert stats["steps"] < len(sizes), "calls that came together were computed together"
    assert sum(one.usage.compute_us for one in found) == round(stats["attributed_s"] * 1e6)
    assert stats["attributed_s"] == pytest.approx(stats["busy_s"], abs=1.1e-6), "and they share the time of every step"
    await made.close()


async def test_outputs_come_as_asked_for(iris: Path) -> None:
    made = await replica(iris)
    found = await answer(made, flowers(), outputs=("predict_proba", "predict"))
    assert [tensor.name for tensor in found.outputs] == ["predict_proba", "predict"]
    with pytest.raises(InvalidRequest, match="predict_log_proba"):
        await answer(made, flowers(), outputs=("predict_log_proba",))
    await made.close()


async def test_another_version_is_not_there(iris: Path) -> None:
    made = await replica(iris)
    assert (await answer(made, flowers(), version="3")).rows == 3
    with pytest.raises(NotFound, match="version 3"):
        await answer(made, flowers(), version="2")
    await made.close()


async def test_asleep_it_holds_no_model_and_a_call_wakes_it(iris: Path) -> None:
    made = await replica(iris)
    await made.sleep()
    assert made._table is None
    assert (await made.info())["asleep"]
    assert (await answer(made, flowers())).rows == 3
    assert not (await made.info())["asleep"]
    await made.sleep()
    await made.wake()
    assert not (await made.info())["asleep"]
    await made.close()


async def test_what_others_are_for_is_refused_with_the_right_call(iris: Path) -> None:
    made = await replica(iris)
    with pytest.raises(ModelNotSupported, match="/v2/models/iris/infer"):
        await anext(made.generate(Generate("r", "t", prompt="x")))
    with pytest.raises(ModelNotSupported, match="/v2/models/iris/infer"):
        await anext(made.encode(Encode("r", "t", "embed", texts=("x",))))
    await made.close()


async def test_more_than_the_queue_holds_is_told_to_come_back(iris: Path) -> None:
    made = await replica(iris, max_queued_rows=1000)
    rows = tensor("input-0", "FP64", np.tile(FLOWERS, (6, 1)))
    found = await asyncio.gather(*(answer(made, rows) for _ in range(8)), return_exceptions=True)
    refused = [one for one in found if isinstance(one, Overloaded)]
    assert refused
    assert refused[0].retry_after_s
    assert len(refused) + sum(not isinstance(one, BaseException) for one in found) == 8
    await made.close()


async def test_who_leaves_takes_its_rows_along(iris: Path) -> None:
    made = await replica(iris)
    bulk = asyncio.ensure_future(answer(made, tensor("input-0", "FP64", np.tile(FLOWERS, (400, 1)))))
    async with asyncio.timeout(10):
        while not (await made.stats())["streams"]:  # noqa: ASYNC110 - nobody tells when a call is in the queue
            await asyncio.sleep(0)
    bulk.cancel()
    await asyncio.gather(bulk, return_exceptions=True)
    stats = await made.stats()
    assert (stats["waiting"], stats["streams"], stats["aborted"]) == (0, 0, 1)
    assert (await answer(made, flowers())).rows == 3
    await made.close()


def test_serve_takes_the_options_of_one_process_replicas(iris: Path) -> None:
    wanted = Deployment("iris", str(iris), max_replicas=3)
    for application in (
        predictor.build(wanted, str(iris), "digest", "1", b"secret", Settings()),
        encoder.build(wanted, str(iris), "digest", b"secret", Settings()),
    ):
        assert application._bound_deployment._deployment_config.autoscaling_config.max_replicas == 3
