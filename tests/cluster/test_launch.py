from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import doctor, launch, ports, processes, raynode, settings
from cluster.dashboard import Dashboard
from cluster.errors import Conflict, Unavailable
from cluster.occupancy import observe
from tests.free_ports import free_ports, free_run


def private(home: Path) -> settings.Settings:
    gcs, dashboard, client, mlflow, gateway = free_ports(5)
    ray: dict[str, Any] = {"gcs_port": gcs, "dashboard_port": dashboard, "client_port": client, "num_cpus": 2}
    ray["object_store_bytes"] = 80 << 20
    front = {"port": gateway, "internal_port": free_run()}
    return settings.load(home=home, ray=ray, mlflow={"port": mlflow}, gateway=front)


def test_ray_lies_in_a_short_private_directory_that_differs_by_home(tmp_path: Path) -> None:
    one, two = (settings.load(home=tmp_path / ("long" * 40) / name) for name in "ab")
    assert len(str(raynode.temporary_directory(one))) < 24
    assert raynode.temporary_directory(one) != raynode.temporary_directory(two)


def test_services_that_have_an_address_are_not_started(tmp_path: Path) -> None:
    loaded = settings.load(home=tmp_path, ray={"address": "auto"}, mlflow={"tracking_uri": "http://mlflow"})
    assert launch.parts(loaded) == []
    assert launch.start(loaded) == []


def test_a_port_of_a_stranger_is_named_with_the_setting_and_nothing_is_started(tmp_path: Path) -> None:
    loaded = private(tmp_path)
    with socket.create_server(("127.0.0.1", loaded.ray.gcs_port)), pytest.raises(Conflict, match=r"ray\.gcs_port"):
        launch.start(loaded)
    assert launch.family(loaded) == []


def test_only_one_at_a_time_starts_or_stops(tmp_path: Path) -> None:
    loaded = private(tmp_path)
    with launch._alone(loaded), pytest.raises(Conflict, match="another mmaas"):
        launch.stop(loaded)


def test_a_part_that_dies_while_starting_shows_its_log(tmp_path: Path) -> None:
    loaded = private(tmp_path)
    mlflow = next(part for part in launch.parts(loaded) if part.name == "mlflow")
    mlflow.log.parent.mkdir()
    mlflow.log.write_text("first line\nno space left on device\n")
    with pytest.raises(Unavailable, match="no space left"):
        launch._wait_until_running(mlflow)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[settings.Settings]:
    loaded = private(tmp_path_factory.mktemp("platform") / "home")
    try:
        assert sorted(launch.start(loaded)) == ["mlflow", "ray"]
        yield loaded
    finally:
        launch.stop(loaded)
        shutil.rmtree(raynode.temporary_directory(loaded), ignore_errors=True)


@pytest.mark.e2e
@pytest.mark.slow
def test_everything_listens_on_loopback_and_asks_for_the_token(running: settings.Settings) -> None:
    found = ports.listeners({process.pid for process in launch.family(running)})
    assert {running.ray.gcs_port, running.ray.dashboard_port, running.mlflow.port} <= {listener.port for listener in found}
    assert [str(listener) for listener in found if not listener.is_loopback] == []
    assert doctor.check_token(launch.status_without_token(running)).status == "ok"
    statuses = {check.name: check.status for check in doctor.examine(running)}
    assert (statuses["Ray"], statuses["MLflow"], statuses["reachable"]) == ("ok", "ok", "ok")


@pytest.mark.e2e
@pytest.mark.slow
def test_starting_again_changes_nothing(running: settings.Settings) -> None:
    before = {process.pid for process in launch.family(running)}
    assert launch.start(running) == []
    assert before & {process.pid for process in launch.family(running)} == before


@pytest.mark.e2e
@pytest.mark.slow
def test_the_dashboard_tells_what_is_free(running: settings.Settings) -> None:
    view = observe(Dashboard(running))
    assert [(node.total["CPU"], node.free["CPU"]) for node in view.nodes] == [(2.0, 2.0)]
    assert view.waiting == ()
    assert Dashboard(running).applications() == {}


@pytest.mark.e2e
@pytest.mark.slow
def test_mlflow_keeps_its_jobs_off_and_its_database_private(running: settings.Settings) -> None:
    assert urllib.request.urlopen(f"{running.mlflow_uri}/health").status == 200
    environment = next(part for part in launch.parts(running) if part.name == "mlflow").environment
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert (running.home / "mlflow").stat().st_mode & 0o777 == 0o700


@pytest.mark.e2e
@pytest.mark.slow
def test_an_application_behind_haproxy_opens_nothing_to_the_outside_and_obeys_no_header(running: settings.Settings) -> None:
    program = [sys.executable, "-m", "tests.cluster.noop_app", running.model_dump_json()]
    result = subprocess.run(program, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = ports.listeners({process.pid for process in launch.family(running)})
    assert running.gateway.port in {listener.port for listener in found}
    assert any("ServeReplica" in str(listener) for listener in found)
    assert [str(listener) for listener in found if not listener.is_loopback] == []
    # Serve would end this call after half a second with 408, if the header reached it.
    impatient = urllib.request.Request(f"{running.base_url}/slow", headers={"x-request-timeout-seconds": "0.5"})
    with urllib.request.urlopen(impatient) as answer:
        assert json.load(answer) == "late"
    # Ray makes its temporary directory writable for everybody: ours above it must keep them out.
    assert raynode.temporary_directory(running).stat().st_mode & 0o777 == 0o700
    sockets = list(raynode.temporary_directory(running).glob("in/*/*.sock"))
    modes = {path.name: path.stat().st_mode & 0o777 for path in sockets}
    assert {modes[name] for name in ("admin.sock", "stats.sock", "prometheus.sock")} == {0o600}


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlflow", "ray"])
def test_a_half_dead_platform_is_repaired_and_the_other_half_left_alone(running: settings.Settings, name: str) -> None:
    recorded = {part.name: processes.load(part.record) for part in launch.parts(running)}
    victim = recorded[name]
    assert victim
    found = victim.find()
    assert found
    found.kill()
    processes.wait([found], 5)
    assert not launch.is_running(running)
    assert launch.start(running) == [name]
    after = {part.name: processes.load(part.record) for part in launch.parts(running)}
    assert {part for part in after if after[part] != recorded[part]} == {name}


@pytest.mark.e2e
@pytest.mark.slow
def test_stopping_leaves_no_process_and_no_port(running: settings.Settings) -> None:
    pids = {process.pid for process in launch.family(running)}
    assert launch.stop(running) >= len(pids) > 5
    assert launch.family(running) == []
    assert ports.listeners(pids) == []
    for part in launch.parts(running):
        for setting, port in part.ports.items():
            ports.require_free(port, setting)
    assert launch.stop(running) == 0
