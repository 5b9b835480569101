"""OpenAI's Node client, installed from its lock file, drives the platform by one script; here is what must have come of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.clients.conftest import Served

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NODE = Path(__file__).parent / "node"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script and what it imports, as the lock file says with its digests."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not on this machine")
    folder = shutil.copytree(NODE, tmp_path_factory.mktemp("node") / "client", ignore=shutil.ignore_patterns("node_modules"))
    words = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=20000"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)
    if any(
        f"code {code}" in done.stderr
        for code in ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH")
    ):
        pytest.skip("no npm registry can be reached")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def said(installed: Path, served: Served) -> dict[str, Any]:
    before = served.platform.counters("caller")["aborted_total"]
    environment = {"BASE_URL": served.base_url, "API_KEY": served.api_key, "TASTE": json.dumps(served.taste)}
    done = subprocess.run(
        ["node", "drive.mjs"], cwd=installed, env=os.environ | environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"aborted before": before}


def part(said: dict[str, Any], name: str) -> Any:
    assert "failed" not in said[name], said[name]["failed"]
    return said[name]


def is_weather(parsed: Any) -> bool:
    return parsed.keys() == {"city", "days", "unit"} and type(parsed["days"]) is int and parsed["unit"] in ("celsius", "fahrenheit")


def test_text_is_the_same_streamed_and_whole(said: dict[str, Any]) -> None:
    text = part(said, "text")
    assert text["whole"]
    assert text["whole"] == text["streamed"]
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [text["usage"][name] for name in counts] == [text["wholeUsage"][name] for name in counts]


def test_an_answer_of_a_zod_form_parses(said: dict[str, Any]) -> None:
    form = part(said, "form")
    assert is_weather(form["whole"])
    assert form["whole"] == form["streamed"]


def test_calls_of_every_choice_parse(said: dict[str, Any]) -> None:
    tools = part(said, "tools")
    assert tools["whole"] == tools["streamed"]
    assert [reason for reason, _ in tools["whole"]] == ["tool_calls"] * 2
    assert all(is_weather(call) for _, calls in tools["whole"] for call in calls)
    assert len(tools["done"]) == sum(len(calls) for _, calls in tools["streamed"])


def test_the_helper_runs_functions(said: dict[str, Any]) -> None:
    runs = part(said, "runs")
    assert runs["whole"] == runs["streamed"]
    assert runs["whole"][:3] == ["user", "assistant", "tool"]
    assert len(runs["ran"]) == 2
    assert all(is_weather(parsed) for parsed in runs["ran"])


def test_embeddings_come_as_base64_and_as_numbers(said: dict[str, Any]) -> None:
    found = part(said, "embeddings")
    packed, numbers = np.array(found["packed"], np.float32), np.array(found["numbers"], np.float32)
    assert packed.shape == (2, 64)
    np.testing.assert_array_equal(packed, numbers)


def test_errors_are_of_the_clients_own_classes(said: dict[str, Any]) -> None:
    errors = part(said, "errors")
    absent = {"name": "NotFoundError", "status": 404, "code": "model_not_found", "param": "model"}
    assert errors["absent"] == errors["absentStreamed"] == absent
    assert (errors["stranger"]["name"], errors["stranger"]["status"]) == ("AuthenticationError", 401)
    assert (errors["wrong"]["name"], errors["wrong"]["param"]) == ("BadRequestError", "temperature")
    assert (errors["kind"]["name"], errors["kind"]["code"]) == ("BadRequestError", "model_not_supported")


def test_an_aborted_stream_frees_the_model(said: dict[str, Any], served: Served) -> None:
    assert 3 <= part(said, "abort")["chunks"] < 100
    deadline = time.monotonic() + 20
    while served.platform.counters("caller")["aborted_total"] <= said["aborted before"]:
        assert time.monotonic() < deadline, "the model goes on for nobody"
        time.sleep(0.3)


def test_models_are_listed(said: dict[str, Any]) -> None:
    assert {"tiny", "caller", "embedder", "judge"} <= set(part(said, "models"))
