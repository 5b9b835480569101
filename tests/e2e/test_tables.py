"""The first tabular model on the running platform, with Triton's client through HAProxy: from the library to an answer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from pipelines import iris
from tests.e2e.platform import MODEL, RunningPlatform

pytestmark = [pytest.mark.e2e]

FLOWERS = np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]])


@pytest.fixture(scope="module")
def served(platform: RunningPlatform) -> Iterator[RunningPlatform]:
    iris.register(platform.settings)
    platform.mmaas("deploy", "iris", "--model", str(iris.MODEL))
    yield platform
    platform.mmaas("undeploy", "iris")


@pytest.fixture
def client(served: RunningPlatform) -> Iterator[triton.InferenceServerClient]:
    address = served.settings.base_url.removeprefix("http://")
    with triton.InferenceServerClient(address) as client:
        yield client


def auth(served: RunningPlatform, key: str = "api_key") -> dict[str, str]:
    return {"Authorization": f"Bearer {served.quickstart[key]}"}


def flowers() -> triton.InferInput:
    given = triton.InferInput("input-0", [2, 4], "FP64")
    given.set_data_from_numpy(FLOWERS)
    return given


@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
def test_iris_answers_tritonclient(served: RunningPlatform, client: triton.InferenceServerClient, coding: str | None) -> None:
    packed = {"request_compression_algorithm": coding, "response_compression_algorithm": coding}
    found = client.infer("iris", [flowers()], headers=auth(served), **packed)
    assert found.as_numpy("predict").tolist() == [b"setosa", b"virginica"]
    assert found.as_numpy("predict_proba").shape == (2, 3)
    assert served.counters(model="iris", prefix="mmaas_predictor_")["rows_total"] >= 2


def test_unloaded_it_is_not_ready_and_a_call_loads_it(served: RunningPlatform, client: triton.InferenceServerClient) -> None:
    assert client.is_model_ready("iris", headers=auth(served))
    client.unload_model("iris", headers=auth(served, "admin_key"))
    assert not client.is_model_ready("iris", headers=auth(served))
    assert client.infer("iris", [flowers()], headers=auth(served)).as_numpy("predict").shape == (2,)


def test_a_language_model_is_listed_and_refuses_tensors(served: RunningPlatform, client: triton.InferenceServerClient) -> None:
    names = {one["name"]: one["state"] for one in client.get_model_repository_index(headers=auth(served))}
    assert names[MODEL] == "READY"
    with pytest.raises(InferenceServerException, match="is a language model"):
        client.infer(MODEL, [flowers()], headers=auth(served))
