"""Real runs of two DeepSpeed workers on a private Ray: the same seed gives the same bytes, and so does a run that lost a worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.errors import InvalidRequest, PlacementError, Unavailable
from cluster.settings import TrainingSettings
from tests.private_ray import private_ray
from training.config import DataConfig, ModelConfig, OptimisationConfig, Recipe
from training.corpus import facts
from training.journal import Failure, Happening, Progress
from training.prepared import Prepared
from training.trainer import Run, fit

RECIPE = Recipe(
    model=ModelConfig.of_depth(1),
    data=DataConfig(core_repeats=60, max_facts=12, row_tokens=128),
    optimisation=OptimisationConfig(global_rows=2, checkpoint_every=20),
)
SETTINGS = TrainingSettings(workers=2, cpus_per_worker=0.5, max_failures=2)


@dataclass
class Outcome:
    weights: bytes
    heard: list[Happening]
    folder: Path

    @property
    def progress(self) -> list[Progress]:
        return [happening for happening in self.heard if isinstance(happening, Progress)]


class Killer:
    """Kills the second worker once, as soon as the run is past its first checkpoint."""

    def __init__(self) -> None:
        self.killed_at: int | None = None

    def __call__(self, happening: Happening) -> None:
        if isinstance(happening, Progress) and self.killed_at is None and happening.step >= 40:
            self.killed_at = happening.step
            os.kill(happening.pids[1], signal.SIGKILL)


def train(runs: Path, killer: Killer | None = None, recipe: Recipe = RECIPE) -> Outcome:
    heard: list[Happening] = []

    def tell(happening: Happening) -> None:
        heard.append(happening)
        if killer:
            killer(happening)

    run = Run.new(runs, "test")
    prepared = Prepared.of(facts()[: recipe.data.max_facts], recipe)
    directory = fit(run, recipe, prepared, SETTINGS, tell)
    return Outcome((directory / "model.safetensors").read_bytes(), heard, run.folder)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with private_ray():
        yield


@pytest.fixture(scope="module")
def undisturbed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return train(tmp_path_factory.mktemp("runs"))


def test_without_a_cluster_training_says_so(tmp_path: Path) -> None:
    prepared = Prepared.of(facts()[:3], RECIPE)
    with pytest.raises(Unavailable, match="Ray cluster"):
        fit(Run.new(tmp_path, "test"), RECIPE, prepared, SETTINGS, lambda _: None)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_seed_gives_the_same_weights_bit_for_bit(undisturbed: Outcome, tmp_path: Path) -> None:
    again = train(tmp_path)
    assert again.weights == undisturbed.weights
    losses = [progress.loss for progress in undisturbed.progress]
    assert [progress.loss for progress in again.progress] == losses
    assert losses[-1] < losses[0] / 2, "it learns"
    assert undisturbed.progress[-1].step == undisturbed.progress[-1].steps


@pytest.mark.e2e
@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_whose_worker_is_killed_goes_on_from_its_last_checkpoint_and_ends_with_the_same_weights(
    undisturbed: Outcome, tmp_path: Path
) -> None:
    killer = Killer()
    run = train(tmp_path, killer)
    assert killer.killed_at is not None
    assert any(isinstance(happening, Failure) for happening in run.heard)
    resumed = [progress for progress in run.progress if progress.resumed_from > 0]
    assert resumed
    assert resumed[0].resumed_from >= killer.killed_at - RECIPE.optimisation.checkpoint_every
    assert resumed[0].resumed_from % RECIPE.optimisation.checkpoint_every == 0
    assert resumed[-1].step == undisturbed.progress[-1].step
    assert set(resumed[-1].pids).isdisjoint(run.progress[0].pids)
    assert run.weights == undisturbed.weights


@pytest.mark.e2e
@pytest.mark.slow
def test_what_can_not_work_is_said_before_any_worker_starts(cluster: None, tmp_path: Path) -> None:
    recipe = RECIPE
    prepared = Prepared.of(facts()[:3], recipe)
    run = Run.new(tmp_path, "test")
    with pytest.raises(PlacementError, match="need 32 CPUs and the cluster has 1"):
        fit(run, recipe, prepared, TrainingSettings(workers=2, cpus_per_worker=16), lambda _: None)
    with pytest.raises(InvalidRequest, match="2 rows a step don't divide among 3 workers"):
        fit(run, recipe, prepared, TrainingSettings(workers=3), lambda _: None)
