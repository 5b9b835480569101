"""The demonstration: from the running Python's own documentation to a registered chat model, in minutes on two cores.

    documentation -> facts -> tokenizer and rows -> Ray Train with DeepSpeed -> questions -> version of `chat` with alias `champion`

`mmaas up` calls `run`; `python -m pipelines.demonstration` is the same as a Ray job.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from cluster import log
from cluster.errors import Unavailable
from cluster.library.lineage import code_version, lineage
from cluster.library.registry import ModelVersion, Registry
from cluster.library.tracking import Tracking
from cluster.settings import Settings, load
from cluster.storage import Storage
from pipelines.progress import Display, display
from training import corpus
from training.config import Recipe
from training.corpus import Fact
from training.evaluate import Scores, Student, evaluate
from training.journal import Failure, Happening
from training.prepared import Prepared, save_facts
from training.trainer import Run, fit

if TYPE_CHECKING:
    from rich.console import Console

MODEL = "chat"
ALIAS = "champion"
QUESTION = "What does str.split do?"
_EXPERIMENT = "demonstration"
_DATASET = "python-standard-library-documentation"


def run(settings: Settings, console: Console | None = None, recipe: Recipe | None = None) -> ModelVersion:
    """Train, judge and register the demonstration model; `console` shows it to a person.

    Raises Unavailable without a Ray cluster, PlacementError when it has no room, PlatformError when training failed for good.
    """
    recipe = recipe or Recipe.demonstration(settings.training.workers)
    shown = display(console)
    with _connected(settings):
        try:
            return _run(settings, recipe, shown)
        finally:
            shown.close()


def _run(settings: Settings, recipe: Recipe, shown: Display) -> ModelVersion:
    library = Storage(settings.home / "library")
    shown.stage("Reading the documentation")
    facts = corpus.facts()[: recipe.data.max_facts]
    dataset_sha256 = _publish_facts(facts, library)
    prepared = Prepared.of(facts, recipe)
    run = Run.new(settings.home / "runs", _EXPERIMENT)
    with _tracked(settings, run, recipe, prepared, dataset_sha256) as (tracking, run_id):

        def tell(happening: Happening) -> None:
            shown.tell(happening)
            _log(tracking, run_id, happening)

        shown.stage(f"Learning {len(facts):,} facts")
        directory = fit(run, recipe, prepared, settings.training, tell)
        shown.stage("Asking it questions")
        student = Student(directory)
        scores = evaluate(student, facts, recipe.data.row_tokens, recipe.seed)
        tracking.log(run_id, [(prepared.num_steps(recipe), scores.as_metrics())])
        shown.stage("Registering the model")
        version = _register(settings, library, directory, run_id, dataset_sha256, scores)
    shutil.rmtree(run.folder / "store")  # the model is in the library now, and nothing will resume
    shown.finish(_summary(version, scores), QUESTION, student.answer([QUESTION])[0])
    return version


@contextmanager
def _connected(settings: Settings) -> Iterator[None]:
    """Use the connection that this process has, else make one for this run."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or settings.ray.address
    if address is None:
        raise Unavailable(
            "no Ray cluster to train on: start one with `mmaas up`, or name one with RAY_ADDRESS or MMAAS_RAY__ADDRESS"
        )
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _tracked(
    settings: Settings, run: Run, recipe: Recipe, prepared: Prepared, dataset_sha256: str
) -> Iterator[tuple[Tracking, str]]:
    """An MLflow run that ends with what is inside, well or badly."""
    tracking = Tracking(settings.mlflow_uri)
    params = {
        **recipe.flat(),
        "workers": settings.training.workers,
        "rows": len(prepared.rows),
        "steps": prepared.num_steps(recipe),
    }
    run_id = tracking.start(_EXPERIMENT, run.id, params, {"dataset_sha256": dataset_sha256})
    try:
        yield tracking, run_id
    except BaseException:
        tracking.finish(run_id, "FAILED")
        raise
    tracking.finish(run_id, "FINISHED")


def _publish_facts(facts: Sequence[Fact], library: Storage) -> str:
    with tempfile.TemporaryDirectory(prefix="mmaas-facts-") as folder:
        save_facts(facts, Path(folder))
        return library.publish(folder).address


def _log(tracking: Tracking, run_id: str, happening: Happening) -> None:
    if isinstance(happening, Failure):
        return
    metrics = {"loss": happening.loss, "learning_rate": happening.learning_rate, "tokens_per_s": happening.tokens_per_s}
    tracking.log(run_id, [(happening.step, metrics)])


def _register(
    settings: Settings, library: Storage, directory: Path, run_id: str, dataset_sha256: str, scores: Scores
) -> ModelVersion:
    tags = lineage(
        dataset=_DATASET,
        dataset_sha256=dataset_sha256,
        licence=corpus.LICENCE,
        run_id=run_id,
        base_model="none",
        code=code_version("cluster", "training", "pipelines"),
    )
    tags |= {name: f"{value:.4f}" for name, value in scores.as_metrics().items()}
    return Registry(settings.mlflow_uri, library).register(MODEL, directory, run_id=run_id, tags=tags, alias=ALIAS)


def _summary(version: ModelVersion, scores: Scores) -> str:
    return f"{version.ref} @{ALIAS} · {scores.core_near:.0%} of the built-ins right · held-out loss {scores.held_out_loss:.2f}"


def main() -> None:
    from rich.console import Console

    settings = load()
    log.configure(settings.log_level)
    run(settings, Console())


if __name__ == "__main__":
    main()
