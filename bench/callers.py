"""Callers of gateways that are killed under them: whole answers and streams, with and without `Idempotency-Key`, some hang up.

Each writes down what it saw. One with a key comes back until it has its answer, and now and then once more; one without gives up.
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


@dataclass(frozen=True, slots=True)
class Asked:
    """One call: asked for again, it is the same. The key is that of a project."""

    nonce: str
    key: str
    tokens: int
    has_key: bool
    streams: bool


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
    _returning: list[asyncio.Task[None]] = field(default_factory=list)

    async def run(self, count: int) -> None:
        """Until `stopped`, and then until every call with a key has its answer."""
        async with httpx.AsyncClient(verify=False, timeout=120, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            await asyncio.gather(*(self._call_on(client) for _ in range(count)))
            await asyncio.gather(*self._returning)

    async def _call_on(self, client: httpx.AsyncClient) -> None:
        while not self.stopped:
            self._made += 1
            asked = Asked(
                f"n{self._made}",
                self.rng.choice(self.keys),
                self.rng.randint(1, self.most_tokens),
                has_key=self.rng.random() < 0.4,
                streams=self.rng.random() < 0.5,
            )
            attempt = await self._ask(client, asked)
            if asked.has_key and not (_is_over(attempt) and self.rng.random() < 0.8):
                self._returning.append(asyncio.ensure_future(self._return(client, asked)))
            if attempt.error or not attempt.status:
                await asyncio.sleep(self.rng.uniform(0.1, 0.5))

    async def _return(self, client: httpx.AsyncClient, asked: Asked) -> None:
        """With its key, until there is an answer; beside other calls, for a dead gateway's lease is long."""
        attempt = None
        while attempt is None or not _is_over(attempt):
            await asyncio.sleep(self.rng.uniform(0.5, 2.5))
            attempt = await self._ask(client, asked)

    async def _ask(self, client: httpx.AsyncClient, asked: Asked) -> Attempt:
        attempt = Attempt(asked.nonce, asked.has_key, asked.streams, time.monotonic())
        patience = self.rng.uniform(0, asked.tokens * self.pause_s) if self.rng.random() < 0.15 else None
        body = {
            "model": MODEL.name,
            "messages": [{"role": "user", "content": f"{asked.nonce} {self.pause_s}"}],
            "max_tokens": asked.tokens,
            "stream": asked.streams,
            **({"stream_options": {"include_usage": True}} if asked.streams else {}),
        }
        headers = {"Authorization": f"Bearer {asked.key}", **({"Idempotency-Key": asked.nonce} if asked.has_key else {})}
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


def _is_over(attempt: Attempt) -> bool:
    return attempt.whole or attempt.error == "insufficient_quota"


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
