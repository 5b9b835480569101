"""Real ranks in processes of their own, one model after the other."""

from __future__ import annotations

import multiprocessing
import tempfile
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path

from cluster.settings import EngineSettings
from cluster.types import Constraint, Quantization, Sampling
from deployments.engine.checkpoint import inspect
from deployments.engine.local import LocalEngine, follow
from deployments.engine.rendezvous import Rendezvous
from deployments.engine.shard_spec import ShardSpec
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
    waited_s: float = 0.0  # of the leader, for the stage before it


def run_on_two_ranks(
    directories: dict[str, Path],
    prompts: list[list[int]],
    settings: EngineSettings,
    *,
    num_blocks: int,
    quantization: Quantization | None = None,
) -> dict[str, Report]:
    return run_on_ranks(directories, prompts, settings, num_blocks=num_blocks, tp=2, quantization=quantization)


def run_on_ranks(
    directories: dict[str, Path],
    prompts: list[list[int]],
    settings: EngineSettings | dict[str, EngineSettings],
    *,
    num_blocks: int | dict[str, int],
    tp: int = 1,
    pp: int = 1,
    quantization: Quantization | None = None,
) -> dict[str, Report]:
    """Greedy answers of 12 tokens from every model; settings and blocks are for all, or for each."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as meeting:
        specs = {
            family: ShardSpec(
                directory=directory,
                model=inspect(directory, tp=tp, pp=pp, dtype="float32", quantization=quantization),
                num_blocks=num_blocks if isinstance(num_blocks, int) else num_blocks[family],
                threads=1,
                settings=settings if isinstance(settings, EngineSettings) else settings[family],
                rendezvous=Rendezvous(f"file://{meeting}/{Path(meeting).name}", 0, tp * pp, 60, pp),
            )
            for family, directory in directories.items()
        }
        reports: Queue[dict[str, Report]] = spawn.Queue()
        leader = spawn.Process(target=_lead, args=(specs, prompts, reports), daemon=True)
        ranks = [leader, *[spawn.Process(target=_follow, args=(specs, rank), daemon=True) for rank in range(1, tp * pp)]]
        for process in ranks:
            process.start()
        try:
            result = reports.get(timeout=240)
            for process in ranks:
                process.join(20)
            assert [process.exitcode for process in ranks] == [0] * len(ranks), "a rank didn't end by itself"
        finally:
            for process in ranks:
                process.kill()
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
            engine.shard.handover.waited_s if engine.shard.handover else 0.0,
        )
        engine.close()
    reports.put(result)


def _follow(specs: dict[str, ShardSpec], rank: int) -> None:
    for spec in specs.values():
        follow(spec.for_rank(rank))
