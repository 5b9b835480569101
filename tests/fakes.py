"""Small real implementations of our own interfaces, for tests. A fake works; what it does can be set from outside."""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from cluster import metrics
from cluster.errors import ModelNotFound, ModelNotSupported, Unauthenticated, Unavailable
from cluster.settings import Settings
from cluster.tenancy.gcra import EMPTY, Bucket
from cluster.tenancy.permissions import expand
from cluster.tenancy.pools import Answer, Ask, draw_rate, draw_slots
from cluster.types import (
    Adapter,
    Chunk,
    Constraint,
    Delta,
    Deployment,
    Encode,
    Encoded,
    Generate,
    Predict,
    Predicted,
    Principal,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from deployments.adapters import Adapters, Found
from deployments.engine.messages import Output, Request
from deployments.engine.tokenizer import Tokenizer
from deployments.models import Facts
from deployments.slots import Slots
from deployments.tools.formats import find_format
from mmaas.up import Platform

WORD_US = 1000
"""What a word of an echo has cost."""

ECHO = Deployment(name="echo", model="models:/echo@champion", created_at=1_700_000_000.0)


def echo_chunks(request: Generate) -> Iterator[Chunk]:
    """Repeats the last message or the prompt, a word a token, up to `max_tokens` or a stop string; every choice alike."""
    sampling, words, reason = request.sampling, _words(request), "stop"
    if sampling.max_tokens is not None and sampling.max_tokens < len(words):
        words, reason = words[: sampling.max_tokens], "length"
    for stop in sampling.stop:
        if any(stop in word for word in words):
            words = words[: next(i for i, word in enumerate(words) if stop in word)]
            reason = "stop"
    begun: Usage | None = Usage(prompt_tokens=7, completion_tokens=0, cached_tokens=3)
    for word in words:
        logprobs = (_logprob(word, sampling.logprobs),) if sampling.logprobs is not None else ()
        deltas = tuple(Delta(i, word, token_ids=(len(word),), logprobs=logprobs) for i in range(sampling.n))
        yield Chunk(deltas, begun=begun, compute_us=WORD_US)
        begun = None
    usage = Usage(7, len(words) * sampling.n, cached_tokens=3, compute_us=len(words) * WORD_US)
    yield Chunk(tuple(Delta(i, "", finish_reason=reason) for i in range(sampling.n)), usage, begun)


def _words(request: Generate) -> list[str]:
    if request.prompt_ids is not None:
        return [f"<{token}>" for token in request.prompt_ids]
    text = request.prompt if request.prompt is not None else request.messages[-1].content
    first, *rest = text.split(" ")
    return [first, *(f" {word}" for word in rest)] if text else []


def _logprob(word: str, k: int) -> TokenLogprob:
    top = tuple(TopLogprob(f"{word}{i or ''}", f"{word}{i or ''}".encode(), -0.5 - i) for i in range(k))
    return TokenLogprob(word, word.encode(), -0.5, top)


def with_failures(chunks: Iterator[Chunk], fails: Mapping[int, int]) -> Iterator[Chunk]:
    """A choice ends with `error` in the place of the given chunk."""
    for number, chunk in enumerate(chunks):
        kept = [delta for delta in chunk.deltas if number < fails.get(delta.index, number + 1)]
        ends = [Delta(index, "", finish_reason="error") for index, last in fails.items() if number == last]
        yield replace(chunk, deltas=(*kept, *ends))


class EchoModels:
    """`Models` with one model, `echo`. The attributes say how slow it is and where it fails."""

    def __init__(self, deployments: Sequence[Deployment] = (ECHO,)) -> None:
        self.deployments = list(deployments)
        self.adapted: list[Adapter] = []
        self.first_delay_s = 0.0
        self.delay_s = 0.0
        self.error: Exception | None = None
        self.fail_after = 0  # chunks before `error`
        self.healthy = True
        self.sleeping: set[str] = set()
        self.fails: dict[int, int] = {}  # choices that the model fails on, and at which chunk
        self.requests: list[Generate] = []
        self.encoded: list[Encode] = []
        self.open = 0  # streams that run now
        self.version: str | None = "1"
        self.room: int | None = None

    async def facts(self, name: str) -> Facts | None:
        if name not in {deployment.name for deployment in self.deployments} | {adapter.model for adapter in self.adapted}:
            raise ModelNotFound(f"The model {name!r} does not exist.", param="model")
        return Facts(self.version, self.room) if self.version else None

    async def list(self) -> Sequence[Deployment]:
        return self.deployments

    async def adapters(self) -> Sequence[Adapter]:
        return self.adapted

    async def stats(self) -> dict[str, dict[str, float]]:
        return {deployment.name: dict.fromkeys(metrics.ENGINE, 1.0) for deployment in self.deployments}

    async def ready(self) -> dict[str, bool]:
        return {deployment.name: self.healthy for deployment in self.deployments}

    async def asleep(self) -> list[str]:
        return sorted(self.sleeping)

    async def tell(self, name: str, word: str) -> None:
        if name not in {deployment.name for deployment in self.deployments}:
            raise ModelNotFound(f"The model {name!r} does not exist.", param="model")
        (self.sleeping.add if word == "sleep" else self.sleeping.discard)(name)

    async def info(self, name: str) -> Mapping[str, Any]:
        if name not in {deployment.name for deployment in self.deployments} | {adapter.model for adapter in self.adapted}:
            raise ModelNotFound(f"The model {name!r} does not exist.", param="model")
        if not self.healthy:
            raise Unavailable(f"The model {name!r} can't answer now.", retry_after_s=1.0)
        return {"name": name, "model_type": "echo"}

    async def predict(self, name: str, request: Predict) -> Predicted:
        await self.info(name)
        raise ModelNotSupported(f"{name} is a language model, which takes text and no tensors.", param="model")

    async def generate(self, name: str, request: Generate) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        if name not in {deployment.name for deployment in self.deployments} | {adapter.model for adapter in self.adapted}:
            raise ModelNotFound(f"The model {name!r} does not exist.", param="model")
        self.open += 1
        try:
            await asyncio.sleep(self.first_delay_s)
            for number, chunk in enumerate(with_failures(echo_chunks(request), self.fails)):
                if self.error is not None and number >= self.fail_after:
                    raise self.error
                yield chunk
                if chunk.usage is None:  # after the last there is nothing to wait for
                    await asyncio.sleep(self.delay_s)
        finally:
            self.open -= 1

    async def encode(self, name: str, request: Encode) -> Encoded:
        """Counts: an embedding is (characters or tokens, words, place); a score their share of the query's words."""
        self.encoded.append(request)
        if name not in {deployment.name for deployment in self.deployments}:
            raise ModelNotFound(f"The model {name!r} does not exist.", param="model")
        self.open += 1
        try:
            await asyncio.sleep(self.first_delay_s)
            if self.error is not None:
                raise self.error
            rows = [_numbers(request, item, place) for place, item in enumerate(request.texts or request.ids)]
        finally:
            self.open -= 1
        usage = Usage(sum(len(item) for item in request.texts or request.ids), 0)
        labels = ("short", "long") if request.task == "classify" else ()
        return Encoded(b"".join(struct.pack(f"<{len(row)}f", *row) for row in rows), len(rows[0]), usage, labels)


def _numbers(request: Encode, item: str | tuple[int, ...], place: int) -> list[float]:
    if request.task == "embed":
        return [float(len(item)), float(len(item.split())) if isinstance(item, str) else 0.5, float(place)]
    asked = set((request.query or "").split())
    fit = len(asked & set(str(item).split())) / max(1, len(asked))
    return [fit] if request.task == "rerank" else [1.0 - min(1.0, len(item) / 8), min(1.0, len(item) / 8)]


class ScriptedEngine:
    """The engine as a replica sees it. Says one of the `scripts` a choice, `at_once` tokens at a time, whatever it was asked; keeps
    the `requests`."""

    def __init__(self, at_once: int = 1) -> None:
        self.scripts: list[list[int]] = []
        self.requests: list[Request] = []
        self.num_streams = 0
        self.at_once = at_once
        self._ids = itertools.count()
        self._stopped: set[tuple[int, int]] = set()

    def next_id(self) -> int:
        return next(self._ids)

    def abort(self, request_id: int, index: int) -> None:
        self._stopped.add((request_id, index))

    async def generate(self, request: Request) -> AsyncGenerator[list[Output], None]:
        self.requests.append(request)
        longest = max(map(len, self.scripts))
        for start in range(0, longest, self.at_once):
            chosen = [
                output
                for index, script in zip(range(request.sampling.n), itertools.cycle(self.scripts), strict=False)
                if (request.id, index) not in self._stopped
                for output in _outputs(request, index, script, range(start, start + self.at_once))
            ]
            if chosen:
                yield chosen


def _outputs(request: Request, index: int, script: list[int], places: range) -> Iterator[Output]:
    end = min(len(script), request.max_tokens)
    for place in places:
        if place < end:
            token = script[place]
            reason = "stop" if token in request.stop_ids else "length" if place == end - 1 else None
            logprob = -0.5 if request.sampling.logprobs is not None else None
            yield Output(request.id, index, token, logprob=logprob, finish_reason=reason)


@dataclass
class AwakeLife:
    """A replica's life without an end: its engine is there."""

    engine: Any
    state: str = "awake"

    def wanted(self) -> None: ...

    async def wake(self) -> None: ...


def _no_adapter(adapter: Adapter) -> Found:
    raise ModelNotFound(f"The model {adapter.model!r} does not exist.", param="model")


async def _no_ranks(order: object) -> None:
    raise AssertionError("there is no rank to order about")


class ReplicaModels(EchoModels):
    """`Models` over a replica's own code, with a scripted engine behind it and a tokenizer from a directory. No weights."""

    def __init__(self, directory: Path, name: str = "caller") -> None:
        from deployments.llm import LLM  # brings Ray, which other fakes don't need

        super().__init__([Deployment(name=name, model="models:/caller@champion", created_at=1_700_000_000.0)])
        self.engine = ScriptedEngine()
        self.tokenizer = Tokenizer.load(directory)
        self.admitted: list[Constraint] = []
        replica: LLM = object.__new__(LLM)
        replica._settings, replica._deployment = Settings(), self.deployments[0]
        replica._tokenizer, replica._tools = self.tokenizer, find_format(self.tokenizer)
        replica._cache_secret, replica._defaults, replica._room = b"secret", {}, 100_000
        replica._model = SimpleNamespace(vocab_size=self.tokenizer.vocab_size)  # type: ignore[assignment]
        replica._life = AwakeLife(self.engine)  # type: ignore[assignment]
        replica._adapters = Adapters(find=_no_adapter, order=_no_ranks, slots=Slots(0, 0))
        replica._admission = SimpleNamespace(admit=self._admit)  # type: ignore[attr-defined]
        self.replica = replica

    async def _admit(self, constraint: Constraint, tenant: bytes = b"") -> None:
        self.admitted.append(constraint)

    def say(self, *answers: str) -> None:
        """What the choices say. Control tokens are written as they are; an end of turn follows."""
        end = min(self.tokenizer.eos_ids)
        self.engine.scripts = [[*self.tokenizer._library.encode(text, add_special_tokens=False).ids, end] for text in answers]

    @property
    def asked(self) -> str:
        """The last prompt, with control tokens by name."""
        special, prompt = self.tokenizer.special_ids, self.engine.requests[-1].prompt
        known = [self.tokenizer.token_text(i).encode() if i in special else self.tokenizer.token_bytes(i) for i in prompt]
        return b"".join(known).decode()

    async def generate(self, name: str, request: Generate) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        async for chunk in self.replica.generate(request):
            yield chunk


class KeyRing:
    """`verify` over a dictionary of keys: two of the project `acme`, one of its organization. Counts look-ups."""

    USER = "mk_user_0123456789"
    ADMIN = "mk_admin_0123456789"
    OWNER = "mk_owner_0123456789"

    def __init__(self) -> None:
        self.principals = {
            self.USER: Principal("acme", "key_user", frozenset({"inference"}), "default"),
            self.ADMIN: Principal("acme", "key_admin", frozenset({"inference", "admin"}), "default"),
            self.OWNER: Principal("", "key_owner", expand({"organization"}), "default"),
            "mk_no_scope_012345": Principal("acme", "key_none", frozenset()),
        }
        self.lookups = 0

    def verify(self, text: str) -> Principal:
        self.lookups += 1
        if text not in self.principals:
            raise Unauthenticated("Incorrect API key provided.")
        return self.principals[text]


class MemoryPools:
    """Pools without a store. Time is what the test says; counts transactions."""

    def __init__(self, clock_us: Callable[[], int]) -> None:
        self._clock = clock_us
        self.buckets: dict[str, Bucket] = {}
        self.slots: dict[str, dict[str, int]] = {}
        self.draws = 0
        self.error: Exception | None = None

    def draw(self, holder: str, asks: Sequence[Ask]) -> list[Answer]:
        if self.error is not None:
            raise self.error
        self.draws += 1
        return [self._draw(holder, ask) for ask in asks]

    def _draw(self, holder: str, ask: Ask) -> Answer:
        if ask.kind == "streams":
            held = self.slots.setdefault(ask.name, {})
            answer = draw_slots(ask, sum(slots for other, slots in held.items() if other != holder))
            held[holder] = ask.holds + answer.granted
            return answer
        self.buckets[ask.name], answer = draw_rate(ask, self.buckets.get(ask.name, EMPTY), self._clock())
        return answer


@dataclass
class FakePlatform(Platform):
    """A platform without processes: remembers the steps that were taken, and runs once it was started and applied to."""

    steps: list[str] = field(default_factory=list)
    is_started: bool = False
    champion: bool = False
    applied: int = 0
    has_package: bool = True

    def start(self, settings: Settings, on_event: Callable[[str], None]) -> list[str]:
        if self.is_started:
            return []
        self.is_started = True
        self.steps.append("start")
        on_event("starting Ray")
        return ["ray", "mlflow"]

    def has_champion(self, settings: Settings) -> bool:
        return self.champion

    def train(self, settings: Settings, console: Console) -> None:
        self.steps.append("train")
        self.champion = True

    def register_encoder(self, settings: Settings) -> bool:
        self.steps.append("register")
        return self.has_package

    def register_table(self, settings: Settings) -> None:
        self.steps.append("table")

    def is_serving(self, settings: Settings, names: list[str]) -> bool:
        return self.applied > 0

    def apply(self, settings: Settings, on_event: Callable[[str], None]) -> None:
        self.steps.append("apply")
        self.applied += 1
