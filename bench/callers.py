"""Callers of gateways that are killed under them: whole answers and streams, with and without `Idempotency-Key`, some hang up.

Each writes down what it saw. One with a key asks again until it has its answer, and now and then once more; one without gives up.
Knows HTTP and nothing of what is behind it.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.gateways import MODEL

BROKEN = (httpx.TransportError, json.JSONDecodeError)
"""What a caller sees of a gateway that was killed."""


@dataclass(slots=True)
class Attempt:
    """One request and what came of it, as its caller saw it. Moments are of the machine's monotonic clock."""

    nonce: str  # of the call: attempts with one key share it
    has_key: bool
    streams: bool
    asked: float
    status: int = 0  # 0: no head of an answer came
    request_id: str = ""  # who executed it, from the answer's own id
    tokens: int = 0  # that came
    usage: tuple[int, int] | None = None
    whole: bool = False
    replayed: bool = False
    left: bool = False  # hung up
    error: str = ""
    ended: float = 0.0


@dataclass
class Callers:
    """`keys` are those of the projects whose calls are made; `urls` those of the gateways."""

    urls: Sequence[str]
    keys: Sequence[str]
    rng: random.Random
    pause_s: float = 0.03  # between two tokens
    most_tokens: int = 50
    attempts: list[Attempt] = field(default_factory=list)
    stopped: bool = False
    _made: int = 0

    async def run(self, count: int) -> None:
        """Until `stopped`, and then until every call with a key has its answer."""
        async with httpx.AsyncClient(verify=False, timeout=120, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            await asyncio.gather(*(self._call_on(client) for _ in range(count)))

    async def _call_on(self, client: httpx.AsyncClient) -> None:
        while not self.stopped:
            self._made += 1
            await self._call(client, f"n{self._made}", self.rng.choice(self.keys), self.rng.random() < 0.4)

    async def _call(self, client: httpx.AsyncClient, nonce: str, key: str, has_key: bool) -> None:
        streams, tokens = self.rng.random() < 0.5, self.rng.randint(1, self.most_tokens)
        again = has_key and self.rng.random() < 0.2
        while True:
            patience = self.rng.uniform(0, tokens * self.pause_s) if self.rng.random() < 0.15 else None
            attempt = await self._ask(client, nonce, key, tokens, patience, has_key=has_key, streams=streams)
            if attempt.error or not attempt.status:
                await asyncio.sleep(self.rng.uniform(0.5, 1.0))
            if not has_key or attempt.error == "insufficient_quota" or (attempt.whole and not again):
                return
            again = again and not attempt.whole

    async def _ask(
        self, client: httpx.AsyncClient, nonce: str, key: str, tokens: int, patience: float | None, *, has_key: bool, streams: bool
    ) -> Attempt:
        attempt = Attempt(nonce, has_key, streams, time.monotonic())
        body = {
            "model": MODEL.name,
            "messages": [{"role": "user", "content": f"{nonce} {self.pause_s}"}],
            "max_tokens": tokens,
            "stream": streams,
            **({"stream_options": {"include_usage": True}} if streams else {}),
        }
        headers = {"Authorization": f"Bearer {key}", **({"Idempotency-Key": nonce} if has_key else {})}
        url = f"{self.rng.choice(self.urls)}/v1/chat/completions"
        try:
            async with asyncio.timeout(patience):
                await _exchange(client, url, headers, body, attempt)
        except TimeoutError:
            attempt.left = True
        except BROKEN as error:
            attempt.error = attempt.error or type(error).__name__
        attempt.ended = time.monotonic()
        self.attempts.append(attempt)
        return attempt


async def _exchange(client: httpx.AsyncClient, url: str, headers: dict[str, str], body: dict[str, Any], seen: Attempt) -> None:
    async with client.stream("POST", url, headers=headers, json=body) as answer:
        seen.status = answer.status_code
        seen.replayed = "idempotent-replayed" in answer.headers
        if seen.status != 200:
            seen.error = (json.loads(await answer.aread()).get("error") or {}).get("code") or str(seen.status)
        elif seen.streams:
            async with aclosing(answer.aiter_lines()) as lines:  # type: ignore[type-var]
                async for line in lines:
                    _hear(line, seen)
        else:
            content = json.loads(await answer.aread())
            _note(content, seen)
            seen.tokens, seen.whole = content["usage"]["completion_tokens"], True


def _hear(line: str, seen: Attempt) -> None:
    """A line of server-sent events."""
    if line == "data: [DONE]":
        seen.whole = True
    elif line.startswith("data: "):
        content = json.loads(line.removeprefix("data: "))
        if "error" in content:
            seen.error = content["error"]["code"] or "broken"
            return
        _note(content, seen)
        seen.tokens += sum((choice["delta"].get("content") or "").count(" n") for choice in content["choices"])


def _note(content: dict[str, Any], seen: Attempt) -> None:
    seen.request_id = "req_" + content["id"].removeprefix("chatcmpl-")
    if usage := content.get("usage"):
        seen.usage = usage["prompt_tokens"], usage["completion_tokens"]


def outcomes(attempts: Sequence[Attempt]) -> Counter[str]:
    """How many attempts ended how, from their callers' side."""
    return Counter(map(_outcome, attempts))


def _outcome(attempt: Attempt) -> str:
    if attempt.whole:
        return "replayed" if attempt.replayed else "answered whole"
    if attempt.left:
        return "left"
    return "broken off" if attempt.status == 200 else f"refused: {attempt.error}" if attempt.status else "unanswered"
