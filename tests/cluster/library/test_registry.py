"""The registry against a real MLflow: a SQLite store in-process, and once a server over HTTP, for the two behave differently."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import Conflict, InvalidRequest, NotFound, StorageError
from cluster.library.registry import Registry
from cluster.library.tracking import Tracking
from cluster.storage import Storage
from cluster.types import ModelRef
from tests.free_ports import free_port

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CHAMPION = ModelRef.parse("models:/chat@champion")


@pytest.fixture(scope="module")
def sqlite_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for the module: MLflow's first migration takes seconds."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def registry(sqlite_uri: str, tmp_path: Path) -> Iterator[Registry]:
    from mlflow import MlflowClient

    yield Registry(sqlite_uri, Storage(tmp_path / "library"))
    client = MlflowClient(sqlite_uri, sqlite_uri)
    for model in client.search_registered_models():
        client.delete_registered_model(model.name)


def directory(path: Path, text: str = "weights") -> Path:
    path.mkdir()
    (path / "model.safetensors").write_text(text)
    return path


def test_registers_versions_with_integer_numbers_and_resolves_by_number_and_alias(registry: Registry, tmp_path: Path) -> None:
    first = registry.register("chat", directory(tmp_path / "a", "one"), tags={"licence": "PSF-2.0"}, alias="champion")
    second = registry.register("chat", directory(tmp_path / "b", "two"))
    assert (first.version, second.version) == (1, 2)
    assert registry.resolve(CHAMPION) == first
    assert Path(registry.resolve(ModelRef("chat", 2)).path, "model.safetensors").read_text() == "two"
    assert first.tags["licence"] == "PSF-2.0"
    assert first.tags["sha256"] in first.path
    assert first.aliases == ("champion",)


def test_an_alias_moves(registry: Registry, tmp_path: Path) -> None:
    registry.register("chat", directory(tmp_path / "a", "one"), alias="champion")
    second = registry.register("chat", directory(tmp_path / "b", "two"), alias="champion")
    assert registry.resolve(CHAMPION).version == second.version
    registry.set_alias("chat", "champion", 1)
    assert registry.resolve(CHAMPION).version == 1


def test_lists_every_version_newest_first_with_its_aliases(registry: Registry, tmp_path: Path) -> None:
    assert registry.list() == []
    source = directory(tmp_path / "a")
    for name in ("chat", "chat", "base"):
        registry.register(name, source)
    registry.set_alias("chat", "champion", 1)
    assert [(v.name, v.version, v.aliases) for v in registry.list()] == [
        ("base", 1, ()),
        ("chat", 2, ()),
        ("chat", 1, ("champion",)),
    ]


@pytest.mark.parametrize("reference", ["models:/chat/9", "models:/chat@challenger"])
def test_not_found_names_what_exists(registry: Registry, tmp_path: Path, reference: str) -> None:
    registry.register("chat", directory(tmp_path / "a"), alias="champion")
    with pytest.raises(NotFound, match=r"models:/chat/1 \(@champion\)"):
        registry.resolve(ModelRef.parse(reference))


def test_not_found_names_other_models_or_says_that_there_are_none(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no model yet"):
        registry.resolve(ModelRef("other", 1))
    registry.register("chat", directory(tmp_path / "a"))
    with pytest.raises(NotFound, match="known models: chat"):
        registry.resolve(ModelRef("other", 1))
    with pytest.raises(NotFound):
        registry.set_alias("chat", "champion", 7)


@pytest.mark.parametrize(("name", "alias"), [("../chat", None), ("Chat", None), ("chat", "9 lives"), ("chat", "a/b"), ("", None)])
def test_names_and_aliases_that_could_not_be_referred_to_are_refused(
    registry: Registry, tmp_path: Path, name: str, alias: str | None
) -> None:
    with pytest.raises(InvalidRequest):
        registry.register(name, directory(tmp_path / "a"), alias=alias)
    assert registry.list() == []


def test_resolving_a_damaged_version_raises_instead_of_serving_it(registry: Registry, tmp_path: Path) -> None:
    version = registry.register("chat", directory(tmp_path / "a"), alias="champion")
    Path(version.path, "model.safetensors").write_text("Weights")
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        registry.resolve(CHAMPION)


def test_a_version_that_somebody_else_registered_is_refused(registry: Registry, sqlite_uri: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(sqlite_uri, sqlite_uri)
    client.create_registered_model("foreign")
    client.create_model_version("foreign", source="file:///etc")
    with pytest.raises(Conflict, match="file:///etc"):
        registry.resolve(ModelRef("foreign", 1))


def test_a_run_keeps_its_parameters_and_its_curve(sqlite_uri: str) -> None:
    from mlflow import MlflowClient

    tracking = Tracking(sqlite_uri)
    run_id = tracking.start("demonstration", "run-1", {"seed": 0}, {"dataset_sha256": "x"})
    tracking.log(run_id, [(step, {"loss": 1.0 / step, "rate": 0.1}) for step in range(1, 1300)])
    tracking.finish(run_id, "FINISHED")
    client = MlflowClient(sqlite_uri)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.params, run.data.tags["dataset_sha256"]) == ("FINISHED", {"seed": "0"}, "x")
    history = client.get_metric_history(run_id, "loss")
    assert [point.step for point in history] == list(range(1, 1300))
    assert tracking.start("demonstration", "run-2", {}, {}) != run_id


@pytest.mark.slow
def test_over_http_versions_are_the_same(tmp_path: Path) -> None:
    """The server refuses `file:` sources and gives version numbers as text; a caller sees none of that."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path}/m.db", "--workers", "1"]
    log = (tmp_path / "log").open("w")
    command += ["--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
    try:
        uri = f"http://127.0.0.1:{port}"
        _wait_for(f"{uri}/health", server)
        tracking = Tracking(uri)
        run_id = tracking.start("demonstration", "run", {"seed": 0}, {})
        registry = Registry(uri, Storage(tmp_path / "library"))
        version = registry.register("chat", directory(tmp_path / "a"), run_id=run_id, alias="champion")
        assert (version.version, version.run_id, version.aliases) == (1, run_id, ("champion",))
        assert registry.resolve(CHAMPION) == version
        assert [v.version for v in registry.list()] == [1]
        with pytest.raises(NotFound, match="models:/chat/1"):
            registry.resolve(ModelRef("chat", None, "challenger"))
        with pytest.raises(NotFound):
            registry.resolve(ModelRef("chat", 2))
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # the server and its worker
        server.wait()
        log.close()


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(url, timeout=5).read()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server did not start")
