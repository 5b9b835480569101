"""The engine without Ray or Serve: rank 0 in this process, the others in children. For tests, benchmarks and offline use."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from cluster.errors import PlatformError
from cluster.settings import EngineSettings
from cluster.types import FinishReason, Quantization, Sampling
from deployments.engine.adapter_files import content_digest
from deployments.engine.checkpoint import inspect
from deployments.engine.device import multiplies, reserved, visible_gpus
from deployments.engine.engine import Engine
from deployments.engine.lead import obey
from deployments.engine.messages import AdapterUse, Output, Request
from deployments.engine.orders import AwaitAdapter, DropAdapter, InstallAdapter, Order, ReadAdapter
from deployments.engine.rendezvous import Rendezvous
from deployments.engine.sequence import NO_TOKEN
from deployments.engine.shard import Shard
from deployments.engine.shard_spec import ShardSpec, num_blocks
from deployments.engine.structured import Grammars


@dataclass(slots=True)
class Generation:
    """One finished answer; times are seconds since the request got its place in the batch."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0  # of the prompt
    compute_us: int = 0  # of the steps' time, what was for it
    started_at: float = 0.0
    first_token_s: float = 0.0
    finished_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)


class LocalEngine:
    """A model on `tp` x `pp` ranks of this machine, held until `close`."""

    def __init__(
        self,
        directory: str | Path,
        *,
        tp: int = 1,
        pp: int = 1,
        dtype: str = "float32",
        settings: EngineSettings | None = None,
        blocks: int | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        settings = settings or EngineSettings()
        info = inspect(Path(directory), tp=tp, pp=pp, dtype=dtype, quantization=quantization)
        settings = reserved(settings, tp * pp, visible_gpus() * settings.gpus_per_shard)
        multiplies(quantization, settings.device)
        self._meeting: tempfile.TemporaryDirectory[str] | None = tempfile.TemporaryDirectory(prefix="mmaas-")
        spec = ShardSpec(
            directory=Path(directory),
            model=info,
            num_blocks=blocks or num_blocks(info, settings),
            threads=settings.threads or max(1, (os.cpu_count() or 1) // (tp * pp)),
            settings=settings,
            gpu=0 if settings.device == "cuda" else None,
            exactly=blocks is not None,
            rendezvous=Rendezvous(
                f"file://{self._meeting.name}/{Path(self._meeting.name).name}", 0, tp * pp, settings.start_deadline_s, pp
            ),
        )
        spawn = multiprocessing.get_context("spawn")
        self._followers = [spawn.Process(target=follow, args=(spec.for_rank(rank),), daemon=True) for rank in range(1, tp * pp)]
        for follower in self._followers:
            follower.start()
        self._lead(spec)

    @classmethod
    def leading(cls, spec: ShardSpec) -> LocalEngine:
        """Around rank 0 only; whoever calls runs `follow` in the other ranks' processes."""
        engine = cls.__new__(cls)
        engine._meeting, engine._followers = None, []
        engine._lead(spec)
        return engine

    def _lead(self, spec: ShardSpec) -> None:
        self.shard = Shard(spec)
        spec = self.shard.spec  # with the blocks that fit
        self.engine = Engine.of(
            self.shard.execute,
            spec.num_blocks,
            spec.settings,
            sampler=self.shard.sampler,
            grammars=Grammars(spec.directory),
            launch=self.shard.launch,
            depth=self.shard.depth,
        )
        self.info = spec.model

    def put_adapter(self, slot: int, directory: Path) -> AdapterUse:
        """Read an adapter into a slot (from 1) on every rank. Raises PlatformError when one can't, and leaves the slot empty."""
        self.shard.command(ReadAdapter(slot, str(directory)))
        while not self._is_read(slot):
            time.sleep(0.005)
        try:
            self.shard.command(InstallAdapter(slot))
        except PlatformError:
            self.shard.command(DropAdapter(slot))
            raise
        return AdapterUse(slot, content_digest(directory))

    def _is_read(self, slot: int) -> bool:
        try:
            self.shard.command(AwaitAdapter(slot))
        except PlatformError:
            return False
        return True

    def generate(
        self,
        prompts: Items[list[int]],
        sampling: Sampling | Items[Sampling],
        *,
        concurrency: int | None = None,
        adapters: Items[AdapterUse | None] = (),
    ) -> list[Generation]:
        """Answer every prompt (its first choice), at most `concurrency` at a time. Results are in the order of the prompts.
        `adapters`: one for each prompt, or none at all."""
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        results = [Generation() for _ in prompts]
        waiting = deque(range(len(prompts)))
        running = 0
        while waiting or running:
            while waiting and running < (concurrency or len(prompts)):
                number = waiting.popleft()
                results[number].started_at = time.perf_counter()
                adapter = adapters[number] if adapters else None
                self.engine.add(self._request(number, prompts[number], samplings[number], adapter))
                running += 1
            for output in self.engine.step():
                self._take(results[output.request_id], output)
                running -= output.finish_reason is not None
        return results

    def obey(self, order: Order) -> None:
        """Have every rank obey. Raises PlatformError when one could not; the group goes on as before."""
        obey(self.shard, self.engine, order)

    def close(self) -> None:
        """End the other ranks."""
        self.engine.drain()
        self.shard.stop()
        for follower in self._followers:
            follower.join(10)
            follower.kill()
        self._followers.clear()
        if self._meeting:
            self._meeting.cleanup()
            self._meeting = None

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _request(self, number: int, prompt: list[int], sampling: Sampling, adapter: AdapterUse | None) -> Request:
        room = self.info.max_model_len - len(prompt)
        return Request(
            id=number,
            prompt=prompt,
            sampling=sampling,
            max_tokens=min(sampling.max_tokens or room, room),
            stop_ids=list(sampling.stop_token_ids),
            seed=sampling.seed or 0,
            adapter=adapter,
        )

    @staticmethod
    def _take(result: Generation, output: Output) -> None:
        now = time.perf_counter() - result.started_at
        result.first_token_s = result.first_token_s or now
        if output.token != NO_TOKEN:
            result.token_ids.append(output.token)
            result.token_times_s.append(now)
        result.cached_tokens += output.cached
        result.compute_us = output.compute_us
        if output.logprob is not None:
            result.logprobs.append(output.logprob)
        if output.finish_reason:
            result.finish_reason, result.finished_s = output.finish_reason, now


def follow(spec: ShardSpec) -> None:
    """A rank above 0, until the leader stops."""
    Shard(spec).follow()
