"""What an engine under test speaks: JSON lines over its standard input and output. Standard library only, for any environment.

    engine -> {"ready": true, "versions": {...}, "load_s": ...}
    bench  -> {"prompts": [[ids]], "max_tokens": n, "concurrency": c}
    engine -> {"wall_s": ..., "requests": [{"num_tokens", "first_token_s", "finished_s", "token_times_s": [...]}]}

until its input ends. Times of a request are seconds from its own start, which is when one of the `concurrency` places became free
for it; `token_times_s` has one for every token of the answer.
A request may also have "cached_tokens": those of its prompt that the engine's prefix cache gave.
Work may also have "adapters": how many LoRA adapters take turns, for an engine that was started with --adapters.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

Request = dict
Generate = Callable[..., list[Request]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--max-concurrency", type=int, default=32)
    parser.add_argument("--max-model-len", type=int, default=512, help="longest prompt and answer, for engines that plan by it")
    parser.add_argument("--adapters", help="folder with LoRA adapters 001, 002, ...")
    parser.add_argument("--max-adapters", type=int, default=0)
    parser.add_argument("--max-rank", type=int, default=8)
    parser.add_argument("--prefix-cache", action="store_true", help="share the beginnings of prompts, where the engine can")
    parser.add_argument("--quantization", choices=["int8"], help="weights in eight bits, made from the 16 of the model")
    return parser.parse_args()


def serve(load: Callable[[], Generate], packages: list[str]) -> None:
    """Loads, says so, and answers until the input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started = time.perf_counter()
    generate = load()
    print(json.dumps({"ready": True, "versions": _versions(packages), "load_s": time.perf_counter() - started}), file=answers)
    for line in sys.stdin:
        work = json.loads(line)
        started = time.perf_counter()
        more = {"adapters": work["adapters"]} if "adapters" in work else {}
        requests = generate(work["prompts"], work["max_tokens"], work["concurrency"], **more)
        print(json.dumps({"wall_s": time.perf_counter() - started, "requests": requests}), file=answers)


def _versions(packages: list[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class ClosedLoop:
    """Keeps `concurrency` requests running in an engine that is stepped by hand, and notes when their tokens come."""

    def __init__(self, num_requests: int, concurrency: int) -> None:
        self._waiting = list(range(num_requests))[::-1]
        self._concurrency = concurrency
        self._running: dict[int, dict] = {}
        self.done: dict[int, Request] = {}

    def admit(self) -> list[int]:
        """The requests to start now."""
        free = self._concurrency - len(self._running)
        starting = [self._waiting.pop() for _ in range(min(free, len(self._waiting)))]
        for request in starting:
            self._running[request] = {"started": time.perf_counter(), "first": None, "times": []}
        return starting

    @property
    def unfinished(self) -> bool:
        return bool(self._running or self._waiting)

    def note(self, request: int, num_tokens: int, finished: bool, **more: int) -> None:
        """`num_tokens`: of the whole answer up to now; `more`: what else a finished request is to say."""
        now, state = time.perf_counter(), self._running[request]
        if num_tokens and state["first"] is None:
            state["first"] = now - state["started"]
        state["times"] += [now - state["started"]] * (num_tokens - len(state["times"]))
        if finished:
            del self._running[request]
            finished_s = now - state["started"]
            self.done[request] = {"num_tokens": num_tokens, "first_token_s": state["first"], "finished_s": finished_s, **more}
            self.done[request]["token_times_s"] = state["times"]

    def results(self) -> list[Request]:
        return [self.done[request] for request in sorted(self.done)]
