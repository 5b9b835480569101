"""Stages in processes of their own: the tokens of transformers whatever the cut, the batch, the pool, the guesses; and a death."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from deployments.engine.checkpoint import inspect
from deployments.engine.local import LocalEngine
from deployments.engine.rendezvous import Rendezvous
from deployments.engine.shard import Shard
from deployments.engine.shard_spec import ShardSpec
from tests.deployments.engine import families
from tests.deployments.engine.families import build, reference
from tests.deployments.engine.ranks import run_on_ranks
from tests.deployments.engine.test_local import FEW_BLOCKS, GREEDY, REPORTED, ROOMY, TIGHT, prompts, through

pytestmark = pytest.mark.timeout(280)
Models = dict[str, tuple[Path, list[list[int]]]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    directories = {family: build(family, root / family) for family in ("llama", "gemma2", "gpt_neox")}
    return {family: (path, reference(path, prompts(), 12)) for family, path in directories.items()}


def check(models: Models, paths: dict[str, str], cache: Path, *, tp: int, pp: int, shares: bool = False) -> None:
    """In chunks, with preemption, several steps at once, with right and wrong guesses. `paths`: torch or native, by family."""
    more = {"speculation": 0, "cache": cache, "shared_memory": shares}
    settings = {family: through(path, TIGHT).model_copy(update=more) for family, path in paths.items()}
    blocks = {family: FEW_BLOCKS[path] for family, path in paths.items()}
    known = {family: models[family][0] for family in paths}
    for family, report in run_on_ranks(known, prompts(), settings, num_blocks=blocks, tp=tp, pp=pp).items():
        directory, expected = models[family]
        assert report.tokens == expected, family
        assert report.guessed == expected, family
        assert report.accepted > 10
        assert report.preemptions > 0 or paths[family] == "native"
        with LocalEngine(directory, settings=through(paths[family], ROOMY)) as one:
            answers = one.generate(prompts(), REPORTED)
            assert report.weight_bytes < 0.85 * one.shard.runner.weight_bytes
        for result, logprobs in zip(answers, report.logprobs, strict=True):
            torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(result.logprobs), rtol=1e-4, atol=1e-4)


def test_two_stages_give_the_tokens_of_transformers(models: Models, cache: Path) -> None:
    """Words tied in one of them: gemma2."""
    check(models, {"llama": "native", "gemma2": "torch", "gpt_neox": "torch"}, cache, tp=1, pp=2)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "shares"), [("torch", False), ("native", True)])
def test_two_stages_of_two_parts_give_the_tokens_of_transformers(models: Models, cache: Path, path: str, shares: bool) -> None:
    check(models, {"llama": path, "gemma2": path}, cache, tp=2, pp=2, shares=shares)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["torch", "native"])
def test_three_stages_give_the_tokens_of_transformers(
    tmp_path: Path, cache: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(families.FAMILIES, "llama", families.FAMILIES["llama"] | {"num_hidden_layers": 5})
    directory = build("llama", tmp_path / "llama")
    check({"llama": (directory, reference(directory, prompts(), 12))}, {"llama": path}, cache, tp=1, pp=3)


def _rank(spec: ShardSpec, rank: int, pipe: Connection) -> None:
    """Leads or follows until somebody is killed, and says with what it ended."""
    spec = spec.for_rank(rank)
    try:
        if rank == 0:
            engine = LocalEngine.leading(spec)
            pipe.send("ready")
            while True:
                engine.generate(prompts(), GREEDY)
        else:
            shard = Shard(spec)
            pipe.send("ready")
            shard.follow()
    except BaseException as error:
        pipe.send(type(error).__name__)
        raise


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_killed_stage_ends_all_others(tmp_path: Path, killed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.FAMILIES, "llama", families.FAMILIES["llama"] | {"num_hidden_layers": 3})
    directory, spawn = build("llama", tmp_path / "llama"), multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as meeting:
        rendezvous = Rendezvous(f"file://{meeting}/{Path(meeting).name}", 0, 3, 60, 3)
        model = inspect(directory, tp=1, pp=3, dtype="float32")
        spec = ShardSpec(directory, model, 100, 1, through("torch", ROOMY), rendezvous)
        pipes = [spawn.Pipe() for _ in range(3)]
        ranks = [spawn.Process(target=_rank, args=(spec, rank, pipes[rank][1]), daemon=True) for rank in range(3)]
        for process in ranks:
            process.start()
        try:
            assert [ours.poll(100) and ours.recv() for ours, _ in pipes] == ["ready"] * 3
            time.sleep(0.5)
            os.kill(ranks[killed].pid or 0, signal.SIGKILL)
            for rank in {0, 1, 2} - {killed}:
                assert pipes[rank][0].poll(10), f"rank {rank} didn't notice"
        finally:
            for process in ranks:
                process.kill()
