"""What a group does between two steps: on one rank and on two, through torch and through the compiled decoder.

Two ranks are one pair of processes for everything that is asked of them, because joining a group costs seconds.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import Conflict, ModelNotServable, PlatformError, Unavailable
from cluster.settings import EngineSettings
from cluster.types import Sampling
from deployments.engine import memory
from deployments.engine.checkpoint import inspect
from deployments.engine.local import LocalEngine
from deployments.engine.orders import Look, Order, Sleep, Swap, Wake, pack, unpack
from deployments.engine.rendezvous import Rendezvous
from deployments.engine.shard import Shard
from deployments.engine.shard_spec import ShardSpec
from tests.deployments.engine.families import FAMILIES, build, reference
from tests.deployments.engine.test_poison import BATCH, HEALTHY, PATHS, SETTINGS, check, poison

GREEDY = Sampling(temperature=0.0, max_tokens=12)
pytestmark = pytest.mark.timeout(240)


@dataclass(frozen=True)
class Models:
    """Two of the same shape with what transformers says of them, one of another shape, one with a NaN where no probe looks."""

    first: Path
    second: Path
    wider: Path
    ill: Path
    of_first: list[list[int]]
    of_second: list[list[int]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    first, second = build("llama", root / "first"), build("llama", root / "second", seed=1)
    ill = damaged(second, root / "ill")
    wider = build("qwen3", root / "wider")
    return Models(first, second, wider, ill, reference(first, HEALTHY, 12), reference(second, HEALTHY, 12))


def damaged(model: Path, directory: Path) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][250] = torch.nan
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def said(engine: LocalEngine) -> list[list[int]]:
    return [answer.token_ids for answer in engine.generate(HEALTHY, GREEDY)]


@dataclass
class Report:
    """What the leader saw."""

    tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    poisoned: Any = None


def live(engine: LocalEngine, models: Models, report: Report) -> None:
    """One life. After each event every prompt is asked."""

    def after(event: str) -> None:
        report.tokens[event] = said(engine)
        engine.engine.scheduler.check_integrity()

    def refuse(event: str, order: Order) -> None:
        try:
            engine.obey(order)
        except PlatformError as error:
            report.refused[event] = error.message
        after(event)

    after("load")
    engine.obey(Sleep())
    assert engine.shard.is_asleep
    with pytest.raises(Unavailable):
        said(engine)
    for number in range(len(HEALTHY)):
        engine.engine.abort(number)
    engine.obey(Sleep())
    engine.obey(Wake())
    engine.obey(Wake())
    report.cached["wake"] = engine.engine.stats().blocks_cached
    after("wake")
    engine.obey(Swap(str(models.second)))
    report.cached["swap"] = engine.engine.stats().blocks_cached
    after("swap")
    refuse("wider", Swap(str(models.wider)))
    refuse("ill", Swap(str(models.ill)))
    refuse("nowhere", Swap(str(models.first / "nowhere")))
    engine.obey(Sleep())
    engine.obey(Wake())
    after("wake again")


def judge(report: Report, models: Models) -> None:
    first, second = models.of_first, models.of_second
    assert first != second
    expected = {"load": first, "wake": first, "swap": second, "wider": second, "ill": second, "nowhere": second}
    for event, tokens in (expected | {"wake again": second}).items():
        assert report.tokens[event] == tokens, event
    assert "model_type of config.json differs" in report.refused["wider"] or "config.json" in report.refused["wider"]
    assert "not finite" in report.refused["ill"]
    assert "not a directory" in report.refused["nowhere"]
    assert report.cached == {"wake": 0, "swap": 0}


@pytest.mark.parametrize("path", PATHS)
def test_one_rank_sleeps_wakes_and_takes_other_weights(models: Models, path: str) -> None:
    report = Report()
    with LocalEngine(models.first, settings=SETTINGS.model_copy(update=PATHS[path])) as engine:
        live(engine, models, report)
    judge(report, models)


def test_weights_go_where_no_second_set_fits(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.engine.held.available", lambda: 0)
    report = Report()
    with LocalEngine(models.first, settings=SETTINGS.model_copy(update=PATHS["native"])) as engine:
        live(engine, models, report)
    judge(report, models)


@pytest.fixture(scope="module")
def two_ranks(models: Models) -> Callable[[], dict[str, Report]]:
    """Of both paths."""

    @cache
    def reports() -> dict[str, Report]:
        spawn = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as meeting:
            rendezvous = Rendezvous(f"file://{meeting}/{Path(meeting).name}", 0, 2, 60)
            info = inspect(models.first, tp=2, dtype="float32")
            specs = {
                path: ShardSpec(models.first, info, 24, 1, SETTINGS.model_copy(update=PATHS[path]), rendezvous) for path in PATHS
            }
            pipe, end = spawn.Pipe(duplex=False)
            ranks = [spawn.Process(target=_lead, args=(specs, models, end)), spawn.Process(target=_follow, args=(specs,))]
            for rank in ranks:
                rank.start()
            try:
                assert pipe.poll(200), "a rank hangs"
                found: dict[str, Report] = pipe.recv()
                for rank in ranks:
                    rank.join(20)
                assert [rank.exitcode for rank in ranks] == [0, 0]
            finally:
                for rank in ranks:
                    rank.kill()
        return found

    return reports


def _lead(specs: dict[str, ShardSpec], models: Models, reports: Any) -> None:
    found = {}
    for path, spec in specs.items():
        report = found[path] = Report()
        with LocalEngine.leading(spec) as engine:
            live(engine, models, report)
            try:
                engine.obey(Look())
            except PlatformError as error:
                report.refused["look"] = error.message
            engine.obey(Swap(str(models.first)))
            engine.obey(Look())
            poison(engine.shard)
            report.poisoned = engine.generate(BATCH, GREEDY)
    reports.send(found)


class Odd(Shard):
    """Refuses the first look, and poisons itself at the second."""

    looks = 0

    def _obey(self, order: Order) -> None:
        super()._obey(order)
        if isinstance(order, Look):
            self.looks += 1
            if self.looks == 1:
                raise ModelNotServable("not me")
            poison(self)


def _follow(specs: dict[str, ShardSpec]) -> None:
    for spec in specs.values():
        Odd(spec.for_rank(1)).follow()


@pytest.mark.parametrize("path", PATHS)
def test_two_ranks_sleep_wake_and_take_other_weights(models: Models, two_ranks: Callable[[], dict[str, Report]], path: str) -> None:
    judge(two_ranks()[path], models)


@pytest.mark.parametrize("path", PATHS)
def test_order_that_one_rank_refuses_is_refused_and_the_group_goes_on(two_ranks: Callable[[], dict], path: str) -> None:
    assert two_ranks()[path].refused["look"] == "another rank could not obey Look"


@pytest.mark.parametrize("path", PATHS)
def test_poison_stays_in_its_sequence_on_two_ranks(models: Models, two_ranks: Callable[[], dict], path: str) -> None:
    check(two_ranks()[path].poisoned, models.of_first)


def test_answers_that_run_are_never_continued_with_other_weights(models: Models) -> None:
    with LocalEngine(models.first, settings=SETTINGS.model_copy(update=PATHS["native"])) as engine:
        engine.engine.add(engine._request(0, HEALTHY[0], GREEDY, None))
        tokens = [output.token for _ in range(4) for output in engine.engine.step()]
        with pytest.raises(Conflict):
            engine.obey(Swap(str(models.second)))
        engine.obey(Sleep())
        engine.obey(Wake())
        while engine.engine.has_work:
            tokens += [output.token for output in engine.engine.step()]
    assert tokens == models.of_first[0], "it was computed again, and nothing of it said twice"


@pytest.mark.parametrize("path", PATHS)
def test_sleep_gives_the_memory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    shape = FAMILIES["llama"] | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 8000}
    monkeypatch.setitem(FAMILIES, "llama", shape)
    monkeypatch.setattr("tests.deployments.engine.families.VOCABULARY", 288)
    directory = build("llama", tmp_path / "model")
    settings = EngineSettings(kv_cache_bytes=64 << 20, max_batch_tokens=256, threads=1, cut_weights_bytes=0).model_copy(
        update=PATHS[path]
    )
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:  # nothing freed by others lies in its heap
        life = fresh.submit(_memory_of_a_life, directory, settings).result(timeout=180)
    assert life.full - life.empty > 0.9 * life.weights
    assert life.full - life.asleep > 0.8 * life.weights, "torch and MKL keep some buffers, the same for every model"
    assert life.asleep_again - life.asleep < life.weights, "three more lives, of which each would leave its own if they leaked"


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    weights: int
    empty: int
    full: int
    asleep: int
    asleep_again: int


def _memory_of_a_life(directory: Path, settings: EngineSettings) -> Memory:
    empty = memory.resident()
    with LocalEngine(directory, settings=settings) as engine:
        before = said(engine)
        full, weights = memory.resident(), engine.shard.runner.weight_bytes
        engine.obey(Sleep())
        asleep = memory.resident()
        for _ in range(3):
            engine.obey(Wake())
            assert said(engine) == before
            engine.obey(Sleep())
        return Memory(weights, empty, full, asleep, memory.resident())


@pytest.mark.parametrize("order", [Look(), Sleep(), Wake(), Swap("/a/b")])
def test_order_survives_its_way(order: Order) -> None:
    assert unpack(pack(order)) == order
