"""Stages by themselves: what a socket can't show."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI

from cluster.errors import Conflict, Forbidden, Overloaded, Unauthenticated
from cluster.types import Principal
from deployments.gateway import errors
from deployments.gateway.exchange import Exchange, new_request_id
from deployments.gateway.front import Front, first_of
from deployments.gateway.guards import DropControlHeaders, Gate, is_control
from deployments.gateway.scopes import ScopedRoute, permit, public_paths, requires

CONTROL = [
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"serve_multiplexed_model_id",
    b"serve-multiplexed-model-id",
    b"Serve_Multiplexed-Model_Id",
    b"x-session-id",
    b"X_Session_Id",
    b"x-serve-router-anything",
    b"x-request-id",
    b"x-ray-authorization",
]


async def passed(stage: Any, headers: list[tuple[bytes, bytes]]) -> tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]:
    """Headers that reach the app behind `stage`, and those of its answer, to which Serve adds its identifier."""
    seen, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])
        await send(
            {"type": "http.response.start", "headers": [(b"x-request-id", b"ours"), (b"a", b"1"), (b"X-Request-ID", b"theirs")]}
        )

    async def send(message: Any) -> None:
        sent.extend(message["headers"])

    await stage(app)({"type": "http", "path": "/v1/models", "headers": headers}, None, send)
    return seen, sent


@pytest.mark.parametrize("name", CONTROL)
async def test_control_headers_do_not_pass(name: bytes) -> None:
    assert is_control(name)
    for stage in (DropControlHeaders, Front):
        seen, _ = await passed(stage, [(name, b"\xff"), (b"host", b"h"), (b"x-stainless-lang", b"python")])
        assert name not in dict(seen)
        assert (b"host", b"h") in seen
        assert (b"x-stainless-lang", b"python") in seen


async def test_the_front_keeps_the_callers_identifier_and_lets_only_ours_out() -> None:
    seen, sent = await passed(Front, [(b"x-request-id", b"mine")])
    assert seen == [(b"x-client-request-id", b"mine")]
    assert sent == [(b"x-request-id", b"ours"), (b"a", b"1")]
    assert first_of(b"x", []) == []


@pytest.mark.parametrize(("is_outermost", "status"), [(True, 404), (False, 200)])
async def test_serves_own_pages_are_closed_where_no_haproxy_is_in_front(is_outermost: bool, status: int) -> None:
    sent: list[Any] = []

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    await Front(serve, is_outermost=is_outermost)({"type": "http", "path": "/-/routes", "headers": []}, None, send)
    assert sent[0]["status"] == status


async def test_a_websocket_passes_no_stage() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await DropControlHeaders(None)({"type": "websocket", "path": "/", "headers": []}, None, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_a_route_without_a_scope_cannot_be_registered() -> None:
    router = APIRouter(route_class=ScopedRoute)

    async def open_door() -> None: ...

    with pytest.raises(TypeError, match="declares no scope"):
        router.get("/open")(open_door)
    with pytest.raises(ValueError, match="not a scope"):
        requires("everything")
    router.get("/closed")(requires("admin")(open_door))
    app = FastAPI()
    app.get("/unscoped")(open_door)
    with pytest.raises(TypeError, match="nobody says"):
        public_paths(app.routes)


def test_scopes_permit() -> None:
    user = Principal("acme", "k", frozenset({"inference"}))
    permit(None, "public")
    permit(user, "inference")
    with pytest.raises(Unauthenticated):
        permit(None, "inference")
    with pytest.raises(Forbidden):
        permit(user, "admin")


def test_the_gate_counts_down_whatever_happens() -> None:
    gate = Gate(1)
    with contextlib.suppress(KeyError), gate.admit():
        with pytest.raises(Overloaded), gate.admit():
            pass
        raise KeyError
    assert gate.inside == 0


def test_a_conflict_tells_clients_not_to_repeat_it() -> None:
    assert (b"x-should-retry", b"false") in errors.retry_headers(Conflict("done already"))


def test_identifiers_are_unique_and_sort_by_time() -> None:
    assert len({new_request_id() for _ in range(10_000)}) == 10_000
    times = [new_request_id(now) for now in (1.0, 1.5, 1_700_000_000.0, 1_700_000_000.001)]
    assert times == sorted(times)
    assert Exchange(request_id=times[0]).answer_id("chatcmpl-") == times[0].replace("req_", "chatcmpl-")


def test_the_gateway_starts_without_heavy_libraries() -> None:
    code = (
        "import sys; import deployments.gateway.app, deployments.gateway.gateway, deployments.gateway.front, mmaas.client;"
        "bad = {'torch', 'transformers', 'mlflow', 'deepspeed', 'ray', 'pandas', 'pyarrow'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
