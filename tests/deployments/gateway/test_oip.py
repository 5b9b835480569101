"""The Open Inference Protocol as tritonclient speaks it, as its specification has it, and as nobody should send it."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
import tritonclient.http as triton
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from cluster import errors as platform_errors
from cluster.types import Adapter
from deployments.gateway import calls
from deployments.gateway.oip import wire
from deployments.gateway.oip.routes import router
from tests.deployments.gateway.conftest import Server, eventually, serving
from tests.deployments.predict.tables import FLOWERS, NAMES, PEOPLE, TableModels
from tests.fakes import KeyRing

SPECIFICATION = yaml.safe_load((Path(__file__).parents[2] / "data" / "open_inference_rest.yaml").read_text())
# Copied for every call: tritonclient writes its own headers into those that it gets.
AUTH = {"Authorization": f"Bearer {KeyRing.USER}"}
ADMIN = {"Authorization": f"Bearer {KeyRing.ADMIN}"}
INFER = "/v2/models/iris/infer"
GOOD = {"inputs": [{"name": "input-0", "shape": [2, 4], "datatype": "FP64", "data": FLOWERS[:2].tolist()}]}


@pytest.fixture(scope="module")
def tables(iris: Path, people: Path) -> Iterator[Server]:
    with serving(TableModels(iris=iris, people=people)) as server:
        yield server


@pytest.fixture
def client(tables: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(tables.url.removeprefix("http://")) as client:
        yield client


@pytest.fixture
def http(tables: Server) -> Iterator[httpx.Client]:
    with tables.http() as http:
        yield http


def conforms(answer: Any, schema: str) -> Any:
    """The answer, after it was held against the published schema."""
    parts = SPECIFICATION["components"]["schemas"]
    jsonschema.Draft4Validator({"$ref": f"#/components/schemas/{schema}", "components": {"schemas": parts}}).validate(answer)
    return answer


def error_of(answer: httpx.Response, status: int = 400) -> str:
    """One string, on every answer that isn't a success."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    assert set(conforms(answer.json(), "inference_error_response")) == {"error"}
    assert isinstance(answer.json()["error"], str)
    return answer.json()["error"]


def flowers(rows: np.ndarray = FLOWERS, *, binary: bool = True) -> triton.InferInput:
    datatype = {"float64": "FP64", "float32": "FP32"}[str(rows.dtype)]
    given = triton.InferInput("input-0", list(rows.shape), datatype)
    given.set_data_from_numpy(rows, binary_data=binary)
    return given


def people_inputs(*, binary: bool) -> list[triton.InferInput]:
    inputs = []
    for name, datatype in (("age", "FP64"), ("city", "BYTES"), ("visits", "INT64"), ("member", "BOOL")):
        values = PEOPLE[name].to_numpy(object if datatype == "BYTES" else None)
        given = triton.InferInput(name, [len(values)], datatype)
        given.set_data_from_numpy(values, binary_data=binary)
        inputs.append(given)
    return inputs


@pytest.mark.parametrize("coding_out", [None, "gzip", "deflate"])
@pytest.mark.parametrize("coding_in", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_gets_its_answer_however_it_travels(
    client: triton.InferenceServerClient, binary: bool, coding_in: str | None, coding_out: str | None
) -> None:
    found = client.infer(
        "iris",
        [flowers(binary=binary)],
        outputs=None
        if binary
        else [triton.InferRequestedOutput("predict", binary), triton.InferRequestedOutput("predict_proba", binary)],
        request_id="mine",
        request_compression_algorithm=coding_in,
        response_compression_algorithm=coding_out,
        headers={**AUTH},
    )
    labels = [label.decode() if binary else label for label in found.as_numpy("predict")]
    assert np.mean(np.array(labels) == NAMES) > 0.95
    np.testing.assert_allclose(found.as_numpy("predict_proba").sum(axis=1), np.ones(150))
    assert ("binary_data_size" in found.get_output("predict").get("parameters", {})) == binary
    response = found.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("mine", "iris", "3")


@pytest.mark.parametrize("binary", [True, False])
def test_columns_of_texts_numbers_and_truths(client: triton.InferenceServerClient, binary: bool) -> None:
    found = client.infer("people", people_inputs(binary=binary), headers={**AUTH}).as_numpy("predict")
    assert (found.dtype, found.shape) == (np.float64, (6,))


def test_each_output_says_for_itself_how_it_comes(client: triton.InferenceServerClient) -> None:
    outputs = [triton.InferRequestedOutput("predict_proba", True), triton.InferRequestedOutput("predict", False)]
    found = client.infer("iris", [flowers(FLOWERS.astype(np.float32))], outputs=outputs, headers={**AUTH})
    assert [one["name"] for one in found.get_response()["outputs"]] == ["predict_proba", "predict"]
    assert "data" in found.get_output("predict")
    assert found.as_numpy("predict_proba").shape == (150, 3)


def test_many_calls_at_once(client: triton.InferenceServerClient, tables: Server) -> None:
    with triton.InferenceServerClient(tables.url.removeprefix("http://"), concurrency=8) as many:
        calls = [many.async_infer("iris", [flowers(FLOWERS[n : n + 5])], headers={**AUTH}) for n in range(60)]
        for n, call in enumerate(calls):
            found = [label.decode() for label in call.get_result().as_numpy("predict")]
            assert len(found) == 5
            assert sum(label == name for label, name in zip(found, NAMES[n : n + 5], strict=True)) >= 4


def test_tritonclient_sees_server_and_models(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    server = conforms(client.get_server_metadata(headers={**AUTH}), "metadata_server_response")
    assert "binary_tensor_data" in server["extensions"]
    card = conforms(client.get_model_metadata("iris", headers={**AUTH}), "metadata_model_response")
    assert card["inputs"] == [{"name": "input-0", "datatype": "FP64", "shape": [-1, 4]}]
    assert [one["name"] for one in card["outputs"]] == ["predict", "predict_proba"]
    assert (card["versions"], card["platform"]) == (["3"], "sklearn_skops")
    assert client.get_model_metadata("iris", "3", headers={**AUTH}) == card
    columns = client.get_model_metadata("people", headers={**AUTH})["inputs"]
    assert [one["datatype"] for one in columns] == ["FP64", "BYTES", "INT64", "BOOL"]
    assert client.is_model_ready("iris", headers={**AUTH})
    assert client.is_model_ready("iris", "3", headers={**AUTH})
    assert not client.is_model_ready("iris", "4", headers={**AUTH})
    assert not client.is_model_ready("nobody", headers={**AUTH})
    for call in (client.get_model_metadata, lambda *a, **k: client.infer(a[0], [flowers()], a[1], **k)):
        with pytest.raises(InferenceServerException, match="version 3") as absent:
            call("iris", "4", headers={**AUTH})
        assert absent.value.status() == "404"


def test_language_models_are_listed_and_refuse_tensors_by_name(client: triton.InferenceServerClient, tables: Server) -> None:
    card = conforms(client.get_model_metadata("echo", headers={**AUTH}), "metadata_model_response")
    assert card == {"name": "echo", "versions": ["1"], "platform": "mmaas_llm", "inputs": [], "outputs": []}
    assert client.is_model_ready("echo", headers={**AUTH})
    with pytest.raises(InferenceServerException, match="language model"):
        client.infer("echo", [flowers()], headers={**AUTH})
    tables.models.adapted = [Adapter("echo", "german", "0" * 64)]
    assert client.get_model_metadata("echo:german", headers={**AUTH})["name"] == "echo:german"
    tables.models.adapted = []


def test_the_repository_is_listed_loaded_and_unloaded(client: triton.InferenceServerClient, http: httpx.Client) -> None:
    ready = {"name": "iris", "version": "3", "state": "READY", "reason": ""}
    assert ready in client.get_model_repository_index(headers={**AUTH})
    with pytest.raises(InferenceServerException, match="scope"):
        client.unload_model("iris", headers={**AUTH})
    client.unload_model("iris", headers={**ADMIN})
    assert not client.is_model_ready("iris", headers={**AUTH})
    (unloaded,) = [one for one in client.get_model_repository_index(headers={**AUTH}) if one["name"] == "iris"]
    assert unloaded["state"] == "UNAVAILABLE"
    assert unloaded["reason"].startswith("unloaded")
    only = http.post("/v2/repository/index", json={"ready": True}).json()
    assert "iris" not in [one["name"] for one in only]
    client.load_model("iris", headers={**ADMIN})
    assert client.is_model_ready("iris", headers={**AUTH})
    client.unload_model("iris", headers={**ADMIN})
    assert client.infer("iris", [flowers()], headers={**AUTH}).as_numpy("predict").shape == (150,), "a call loads it"
    for wrong in ({"config": "{}"}, {"files": {"file:1/model.skops": b"x"}}):
        with pytest.raises(InferenceServerException, match="can't be sent"):
            client.load_model("iris", headers={**ADMIN}, **wrong)
    with pytest.raises(InferenceServerException, match="nobody"):
        client.load_model("nobody", headers={**ADMIN})


def test_health_is_told_in_words_too(tables: Server) -> None:
    with tables.http(key=None) as anonymous:
        assert anonymous.get("/v2/health/live").json() == {"live": True}
        assert anonymous.get("/v2/health/ready").json() == {"ready": True}
        tables.models.healthy = False
        down = anonymous.get("/v2/health/ready")
        assert (down.status_code, down.json()["ready"]) == (503, False)
        assert anonymous.get("/v2/health/live").status_code == 200
        with tables.http() as http:
            assert http.get("/v2/models/iris/ready").status_code == 503
            error_of(http.get("/v2/models/iris"), 503)
            assert {one["state"] for one in http.post("/v2/repository/index").json()} == {"UNAVAILABLE"}
        tables.models.healthy = True


def test_plain_json_conforms_to_the_specification(http: httpx.Client) -> None:
    nested = http.post(INFER, json={"id": "7", **GOOD}, headers={"accept-encoding": "identity"})
    assert nested.headers["content-type"] == "application/json"
    answer = conforms(nested.json(), "inference_response")
    assert (answer["id"], answer["outputs"][0]["data"]) == ("7", ["setosa", "setosa"])
    flat = {"inputs": [{**GOOD["inputs"][0], "data": FLOWERS[:2].ravel().tolist()}]}
    again = http.post("/v2/models/iris/versions/3/infer", json=flat).json()
    assert again["outputs"] == answer["outputs"]
    assert "id" not in again
    assert http.get("/v2/").json() == http.get("/v2").json()


@pytest.mark.parametrize("content_type", [None, "application/octet-stream", "application/x-www-form-urlencoded"])
def test_what_kind_a_body_is_is_not_told_by_its_content_type(http: httpx.Client, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    assert http.post(INFER, content=json.dumps(GOOD), headers=headers).status_code == 200


def test_every_route_but_the_health_checks_refuses_anonymous_callers(tables: Server) -> None:
    public = {"/v2/health/live", "/v2/health/ready"}
    with tables.http(key=None) as anonymous:
        for path in {route.path for route in router.routes} | {"/v2/nothing", "/v2/models"}:
            for method in ("GET", "POST", "DELETE"):
                answer = anonymous.request(method, path.replace("{model}", "iris").replace("{version}", "3"))
                assert (answer.status_code != 401) == (path in public), (method, path)
                if answer.status_code != 200:
                    error_of(answer, answer.status_code)
    with tables.http("mk_no_scope_012345") as powerless:
        for path in ("/v2", "/v2/models/iris", "/v2/models/iris/ready"):
            error_of(powerless.get(path), 403)
        error_of(powerless.post(INFER, json=GOOD), 403)


def test_errors_of_every_stage_are_one_string_here_and_an_object_beside_it(http: httpx.Client) -> None:
    assert "nobody" in error_of(http.get("/v2/models/nobody"), 404)
    error_of(http.get("/v2/nothing"), 404)
    error_of(http.get(INFER), 405)
    error_of(http.post(INFER, content=b"x" * ((4 << 20) + 1)), 413)
    error_of(http.post(INFER, json=GOOD, headers={"authorization": "Bearer mk_wrong"}), 401)
    assert set(http.get("/v1/models/nobody").json()["error"]) == {"message", "type", "param", "code"}
    assert set(http.get("/v2x").json()["error"]) == {"message", "type", "param", "code"}


def body_of(inputs: list[dict[str, Any]], *behind: bytes, **more: Any) -> dict[str, Any]:
    head = json.dumps({"inputs": inputs, **more}).encode()
    return {"content": b"".join([head, *behind]), "headers": {wire.JSON_LENGTH: str(len(head))}}


def one(**changes: Any) -> dict[str, Any]:
    """The input of a request in JSON, with changes; None takes a field out."""
    changed = {"name": "input-0", "shape": [1, 4], "datatype": "FP64", "data": [1.0, 2.0, 3.0, 4.0]} | changes
    return {name: value for name, value in changed.items() if value is not None}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [one(), one()]}, "same name"),
        ({"inputs": [one(name="")]}, "name"),
        ({"inputs": [one(name="x" * 300)]}, "name"),
        ({"inputs": [one(shape=[])]}, "shape"),
        ({"inputs": [one(shape=[1] * 9)]}, "shape"),
        ({"inputs": [one(shape=[-1, 4])]}, "shape"),
        ({"inputs": [one(shape=[True, 4])]}, "shape"),
        ({"inputs": [one(shape=["1", 4])]}, "shape"),
        ({"inputs": [one(shape=[1 << 62, 1 << 62])]}, "elements"),
        ({"inputs": [one(shape=[2, 4])]}, "elements"),
        ({"inputs": [one(shape=[0, 4], data=[])]}, "no row"),
        ({"inputs": [one(shape=[4])]}, "takes"),
        ({"inputs": [one(datatype="FP65")]}, "datatype"),
        ({"inputs": [one(datatype="BF16")]}, "datatype"),
        ({"inputs": [one(datatype="INT64")]}, "integers"),
        ({"inputs": [one(datatype="BYTES")]}, "texts"),
        ({"inputs": [one(datatype="BOOL")]}, "true and false"),
        ({"inputs": [one(datatype="UINT8", data=[1, 2, 3, 256])]}, "range"),
        ({"inputs": [one(datatype="UINT8", data=[1, 2, 3, -1])]}, "range"),
        ({"inputs": [one(datatype="FP32", data=[1, 2, 3, 1e39])]}, "range"),
        ({"inputs": [one(data=[1, 2, 3, True])]}, "numbers"),
        ({"inputs": [one(data=[1, 2, 3, "4"])]}, "numbers"),
        ({"inputs": [one(data=[1, 2, 3, None])]}, "not finite"),
        ({"inputs": [one(data=[[1, 2], [3, 4]])]}, "nested"),
        ({"inputs": [one(data=[[1, 2, 3, [4]]])]}, "numbers"),
        ({"inputs": [one(data=[[1, 2, 3, 4], 5])]}, "nested"),
        ({"inputs": [one(data=5)]}, "data"),
        ({"inputs": [one(data=None)]}, "either data or"),
        ({"inputs": [one(parameters={"binary_data_size": 32})]}, "either data or"),
        ({"inputs": [one(data=None, parameters={"binary_data_size": 32})]}, "0 are left"),
        ({"inputs": [one(data=None, parameters={"binary_data_size": -1})]}, "binary_data_size"),
        ({"inputs": [one(data=None, parameters={"binary_data_size": "32"})]}, "binary_data_size"),
        ({"inputs": [one(data=None, parameters={"shared_memory_region": "r"})]}, "shared memory"),
        ({"inputs": [one()], "outputs": [{"name": "nothing"}]}, "nothing"),
        ({"inputs": [one()], "outputs": [{"name": "predict"}, {"name": "predict"}]}, "same name"),
        ({"inputs": [one()], "outputs": [{"name": "predict", "parameters": {"classification": 2}}]}, "classification"),
        ({"inputs": [one()], "parameters": {"sequence_id": 5}}, "state"),
        ({"inputs": [one()], "parameters": {"binary_data_output": "yes"}}, "binary_data_output"),
        ({"inputs": [one()], "id": 7}, "id"),
        ({"inputs": [one(data=[1e308, -1e308, 1e308, -1e308])]}, "too large"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(http: httpx.Client, body: dict[str, Any], words: str) -> None:
    assert words in error_of(http.post(INFER, json=body))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (body_of([one(data=None, parameters={"binary_data_size": 32})], b"\0" * 33), "1 bytes lie behind"),
        (body_of([one(data=None, parameters={"binary_data_size": 32})], b"\0" * 31), "31 are left"),
        (body_of([one(data=None, parameters={"binary_data_size": 31})], b"\0" * 31), "31 bytes"),
        (body_of([one(data=None, shape=[1 << 61, 4], parameters={"binary_data_size": 0})]), "0 bytes"),
        (body_of([one()], b"\0"), "1 bytes lie behind"),
        (body_of([one(data=None, datatype="BYTES", parameters={"binary_data_size": 4})], b"\0" * 4), "takes FP64"),
        ({"content": b"{}", "headers": {wire.JSON_LENGTH: "3"}}, "Inference-Header"),
        ({"content": b"{}", "headers": {wire.JSON_LENGTH: "0"}}, "Inference-Header"),
        ({"content": b"{}", "headers": {wire.JSON_LENGTH: "-2"}}, "Inference-Header"),
        ({"content": b"{}", "headers": {wire.JSON_LENGTH: "2.0"}}, "Inference-Header"),
        ({"content": b"{}", "headers": {wire.JSON_LENGTH: "9" * 30}}, "Inference-Header"),
        ({"content": b"{}", "headers": {"content-encoding": "br"}}, "Content-Encoding"),
        ({"content": b"{}", "headers": {"content-encoding": "gzip, gzip"}}, "Content-Encoding"),
        ({"content": b"{}", "headers": {"content-encoding": "gzip"}}, "valid gzip"),
        ({"content": zlib.compress(b"{}"), "headers": {"content-encoding": "gzip"}}, "valid gzip"),
        ({"content": gzip.compress(b"{}")[:-4], "headers": {"content-encoding": "gzip"}}, "one whole"),
        ({"content": gzip.compress(b"{}") + b"x", "headers": {"content-encoding": "gzip"}}, "one whole"),
        ({"content": zlib.compress(b"{}")[:-1], "headers": {"content-encoding": "deflate"}}, "one whole"),
        ({"content": b""}, "inputs"),
        ({"content": b"{"}, "JSON"),
        ({"content": b"[" * 100_000}, "nested"),
    ],
)
def test_bodies_that_cannot_be_read_are_refused(http: httpx.Client, request_: dict[str, Any], words: str) -> None:
    assert words in error_of(http.post(INFER, **request_))


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_small_body_that_unpacks_to_a_large_one_is_refused(http: httpx.Client, coding: str, pack: Any) -> None:
    bomb = pack(b" " * (64 << 20))
    assert len(bomb) < 100_000
    assert "unpacked" in error_of(http.post(INFER, content=bomb, headers={"content-encoding": coding}), 413)


def test_only_this_protocol_has_packed_bodies(http: httpx.Client) -> None:
    refused = http.post("/v1/chat/completions", content=gzip.compress(b"{}"), headers={"content-encoding": "gzip"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("", None),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate", "gzip"),
        ("gzip;q=0.5, deflate;q=0.8", "deflate"),
        ("gzip;q=0", None),
        ("identity", None),
        ("identity, gzip;q=0.5", None),
        ("*", "gzip"),
        ("br", None),
        ("gzip;q=x", None),
        ("gzip;q=nan", None),
    ],
)
def test_the_coding_of_an_answer_is_one_that_the_caller_accepts(accepted: str, coding: str | None) -> None:
    assert wire.chosen(accepted) == coding


def test_unsigned_integers_of_64_bits_fit(tables: Server) -> None:
    with tables.http() as http:
        largest = one(datatype="UINT64", data=[(1 << 64) - 1] * 4)
        assert "takes FP64" not in http.post(INFER, json={"inputs": [largest]}).text
        too_large = one(datatype="UINT64", data=[1 << 64] * 4)
        assert "64 bits" in error_of(http.post(INFER, json={"inputs": [too_large]}))


def test_a_caller_who_leaves_takes_its_rows_along(tables: Server) -> None:
    many = np.tile(FLOWERS, (500, 1))
    given = one(shape=list(many.shape), data=None, parameters={"binary_data_size": many.nbytes})
    with tables.http() as http, pytest.raises(httpx.TimeoutException):
        http.post(INFER, **body_of([given], many.tobytes()), timeout=0.01)
    replica = tables.models.replicas["iris"]
    eventually(lambda: replica._batches.stats["streams"] == 0)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
FIELDS = ["name", "shape", "datatype", "data", "parameters"]
PARAMETERS = st.dictionaries(
    st.sampled_from(["binary_data_size", "binary_data", "binary_data_output", "timeout"]), json_values, max_size=2
)
SHAPES = st.lists(st.integers(-1, 5) | st.sampled_from([1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1]), max_size=4)
DATATYPES = st.sampled_from(["FP64", "FP32", "FP16", "INT8", "UINT64", "BOOL", "BYTES"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model=st.sampled_from(["iris", "people", "echo"]),
    inputs=st.lists(
        st.fixed_dictionaries(
            {"name": st.sampled_from(["input-0", "age", "city", "visits", "member"]), "shape": SHAPES, "datatype": DATATYPES},
            optional={
                "data": json_values | st.lists(st.integers(-5, 300) | st.text(max_size=3)),
                "parameters": PARAMETERS | json_values,
            },
        ),
        max_size=4,
    )
    | json_values,
    more=st.dictionaries(st.sampled_from(["id", "outputs", "parameters"]), json_values | PARAMETERS, max_size=2),
    behind=st.binary(max_size=40),
    coding=st.sampled_from(["", "gzip", "deflate"]),
)
def test_no_request_is_a_fault_of_ours(http: httpx.Client, model: str, inputs: Any, more: Any, behind: bytes, coding: str) -> None:
    sent = body_of(inputs, behind, **more)
    packed = {"": bytes, "gzip": gzip.compress, "deflate": zlib.compress}[coding](sent["content"])
    headers = sent["headers"] | ({"content-encoding": coding} if coding else {})
    answer = http.post(f"/v2/models/{model}/infer", content=packed, headers=headers)
    if answer.status_code != 200:
        error_of(answer, answer.status_code)
        assert answer.status_code == 400


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=100), length=st.none() | st.integers(-2, 120), coding=st.sampled_from(["", "gzip", "deflate"]))
def test_no_bytes_are_a_fault_of_ours(http: httpx.Client, raw: bytes, length: int | None, coding: str) -> None:
    headers = {"content-encoding": coding} if coding else {}
    if length is not None:
        headers[wire.JSON_LENGTH] = str(length)
    error_of(http.post(INFER, content=raw, headers=headers))


async def test_the_same_over_a_handle(tables: Server, iris: Path) -> None:
    from cluster.settings import GatewaySettings
    from deployments.gateway.entrance import Entrance

    models = TableModels(iris=iris)
    entrance = Entrance.of(models, KeyRing().verify, GatewaySettings())

    async def asked(body: dict[str, Any], key: str = KeyRing.USER) -> list[Any]:
        return [answer async for answer in calls.call(entrance, key, "infer", body)]

    (answer,) = await asked({"model": "iris", **GOOD})
    assert conforms(answer, "inference_response")["outputs"][0]["data"] == ["setosa", "setosa"]
    for wrong in (
        {"model": "iris"},
        {"model": 7, **GOOD},
        {"model": "iris", "model_version": 3, **GOOD},
        {"model": "iris", **GOOD, "parameters": {"binary_data_output": True}},
    ):
        with pytest.raises(platform_errors.InvalidRequest):
            await asked(wrong)
    with pytest.raises(platform_errors.NotFound):
        await asked({"model": "iris", "model_version": "9", **GOOD})
    with pytest.raises(platform_errors.Forbidden):
        await asked({"model": "iris", **GOOD}, "mk_no_scope_012345")
    await models.replicas["iris"].close()


def test_the_document_describes_the_protocol(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    infer = document["paths"]["/v2/models/{model}/infer"]["post"]
    schema = infer["requestBody"]["content"]["application/json"]["schema"]
    assert {"inputs", "outputs", "id", "parameters"} <= set(schema["properties"])
    published = {
        path.replace("${MODEL_NAME}", "{model}").replace("${MODEL_VERSION}", "{version}") for path in SPECIFICATION["paths"]
    }
    assert {path.rstrip("/") for path in published} <= document["paths"].keys()


def test_bytes_in_answers_stand_behind_their_lengths(http: httpx.Client) -> None:
    sent = {**GOOD, "outputs": [{"name": "predict", "parameters": {"binary_data": True}}]}
    answer = http.post(INFER, json=sent, headers={"accept-encoding": "identity"})
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers[wire.JSON_LENGTH])
    assert json.loads(answer.content[:length])["outputs"][0]["parameters"] == {"binary_data_size": 20}
    assert answer.content[length:] == (struct.pack("<I", 6) + b"setosa") * 2
