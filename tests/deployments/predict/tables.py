"""Small tabular models as MLflow saves them, and replicas of them without Serve."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.ensemble import ExtraTreesRegressor, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from cluster.errors import PlatformError
from cluster.settings import Settings
from cluster.types import Deployment, Predict, Predicted, Tensor
from deployments.predict.tensors import DTYPES, packed
from deployments.predictor import Predictor
from tests.fakes import EchoModels

FLOWERS, KINDS = load_iris(return_X_y=True)
NAMES = load_iris().target_names[KINDS]
PEOPLE = pd.DataFrame(
    {
        "age": [31.0, 45.5, 22.0, 67.0, 38.0, 51.0],
        "city": ["Ulm", "Köln", "Ulm", "Bonn", "Köln", "Bonn"],
        "visits": [3, 1, 0, 12, 7, 5],
        "member": [True, False, False, True, True, False],
    }
)
WORTH = [10.0, 4.0, 1.0, 60.0, 25.0, 18.0]


def irises() -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression()).fit(FLOWERS, NAMES)


def forest() -> Any:
    return RandomForestClassifier(5, random_state=0).fit(FLOWERS, KINDS)


def trees() -> Any:
    return ExtraTreesRegressor(3, random_state=0).fit(FLOWERS[:, :3], FLOWERS[:, 3])


def line() -> Any:
    return LinearRegression().fit(FLOWERS[:, :3], FLOWERS[:, 3])


def filled() -> Any:
    return make_pipeline(SimpleImputer(), StandardScaler(), LogisticRegression()).fit(FLOWERS, KINDS)


def people() -> Any:
    """A table of columns: texts among numbers."""
    columns = make_column_transformer((OneHotEncoder(), ["city"]), remainder="passthrough")
    return make_pipeline(columns, LinearRegression()).fit(PEOPLE, WORTH)


def saved(model: Any, example: Any, directory: Path, trusted: list[str] | None = None) -> Path:
    """`trusted`: for MLflow alone, which tries to load what it has saved."""
    import mlflow.sklearn
    from mlflow.models import infer_signature

    signature = infer_signature(example, model.predict(example))
    mlflow.sklearn.save_model(
        model,
        str(directory),
        serialization_format="skops",
        signature=signature,
        pip_requirements=["scikit-learn"],
        skops_trusted_types=trusted,
    )
    return directory


def tensor(name: str, datatype: str, values: Any) -> Tensor:
    array = np.asarray(values)
    data = (
        packed(str(value).encode() for value in array.ravel()) if datatype == "BYTES" else array.astype(DTYPES[datatype]).tobytes()
    )
    return Tensor(name, datatype, array.shape, data)


def flowers(count: int = 3, datatype: str = "FP64") -> Tensor:
    return tensor("input-0", datatype, FLOWERS[:count])


def columns(frame: pd.DataFrame = PEOPLE) -> list[Tensor]:
    types = {"age": "FP64", "city": "BYTES", "visits": "INT64", "member": "BOOL"}
    return [tensor(name, types[name], frame[name]) for name in frame.columns]


def right(result: Any) -> Any:
    """A block's results, which must not be an error."""
    assert not isinstance(result, PlatformError), result
    return result


async def replica(directory: Path, name: str = "iris", version: str = "3", **own: Any) -> Predictor:
    """A replica as Serve makes it, without Serve."""
    made: Predictor = object.__new__(Predictor)
    made._deployment, made._digest, made._version, made._secret = Deployment(name, str(directory)), "digest", version, b"secret"
    made._directory, made._settings = directory, Settings(predictor=own)
    await made.start()
    return made


async def answer(made: Predictor, *tensors: Tensor, **more: Any) -> Predicted:
    async with aclosing(made.predict(Predict("r", more.pop("tenant", "acme"), tensors, **more))) as answers:
        return await anext(answers)


class TableModels(EchoModels):
    """`Models` with tabular models beside `echo`. Replicas begin with their first call, on the loop of whoever calls."""

    def __init__(self, **directories: Path) -> None:
        super().__init__()
        self.deployments += [Deployment(name, str(path)) for name, path in directories.items()]
        self.directories, self.replicas = directories, dict[str, Predictor]()
        self.opening = asyncio.Lock()

    async def replica(self, name: str) -> Predictor | None:
        async with self.opening:
            if name in self.directories and name not in self.replicas:
                self.replicas[name] = await replica(self.directories[name], name)
            return self.replicas.get(name)

    async def info(self, name: str) -> Mapping[str, Any]:
        known = await super().info(name)
        made = await self.replica(name)
        return await made.info() if made else known

    async def asleep(self) -> list[str]:
        return [*await super().asleep(), *[name for name, made in self.replicas.items() if (await made.info())["asleep"]]]

    async def tell(self, name: str, word: str) -> None:
        made = await self.replica(name)
        await (getattr(made, word)() if made else super().tell(name, word))

    async def predict(self, name: str, request: Predict) -> Predicted:
        made = await self.replica(name)
        if made is None:
            return await super().predict(name, request)
        async with aclosing(made.predict(request)) as answers:
            return await anext(answers)
