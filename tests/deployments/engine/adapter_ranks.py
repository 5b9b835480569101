"""Two real ranks in two processes that answer with adapters and without, through torch and through the compiled decoder."""

from __future__ import annotations

import multiprocessing
import tempfile
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path

from cluster.errors import PlatformError
from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine.checkpoint import inspect
from deployments.engine.local import LocalEngine, follow
from deployments.engine.rendezvous import Rendezvous
from deployments.engine.shard_spec import ShardSpec


@dataclass(frozen=True)
class Case:
    """One model with its adapters, of which every fourth prompt gets none, the next one the first, and so on."""

    base: Path
    adapters: tuple[Path, ...]
    refused: Path
    settings: EngineSettings
    num_blocks: int


@dataclass(frozen=True)
class Report:
    """What the leader saw."""

    tokens: list[list[int]]
    refusal: str


def run_on_two_ranks(cases: dict[str, Case], prompts: list[list[int]], num_tokens: int) -> dict[str, Report]:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as meeting:
        rendezvous = Rendezvous(f"file://{meeting}/{Path(meeting).name}", 0, 2, 60)
        specs = {
            name: ShardSpec(case.base, inspect(case.base, tp=2, dtype="float32"), case.num_blocks, 1, case.settings, rendezvous)
            for name, case in cases.items()
        }
        reports: Queue[dict[str, Report]] = spawn.Queue()
        leader = spawn.Process(target=_lead, args=(specs, cases, prompts, num_tokens, reports), daemon=True)
        follower = spawn.Process(target=_follow, args=(specs,), daemon=True)
        leader.start()
        follower.start()
        try:
            result = reports.get(timeout=200)
            leader.join(20)
            follower.join(20)
            assert (leader.exitcode, follower.exitcode) == (0, 0), "a rank didn't end by itself"
        finally:
            leader.kill()
            follower.kill()
    return result


def _lead(
    specs: dict[str, ShardSpec],
    cases: dict[str, Case],
    prompts: list[list[int]],
    num_tokens: int,
    reports: Queue[dict[str, Report]],
) -> None:
    result = {}
    for name, case in cases.items():
        engine = LocalEngine.leading(specs[name])
        uses = [None, *(engine.put_adapter(slot, path) for slot, path in enumerate(case.adapters, 1))]
        try:
            engine.put_adapter(1, case.refused)
            refusal = ""
        except PlatformError as error:
            refusal = error.message
            engine.put_adapter(1, case.adapters[0])
        chosen = [uses[number % len(uses)] for number in range(len(prompts))]
        answers = engine.generate(prompts, Sampling(temperature=0.0, max_tokens=num_tokens), adapters=chosen)
        result[name] = Report([answer.token_ids for answer in answers], refusal)
        engine.close()
    reports.put(result)


def _follow(specs: dict[str, ShardSpec]) -> None:
    for spec in specs.values():
        follow(spec.for_rank(1))
