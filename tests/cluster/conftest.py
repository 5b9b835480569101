"""A real Postgres of our own for the tests of the store, where the machine has its programs (Debian: postgresql)."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.free_ports import free_port


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """An empty database. `TEST_POSTGRES_URL` names one that exists already."""
    if given := os.environ.get("TEST_POSTGRES_URL"):
        yield given
        return
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    owner = "postgres" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
    if not programs or not _exists(owner):
        pytest.skip("no Postgres server here; install Debian's postgresql or set TEST_POSTGRES_URL")
    port = free_port()
    directory = Path(tempfile.mkdtemp(prefix="mmaas-pg-"))
    shutil.chown(directory, owner)
    user = owner if os.getuid() == 0 else None
    data = str(directory / "data")
    initialise = [str(programs[-1].parent / "initdb"), "--auth=trust", "--username=postgres", "--no-sync", "-D", data]
    subprocess.run(initialise, user=user, cwd=directory, check=True, capture_output=True)
    server = [
        str(programs[-1]),
        "-D",
        data,
        "-p",
        str(port),
        "-k",
        str(directory),
        "-c",
        "listen_addresses=127.0.0.1",
        "-c",
        "fsync=off",
    ]
    process = subprocess.Popen(server, user=user, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(port)
        yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(directory)


def _exists(user: str) -> bool:
    try:
        return bool(pwd.getpwnam(user))
    except KeyError:
        return False


def _wait(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres").close()
            return
        except psycopg.OperationalError:
            assert time.monotonic() < deadline, "Postgres did not start"
            time.sleep(0.1)
