"""One training run on the Ray cluster: prepared data in, a model directory out, everything about it below one folder.

    RUNS/RUN_ID/store/     what workers read and write: data, checkpoints, the model (`cluster.storage`)
    RUNS/RUN_ID/ray/       Ray Train's own records
    RUNS/RUN_ID/events.jsonl

A run that lost a worker goes on by itself. A run whose driver died goes on when `fit` is called again with the same id.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import InvalidRequest, PlacementError, PlatformError, Unavailable
from cluster.private_files import make_private
from cluster.settings import TrainingSettings
from cluster.storage import Storage
from training.config import Recipe
from training.journal import Happening, Journal, follow
from training.prepared import Prepared
from training.worker import DATA, MODEL, Job, train

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 300
"""Workers import torch and DeepSpeed while they start; on a busy machine that takes longer than Ray's minute."""

_WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    # The C library gives large buffers back to the kernel and faults them in again every step, which took a quarter of a small
    # model's step; so it keeps them. (A worker's life is one run.)
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_ARENA_MAX": "1",
}


@dataclass(frozen=True, slots=True)
class Run:
    """The folder of one run."""

    id: str
    folder: Path

    @property
    def store(self) -> Storage:
        return Storage(self.folder / "store")

    @property
    def events(self) -> Path:
        return self.folder / "events.jsonl"

    @classmethod
    def new(cls, runs: Path, name: str) -> Run:
        run_id = f"{name}-{uuid.uuid4().hex[:12]}"
        make_private(runs)
        (runs / run_id).mkdir()
        return cls(run_id, runs / run_id)


def fit(run: Run, recipe: Recipe, prepared: Prepared, settings: TrainingSettings, tell: Callable[[Happening], None]) -> Path:
    """Train until the last step and return the model's directory. `tell` hears what happens, in a thread of its own.

    Raises InvalidRequest for a recipe that doesn't divide among the workers, PlacementError when the cluster is too small for them,
    PlatformError when the run failed more than `settings.max_failures` times.
    """
    _check(recipe, prepared, settings)
    _check_room(settings)
    with tempfile.TemporaryDirectory(prefix="mmaas-data-") as folder:
        prepared.save(Path(folder))
        run.store.publish(folder, DATA)
    with _told(run.events, tell):
        _fit(run, Job(recipe, run.store.uri), settings)
    return run.store.fetch(MODEL)


def _fit(run: Run, job: Job, settings: TrainingSettings) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_TIMEOUT_S))
    use_gpu = _gpus() >= settings.workers
    trainer = TorchTrainer(
        _train,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker, "GPU": int(use_gpu)},
        ),
        run_config=RunConfig(
            # NOTE: a name of its own each time. Ray resumes a name from a snapshot that it writes in place and can't read when
            # torn; we resume from our own checkpoints instead.
            name=f"{run.id}-{uuid.uuid4().hex[:8]}",
            storage_path=str(run.folder / "ray"),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            callbacks=[Journal(str(run.events))],
            worker_runtime_env={"env_vars": {**_WORKER_ENVIRONMENT, "DS_ACCELERATOR": "cuda" if use_gpu else "cpu"}},
        ),
    )
    with _own_interrupts():
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise PlatformError(f"run {run.id} failed: {error}") from error


def _train(config: dict[str, Any]) -> None:
    train(config["job"])


def _check(recipe: Recipe, prepared: Prepared, settings: TrainingSettings) -> None:
    rows = recipe.optimisation.global_rows
    if rows % settings.workers:
        raise InvalidRequest(f"{rows} rows a step don't divide among {settings.workers} workers", param="training.workers")
    if not prepared.num_steps(recipe):
        raise InvalidRequest(f"{len(prepared.rows)} rows are less than one step of {rows}", param="optimisation.global_rows")


def _check_room(settings: TrainingSettings) -> None:
    """Say what is missing instead of waiting without a word. What is only busy is waited for by Ray, with a line in the log."""
    import ray

    if not ray.is_initialized():
        raise Unavailable("training needs a Ray cluster and this process is not connected to one")
    needed = settings.workers * settings.cpus_per_worker
    total, free = (resources.get("CPU", 0.0) for resources in (ray.cluster_resources(), ray.available_resources()))
    if total < needed:
        raise PlacementError(
            f"{settings.workers} workers need {needed:g} CPUs and the cluster has {total:g}: lower training.workers or "
            "training.cpus_per_worker, or add a node"
        )
    if free < needed:
        logger.warning("training waits for room", extra={"needed_cpus": needed, "free_cpus": free})


def _gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Ray takes Ctrl-C over to abort the run and doesn't give it back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _told(events: Path, tell: Callable[[Happening], None]) -> Iterator[None]:
    ended = threading.Event()
    follower = threading.Thread(target=follow, args=(events, ended, tell), name="run-events", daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()
