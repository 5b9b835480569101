from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster import ports, processes
from cluster.errors import Conflict
from cluster.processes import MARK, Process

SLEEP = "import time; time.sleep(60)"
# A parent whose child leaves its session and ignores the polite signal.
FAMILY = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', "
    "'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)'], "
    "start_new_session=True); time.sleep(60)"
)


def started(tmp_path: Path, program: str, mark: str) -> Process:
    environment = {"PATH": os.environ["PATH"], MARK: mark}
    return processes.spawn([sys.executable, "-c", program], environment, tmp_path / "logs" / "log")


def wait_for(log: Path) -> None:
    deadline = time.monotonic() + 20
    while not log.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_family_is_ended_with_the_child_that_does_not_want_to(tmp_path: Path) -> None:
    parent = started(tmp_path, FAMILY, "m1")
    wait_for(tmp_path / "logs" / "log")
    family = processes.family([parent], "m1")
    assert len(family) == 2
    assert processes.end(family, grace_s=0.2) == []
    assert processes.family([parent], "m1") == []


def test_a_child_that_lost_its_parent_is_found_by_the_mark(tmp_path: Path) -> None:
    parent = started(tmp_path, FAMILY, "m2")
    wait_for(tmp_path / "logs" / "log")
    found = parent.find()
    assert found
    found.kill()
    processes.wait([found], 5)
    orphans = processes.family([parent], "m2")
    assert len(orphans) == 1
    assert processes.end(orphans, grace_s=0.1) == []


def test_another_platforms_processes_are_not_ours(tmp_path: Path) -> None:
    other = started(tmp_path, SLEEP, "theirs")
    try:
        assert processes.family([], "ours") == []
        assert other.find()
    finally:
        processes.end(processes.family([other], "theirs"), grace_s=1)


def test_a_recycled_pid_is_not_taken_for_ours() -> None:
    ourselves = Process.of(os.getpid())
    assert ourselves.find() == psutil.Process()
    assert Process(ourselves.pid, ourselves.started - 60).find() is None


def test_a_record_comes_back_and_a_damaged_one_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "ray.json"
    processes.save(path, Process(1, 2.5))
    assert processes.load(path) == Process(1, 2.5)
    for damaged in ("", "{", "[]", '{"pid": 1}'):
        path.write_text(damaged)
        assert processes.load(path) is None
    assert processes.load(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("address", "inside"), [("127.0.0.1", True), ("::ffff:127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("::", False)]
)
def test_mapped_loopback_addresses_count_as_loopback(address: str, inside: bool) -> None:
    assert ports.Listener(address, 1, None, None).is_loopback is inside


def test_a_taken_port_names_its_owner_and_the_setting(tmp_path: Path) -> None:
    program = (
        "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); time.sleep(60)"
    )
    owner = started(tmp_path, program, "m3")
    try:
        wait_for(tmp_path / "logs" / "log")
        port = int((tmp_path / "logs" / "log").read_text())
        with pytest.raises(Conflict, match=rf"port {port} .*process {owner.pid}.*MMAAS_MLFLOW__PORT"):
            ports.require_free(port, "mlflow.port")
        assert [listener.port for listener in ports.listeners({owner.pid})] == [port]
    finally:
        processes.end(processes.family([owner], "m3"), grace_s=1)
    ports.require_free(port, "mlflow.port")
