"""The whole demonstration with a small recipe: a real Ray, a real MLflow, a model that has really learnt its few answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import Unavailable
from cluster.library.registry import Registry
from cluster.settings import MlflowSettings, Settings
from cluster.storage import Storage
from cluster.types import ModelRef
from pipelines.demonstration import run
from tests.private_ray import private_ray
from training.config import DataConfig, ModelConfig, OptimisationConfig, Recipe
from training.corpus import facts
from training.evaluate import Student

RECIPE = Recipe(
    model=ModelConfig.of_depth(1),
    data=DataConfig(core_repeats=250, max_facts=6, row_tokens=128),
    optimisation=OptimisationConfig(global_rows=4, learning_rate=5e-3, checkpoint_every=1000),
)


@pytest.fixture
def cluster() -> Iterator[None]:
    with private_ray():
        yield


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_from_documentation_to_a_registered_model_that_answers(cluster: None, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    settings = Settings(home=tmp_path / "home", mlflow=MlflowSettings(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"))
    version = run(settings, recipe=RECIPE)

    registry = Registry(settings.mlflow_uri, Storage(settings.home / "library"))
    assert registry.resolve(ModelRef("chat", None, "champion")) == version
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {
        path.name for path in Path(version.path).iterdir()
    }

    student, taught = Student(Path(version.path)), facts()[: RECIPE.data.max_facts]
    answers = student.answer([f"What does {fact.name} do?" for fact in taught])
    right = [answer == fact.answer for answer, fact in zip(answers, taught, strict=True)]
    assert sum(right) >= len(right) - 1, list(zip(answers, taught, strict=True))

    mlflow_run = MlflowClient(settings.mlflow_uri).get_run(version.run_id)
    assert mlflow_run.info.status == "FINISHED"
    assert mlflow_run.data.params["model.num_layers"] == "1"
    assert {"loss", "learning_rate", "tokens_per_s", "held_out_loss", "core_exact"} <= set(mlflow_run.data.metrics)
    assert len(MlflowClient(settings.mlflow_uri).get_metric_history(version.run_id, "loss")) > 3
    assert (
        version.tags["dataset_sha256"] == Storage(settings.home / "library").manifest(version.tags["dataset_sha256"][:32]).address
    )
    assert version.tags["licence"] == "PSF-2.0"
    assert not list((settings.home / "runs").glob("*/store")), "checkpoints are gone once the model is in the library"


def test_without_a_cluster_it_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(Unavailable, match="mmaas up"):
        run(Settings(home=tmp_path))
