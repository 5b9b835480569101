"""Many slow streams at once through one gateway, for long: none may break, nothing may pile up, and the books must be right then.

    python -m bench.slow_streams                # 500 streams of five tokens a second for ten minutes

The gateway is a process of its own over SQLite, with keys, limits, reservations and durable progress; model and gateway share it.
Its memory and processor time are read from outside while all streams run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from bench import openloop
from bench.gateway_kills import Place
from bench.gateways import MODEL, Gateways, executions
from bench.harness import Spread, Table, versions, write
from bench.slope import Slope, slope
from cluster.settings import GatewaySettings, Settings
from cluster.tenancy.projects import DEFAULT
from cluster.tenancy.reconcile import problems

RAMP_S = 10.0
"""In which all streams begin, at most; a quarter of the whole time if that is less."""

SAMPLE_S = 0.5


@dataclass(frozen=True)
class Result:
    """Of the streams, and of the gateway's process while all of them ran."""

    streams: int
    seconds: float
    errors: list[str]  # one for each that did not come whole
    gaps_ms: Spread  # between two tokens of one stream
    first_ms: Spread
    cpu: float  # cores
    peak_mb: float
    memory: Slope | None  # None: too short for one
    problems: list[str]  # of the books

    @property
    def is_clean(self) -> bool:
        return not (self.errors or self.problems)


def measure(settings: Settings, streams: int, seconds: float, pause_s: float) -> Result:
    place = Place(settings)
    key = place.accounts.keys.create(DEFAULT, "streams")[1]
    ramp_s = min(RAMP_S, seconds / 4)
    with Gateways(settings, 1, place.journal) as [gateway]:
        requests = [(ramp_s * number / streams, _request(gateway.port, key, number, seconds, pause_s)) for number in range(streams)]
        exchanges, samples, cpu = asyncio.run(_watched(gateway.port, gateway.pid, requests, ramp_s, seconds))
        wrong = problems(place.store)
    done = executions(place.journal)
    wrong += [f"{one.request_id} did not end" for one in done.values() if not one.ended]
    place.store.close()
    texts = [list(openloop.events(exchange.pieces)) for exchange in exchanges]
    moments = [[at for at, event in events if b'"content":" ' in event] for events in texts]
    gaps = [(later - earlier) * 1e3 for times in moments for earlier, later in pairwise(times)]
    errors = [
        error
        for exchange, events in zip(exchanges, texts, strict=True)
        if (error := exchange.failure or openloop.problem(exchange.pieces, is_done=bool(events) and events[-1][1] == b"[DONE]"))
    ]
    first = [(times[0] - exchange.sent) * 1e3 for exchange, times in zip(exchanges, moments, strict=True) if times]
    memory = slope(samples) if len(samples) >= 10 else None
    peak = max((size for _, size in samples), default=0) / 1e6
    return Result(streams, seconds, errors, Spread.of(gaps or [0.0]), Spread.of(first or [0.0]), cpu, peak, memory, wrong)


def _request(port: int, key: str, number: int, seconds: float, pause_s: float) -> bytes:
    message = {"role": "user", "content": f"n{number} {pause_s}"}
    body = {"model": MODEL.name, "messages": [message], "max_tokens": round(seconds / pause_s), "stream": True}
    request = openloop.request_bytes(f"127.0.0.1:{port}", {"Authorization": f"Bearer {key}"}, body)
    return request.replace(b"POST /v1/completions ", b"POST /v1/chat/completions ", 1)


async def _watched(
    port: int, pid: int, requests: Sequence[tuple[float, bytes]], ramp_s: float, seconds: float
) -> tuple[list[openloop.Exchange], list[tuple[float, int]], float]:
    """The exchanges, and the gateway's memory and cores between the last stream's begin and the first one's end."""
    sending = asyncio.ensure_future(openloop.send_all("127.0.0.1", port, requests, patience_s=2 * seconds + 60))
    await asyncio.sleep(1.5 * ramp_s)
    samples, cpu_s, start = list[tuple[float, int]](), _cpu_s(pid), time.monotonic()
    while (now := time.monotonic() - start) < seconds - 1.5 * ramp_s:
        samples.append((now, _resident(pid)))
        await asyncio.sleep(SAMPLE_S)
    cores = (_cpu_s(pid) - cpu_s) / (time.monotonic() - start)
    return await sending, samples, cores


def _resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def table(result: Result) -> Table:
    lines = [
        ["streams at once, seconds each", f"{result.streams}, {result.seconds:g}"],
        ["dropped", str(len(result.errors))],
        ["first token p50, p99, ms", f"{result.first_ms.p50:.0f}, {result.first_ms.p99:.0f}"],
        [
            "time between two tokens p50, p99, most, ms",
            f"{result.gaps_ms.p50:.0f}, {result.gaps_ms.p99:.0f}, {result.gaps_ms.most:.0f}",
        ],
        ["gateway and model, cores", f"{result.cpu:.2f}"],
        ["peak of memory", f"{result.peak_mb:.0f} MB"],
        ["memory", str(result.memory or "too short for a slope")],
        ["errors of the books", str(len(result.problems))],
    ]
    return Table("Slow streams at once through one gateway", ["", ""], lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between two tokens")
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="mmaas-streams-") as home:
        longest = GatewaySettings(max_stream_s=120 * options.minutes + 60, max_ongoing=options.streams + 64)
        result = measure(Settings(home=Path(home), gateway=longest), options.streams, 60 * options.minutes, options.pause)
    shown = table(result)
    shown.show()
    print(*(result.errors + result.problems)[:20], sep="\n")
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.slow_streams", *sys.argv[1:]])
        print(write("slow_streams", [], shown, command=command, found=versions(["uvicorn", "sqlalchemy"]), result=asdict(result)))
    raise SystemExit(not result.is_clean)


if __name__ == "__main__":
    main()
