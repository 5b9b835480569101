"""Runs of MLflow behind three verbs: start, log, finish. A run is always finished, or people look for a trainer that is gone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mlflow import MlflowClient

_BATCH = 1000  # most metrics that MLflow takes at once


class Tracking:
    """MLflow's tracking at `uri` (http, sqlite or postgresql)."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def start(self, experiment: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """Open a run (and its experiment at the first one) with its parameters; returns the run's id."""
        run = self._client.create_run(self._experiment_id(experiment), run_name=name, tags=dict(tags))
        from mlflow.entities import Param

        self._client.log_batch(run.info.run_id, params=[Param(key, str(value)) for key, value in params.items()])
        return str(run.info.run_id)

    def log(self, run_id: str, points: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Add (step, metrics) pairs, many in one call: a call a metric is a hundred times slower."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now_ms, step) for step, values in points for key, value in values.items()]
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + _BATCH])

    def finish(self, run_id: str, status: Literal["FINISHED", "FAILED"]) -> None:
        self._client.set_terminated(run_id, status=status)

    @property
    def _client(self) -> MlflowClient:
        from mlflow import MlflowClient

        # NOTE: over HTTP the client prints two lines with links whenever a run ends, into whatever the terminal shows.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        return MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if found := self._client.get_experiment_by_name(name):
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or (found := self._client.get_experiment_by_name(name)) is None:
                raise
            return str(found.experiment_id)
