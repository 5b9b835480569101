"""`mmaas deploy` and `mmaas undeploy` change the desired state, then make the cluster follow it; `mmaas sleep` and `mmaas wake`
change what a served model holds."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from deployments.models import Word


def add_to(app: typer.Typer) -> None:
    app.command()(deploy)
    app.command()(undeploy)
    app.command()(sleep)
    app.command()(wake)


def deploy(
    name: Annotated[str, typer.Argument(help="Name that callers put into `model`.")],
    model: Annotated[str, typer.Option(help="models:/NAME@ALIAS, models:/NAME/VERSION or a directory.")],
    tp: Annotated[int, typer.Option(min=1, help="Shards that hold one copy of the model, or of one of its stages.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Stages that the model's layers are cut into.")] = 1,
    replicas: Annotated[str, typer.Option(help="Number of copies, or A..B to scale between.")] = "1",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Context window; None: the model's own.")] = None,
    quantization: Annotated[str | None, typer.Option(help="Weights in eight bits, made at load: int8, or fp8 on GPUs.")] = None,
) -> None:
    """Serve a model under NAME, or change how it is served."""
    from cluster import settings
    from cluster.desired import Desired, checked_quantization
    from cluster.types import Deployment
    from mmaas.audited import noting
    from mmaas.up import Platform, opened_store, reconcile

    loaded = settings.load()
    least, most = parse_replicas(replicas)
    kind = checked_quantization(quantization)
    wanted = Deployment(name, located(model), tp, dtype, least, most, max_model_len, pp=pp, quantization=kind)
    Platform().admit(loaded, wanted)
    with opened_store(loaded) as store:
        Desired(store, note=noting(store, loaded)).put(wanted)
    reconcile(loaded)


def undeploy(name: Annotated[str, typer.Argument(help="Name of the served model.")]) -> None:
    """Stop serving NAME. The model stays in the library."""
    from cluster import settings
    from cluster.desired import Desired
    from mmaas.audited import noting
    from mmaas.up import opened_store, reconcile

    loaded = settings.load()
    with opened_store(loaded) as store:
        Desired(store, note=noting(store, loaded)).delete(name)
    reconcile(loaded)


def sleep(name: Annotated[str, typer.Argument(help="Name of the served model.")]) -> None:
    """Give a model's memory back. The next request wakes it, or `mmaas wake`."""
    _tell(name, "sleep")


def wake(name: Annotated[str, typer.Argument(help="Name of the served model.")]) -> None:
    """Load a sleeping model again."""
    _tell(name, "wake")


def _tell(name: str, word: Word) -> None:
    from cluster import settings
    from deployments import fleet
    from deployments.gateway.telling import ACTIONS
    from mmaas.audited import audit_of, person
    from mmaas.up import opened_store

    loaded = settings.load()
    fleet.tell(name, word, settings=loaded)
    with opened_store(loaded) as store:
        audit_of(store, loaded).record(person(), ACTIONS[word], name)


def parse_replicas(text: str) -> tuple[int, int]:
    """`2` is (2, 2), `1..4` is (1, 4). Raises InvalidRequest for anything else."""
    from cluster.errors import InvalidRequest

    match = re.fullmatch(r"(\d{1,4})(?:\.\.(\d{1,4}))?", text)
    if match is None:
        raise InvalidRequest(f"--replicas {text!r}: write a number or A..B", param="replicas")
    return int(match[1]), int(match[2] or match[1])


def located(model: str) -> str:
    """A registered model's reference as it is, a directory as its absolute path. Raises InvalidRequest for neither."""
    from pathlib import Path

    from cluster.errors import InvalidRequest
    from cluster.types import ModelRef

    if model.startswith("models:"):
        try:
            return str(ModelRef.parse(model))
        except ValueError as error:
            raise InvalidRequest(str(error), param="model") from None
    path = Path(model).expanduser().absolute()
    if not path.is_dir():
        raise InvalidRequest(f"{model} is no directory here; registered models are written models:/NAME@ALIAS", param="model")
    return str(path)
