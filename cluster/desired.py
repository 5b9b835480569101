"""Desired state of the served models: which deployments should exist. `deployments.fleet` makes the cluster follow it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import get_args

import sqlalchemy as sa

from cluster.errors import InvalidRequest, ModelNotFound
from cluster.store import Store, deployments
from cluster.tenancy import acts
from cluster.tenancy.acts import Note, unnoted
from cluster.types import NAME, Deployment, Quantization

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)


class Desired:
    """The rows of the `deployments` table as `Deployment`s."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time, note: Note = unnoted) -> None:
        """`note` writes changes into the audit log (`Audit.by`)."""
        self._store = store
        self._clock = clock
        self._note = note

    def put(self, deployment: Deployment) -> Deployment:
        """Insert or replace by name; the time of creation is kept. Raises InvalidRequest for what can't be served.

        Whether the model exists and can be sharded is not asked here: that is known only when it is loaded.
        """
        _check(deployment)
        with acts.begin(self._store, self._note) as rows:
            same = deployments.c.name == deployment.name
            before = rows.connection.scalar(sa.select(deployments.c.created_at).where(same))
            row = dataclasses.replace(deployment, created_at=before or deployment.created_at or self._clock())
            rows.put("model.deployed", deployments, same, dataclasses.asdict(row), "name")
        return row

    def get(self, name: str) -> Deployment:
        """Raises ModelNotFound when no deployment has that name."""
        with self._store.read() as connection:
            row = connection.execute(sa.select(deployments).where(deployments.c.name == name)).one_or_none()
        if row is None:
            raise ModelNotFound(f"no model is deployed as {name!r}", param="model")
        return Deployment(**row._mapping)

    def list(self) -> list[Deployment]:
        """All deployments by name."""
        with self._store.read() as connection:
            rows = connection.execute(sa.select(deployments).order_by(deployments.c.name)).all()
        return [Deployment(**row._mapping) for row in rows]

    def delete(self, name: str) -> None:
        """Raises ModelNotFound when no deployment has that name."""
        with acts.begin(self._store, self._note) as rows:
            gone = rows.delete("model.undeployed", deployments, deployments.c.name == name, "name")
        if not gone:
            raise ModelNotFound(f"no model is deployed as {name!r}", param="model")


def checked_quantization(text: str | None) -> Quantization | None:
    """Raises InvalidRequest for a kind that doesn't exist."""
    if text not in (None, *QUANTIZATIONS):
        raise InvalidRequest(f"quantization {text!r:.40} is not one of {', '.join(QUANTIZATIONS)}", param="quantization")
    return text


def _check(deployment: Deployment) -> None:
    if NAME.match(deployment.name) is None:
        rule = "lower-case letters, digits, '.', '_' and '-', at most 63, starting and ending with a letter or digit"
        raise InvalidRequest(f"{deployment.name!r} is not a deployment's name: {rule}", param="name")
    if not 0 < len(deployment.model) <= 4096:
        raise InvalidRequest("a model is models:/NAME@ALIAS, models:/NAME/VERSION or a directory", param="model")
    if deployment.dtype not in DTYPES:
        raise InvalidRequest(f"dtype {deployment.dtype!r} is not one of {', '.join(DTYPES)}", param="dtype")
    checked_quantization(deployment.quantization)
    if not 1 <= deployment.tp <= 1024:
        raise InvalidRequest(f"tp={deployment.tp}: the number of shards is 1 to 1024", param="tp")
    if not 1 <= deployment.pp <= 1024:
        raise InvalidRequest(f"pp={deployment.pp}: the number of stages is 1 to 1024", param="pp")
    if not 0 <= deployment.min_replicas <= deployment.max_replicas or deployment.max_replicas < 1:
        asked = f"{deployment.min_replicas}..{deployment.max_replicas}"
        raise InvalidRequest(f"replicas {asked}: write A..B with 0 <= A <= B and B >= 1", param="replicas")
    if deployment.max_model_len is not None and deployment.max_model_len < 1:
        raise InvalidRequest(f"max_model_len={deployment.max_model_len} holds no token", param="max_model_len")
