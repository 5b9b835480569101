"""The first tabular model: Fisher's irises, trained in a second, judged on flowers it never saw, registered as `iris`.

    scikit-learn's own copy of the data -> scaled logistic regression -> MLflow's directory with a skops file -> champion

There is no pickle on the way: `deployments/predict/` could not load one.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster.errors import NotFound
from cluster.library.lineage import code_version
from cluster.library.registry import ModelVersion, Registry
from cluster.library.tracking import Tracking
from cluster.settings import Settings
from cluster.storage import Storage
from cluster.types import ModelRef

MODEL = ModelRef("iris", alias="champion")
SEED = 0
_EXPERIMENT = "iris"
_LIBRARIES = ("scikit-learn", "skops", "numpy")


def register(settings: Settings) -> ModelVersion:
    """The model in the library, trained unless one of this scikit-learn is there already."""
    library = Storage(settings.home / "library")
    registry = Registry(settings.mlflow_uri, library)
    try:
        version = registry.resolve(MODEL)
        if version.tags.get("scikit-learn") == metadata.version("scikit-learn"):
            return version
    except NotFound:
        pass
    return _train(settings, registry, library)


def _train(settings: Settings, registry: Registry, library: Storage) -> ModelVersion:
    tracking = Tracking(settings.mlflow_uri)
    run_id = tracking.start(_EXPERIMENT, _EXPERIMENT, {"seed": SEED, "estimator": "StandardScaler, LogisticRegression"}, {})
    try:
        with tempfile.TemporaryDirectory(prefix="mmaas-iris-") as folder:
            data, model = Path(folder) / "data", Path(folder) / "model"
            accuracy = train(model, data)
            tracking.log(run_id, [(0, {"held_out_accuracy": accuracy})])
            tags = {
                "dataset": "iris (scikit-learn's copy of UCI's)",
                "dataset_sha256": library.publish(data).address,
                "licence": "CC-BY-4.0",
                "run_id": run_id,
                "base_model": "none",
                "format": "skops",
                "code_version": code_version("pipelines"),
                "held_out_accuracy": f"{accuracy:.4f}",
                **{name: metadata.version(name) for name in _LIBRARIES},
            }
            version = registry.register(MODEL.name, model, run_id=run_id, tags=tags, alias=MODEL.alias)
    except BaseException:
        tracking.finish(run_id, "FAILED")
        raise
    tracking.finish(run_id, "FINISHED")
    return version


def train(directory: Path, data: Path) -> float:
    """Save the model, and the table it was made of; returns the share of held-out flowers that it names right."""
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    irises: Any = load_iris(as_frame=True)
    names = irises.target_names[irises.target]
    data.mkdir()
    irises.data.assign(species=names).to_parquet(data / "iris.parquet")
    flowers = irises.data.to_numpy()
    known, unseen, known_names, unseen_names = train_test_split(flowers, names, test_size=0.2, random_state=SEED, stratify=names)
    model = make_pipeline(StandardScaler(), LogisticRegression(random_state=SEED)).fit(known, known_names)
    save(model, flowers[:5], directory)
    return float(model.score(unseen, unseen_names))


def save(model: Any, example: Any, directory: Path) -> None:
    """As `deployments/predict/inspection.py` wants it: MLflow's directory, skops' file, a signature of `example`."""
    import mlflow.sklearn
    from mlflow.models import infer_signature

    requirements = [f"{name}=={metadata.version(name)}" for name in _LIBRARIES]  # named, for guessing them takes MLflow long
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of integer columns, that they could be missing
        signature = infer_signature(example, model.predict(example))
        mlflow.sklearn.save_model(
            model, str(directory), serialization_format="skops", signature=signature, pip_requirements=requirements
        )
