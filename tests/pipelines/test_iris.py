"""The first tabular model: trained, registered, found by the fleet, answering; trained again only for another scikit-learn."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.library.registry import Registry
from cluster.settings import Settings
from cluster.storage import Storage
from cluster.types import Deployment
from deployments.fleet import find
from deployments.predict.tensors import array_of
from pipelines import iris
from tests.deployments.predict.tables import answer, flowers, replica


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", mlflow={"tracking_uri": f"sqlite:///{tmp_path / 'mlflow.db'}"})


def names(directory: str) -> set[str]:
    return {path.name for path in Path(directory).rglob("*")}


async def test_from_nothing_to_a_registered_model_that_answers(settings: Settings) -> None:
    version = iris.register(settings)
    assert version.aliases == ("champion",)
    assert float(version.tags["held_out_accuracy"]) > 0.9
    assert version.tags["format"] == "skops"
    assert names(version.path) == {"MLmodel", "conda.yaml", "model.skops", "python_env.yaml", "requirements.txt"}, "and no pickle"
    target = find(Deployment("iris", str(iris.MODEL)), settings)
    assert (target.kind, target.version, target.frame) == ("predictor", "1", "")
    made = await replica(target.directory, version=target.version)
    found = await answer(made, flowers(2))
    assert [label.decode() for label in array_of(found.outputs[0])] == ["setosa", "setosa"]
    await made.close()

    assert iris.register(settings).version == 1, "the second time there is nothing to do"
    registry = Registry(settings.mlflow_uri, Storage(settings.home / "library"))
    registry.register("iris", version.path, tags={"scikit-learn": "0.24.2"}, alias="champion")
    assert iris.register(settings).version == 3
    assert find(Deployment("iris", str(iris.MODEL)), settings).digest != target.digest
