"""The first-token benchmark: bursts, what it makes of the times, and its caller against a real server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from bench.engine import Work
from bench.first_token import ENGINE, HTTP, Caller, Measurement, Prompts, measure, rows, table
from bench.harness import Row

WORK = Work(8, 8, prompt_tokens=5, output_tokens=3)
MEASURED = [
    Measurement(ENGINE, 1, 10.0, 12.0, 200.0),
    Measurement(ENGINE, 8, 30.0, 35.0, 900.0),
    Measurement(HTTP, 1, 14.0, 19.0, 180.0),
    Measurement(HTTP, 8, 45.0, 60.0, 800.0),
]


class Bursts:
    """Answers each burst in two seconds, the n-th request of a burst after n; remembers what it was asked."""

    def __init__(self, num_tokens: int = WORK.output_tokens) -> None:
        self.num_tokens = num_tokens
        self.asked: list[Prompts] = []

    def __call__(self, prompts: Prompts) -> dict[str, Any]:
        self.asked.append(prompts)
        requests = [{"num_tokens": self.num_tokens, "first_token_s": float(n), "finished_s": 9.0} for n, _ in enumerate(prompts)]
        return {"wall_s": 2.0, "requests": requests}


def test_every_prompt_is_asked_once_in_bursts_after_a_warm_up() -> None:
    answer = Bursts()
    assert measure(HTTP, answer, 2, WORK) == Measurement(HTTP, 2, 500.0, 1000.0, 3 * 8 / (4 * 2.0))
    assert [len(burst) for burst in answer.asked] == [2] * (3 + 4)
    assert answer.asked[3:] == [*answer.asked[:3], answer.asked[-1]]
    assert len({str(prompt) for burst in answer.asked[3:] for prompt in burst}) == 8


def test_both_ways_get_the_same_prompts() -> None:
    ways = [Bursts(), Bursts()]
    for answer in ways:
        measure(HTTP, answer, 4, WORK)
    assert ways[0].asked == ways[1].asked


def test_short_answers_count_for_nothing() -> None:
    with pytest.raises(RuntimeError, match=r"engine alone answered with \[2\] tokens"):
        measure(ENGINE, Bursts(num_tokens=2), 2, WORK)


def test_the_rows_are_what_http_adds() -> None:
    assert rows(MEASURED) == [Row("S", 1, 1, 4.0, None, None, None), Row("S", 8, 1, 15.0, None, None, None)]


def test_the_table_has_both_ways_and_their_difference() -> None:
    assert table(MEASURED).lines[:3] == [
        ["1", ENGINE, "10.0", "12.0", "200"],
        ["1", HTTP, "14.0", "19.0", "180"],
        ["1", "difference", "+4.0", "+7.0", "-20"],
    ]


class Server(BaseHTTPRequestHandler):
    """Streams three chunks and the usage; model `missing` is an error, model `breaks` one inside the stream."""

    protocol_version = "HTTP/1.0"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)  # type: ignore[attr-defined]
        self.send_response(404 if body["model"] == "missing" else 200)
        self.end_headers()
        self.wfile.write(b": hello\n\n")
        for _ in range(body["max_tokens"]):
            self._event({"choices": [{"text": "a"}], "usage": None})
        if body["model"] == "breaks":
            self._event({"error": {"message": "a shard died"}})
        self._event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, content: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.bodies = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def caller(server: ThreadingHTTPServer, model: str = "s") -> Caller:
    return Caller(f"http://127.0.0.1:{server.server_port}/v1", "key", model, output_tokens=3)


def test_a_burst_is_streamed_and_timed(server: ThreadingHTTPServer) -> None:
    with caller(server) as calling:
        answers = [calling.burst([[1, 2], [3, 4]]) for _ in range(2)]
    for answer in answers:
        assert [request["num_tokens"] for request in answer["requests"]] == [3, 3]
        assert all(0 < request["first_token_s"] <= request["finished_s"] <= answer["wall_s"] for request in answer["requests"])
    assert sorted(body["prompt"] for body in server.bodies) == [[1, 2], [1, 2], [3, 4], [3, 4]]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("model", "why"), [("missing", "hello"), ("breaks", "a shard died")])
def test_an_error_ends_the_measurement(server: ThreadingHTTPServer, model: str, why: str) -> None:
    with caller(server, model) as calling, pytest.raises(RuntimeError, match=why):
        calling.burst([[1]])
