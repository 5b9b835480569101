"""Two real ranks in two processes, one model after the other."""

from __future__ import annotations

import multiprocessing
import tempfile
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path

from cluster.settings import EngineSettings
from cluster.types import Constraint, Sampling
from deployments.engine.checkpoint import inspect
from deployments.engine.local import LocalEngine, follow
from deployments.engine.rendezvous import Rendezvous
from deployments.engine.shard import ShardSpec
from tests.deployments.engine.guesses import Guesses

FORM = r"(yes|no), [0-9]{2}%"
FORMED = Sampling(temperature=1.0, max_tokens=12, seed=1, constraint=Constraint("regex", FORM))


@dataclass(frozen=True)
class Report:
    """What the leader saw."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    guessed: list[list[int]]  # the tokens of a second round, in which right and wrong guesses are tried
    accepted: int  # guesses in it
    preemptions: int
    weight_bytes: int  # on the leader
    formed: list[list[int]]  # answers that must match the expression `FORM`


def run_on_two_ranks(
    directories: dict[str, Path], prompts: list[list[int]], settings: EngineSettings, *, num_blocks: int
) -> dict[str, Report]:
    """Greedy answers of 12 tokens from every model."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as meeting:
        specs = {
            family: ShardSpec(
                directory=directory,
                model=inspect(directory, tp=2, dtype="float32"),
                num_blocks=num_blocks,
                threads=1,
                settings=settings,
                rendezvous=Rendezvous(f"file://{meeting}/{Path(meeting).name}", 0, 2, 60),
            )
            for family, directory in directories.items()
        }
        reports: Queue[dict[str, Report]] = spawn.Queue()
        leader = spawn.Process(target=_lead, args=(specs, prompts, reports), daemon=True)
        follower = spawn.Process(target=_follow, args=(specs,), daemon=True)
        leader.start()
        follower.start()
        try:
            result = reports.get(timeout=240)
            leader.join(20)
            follower.join(20)
            assert (leader.exitcode, follower.exitcode) == (0, 0), "a rank didn't end by itself"
        finally:
            leader.kill()
            follower.kill()
    return result


def _lead(specs: dict[str, ShardSpec], prompts: list[list[int]], reports: Queue[dict[str, Report]]) -> None:
    result = {}
    for family, spec in specs.items():
        engine = LocalEngine.leading(spec)
        answers = engine.generate(prompts, Sampling(temperature=0.0, max_tokens=12, logprobs=0))
        preemptions = engine.engine.stats().preemptions
        engine.engine.speculation = Guesses({(number, 0): answer.token_ids for number, answer in enumerate(answers)})
        guessed = engine.generate(prompts, Sampling(temperature=0.0, max_tokens=12))
        result[family] = Report(
            [answer.token_ids for answer in answers],
            [answer.logprobs for answer in answers],
            [answer.token_ids for answer in guessed],
            engine.engine.stats().accepted_tokens,
            preemptions,
            engine.shard.runner.weight_bytes,
            [answer.token_ids for answer in engine.generate(prompts, FORMED)],
        )
        engine.close()
    reports.put(result)


def _follow(specs: dict[str, ShardSpec]) -> None:
    for spec in specs.values():
        follow(spec.for_rank(1))
