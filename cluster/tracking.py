"""The local MLflow server: tracking and model registry on loopback with SQLite under HOME.

Pickle loading and job execution are off. Artifacts are read and written as files, never through the server.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from cluster.errors import StorageError
from cluster.private_files import private_directory, write_private
from cluster.raynode import head_environment
from cluster.settings import Settings


def environment(settings: Settings) -> dict[str, str]:
    passed = {key: value for key, value in head_environment(settings).items() if not key.startswith(("RAY_", "MLFLOW_"))}
    return passed | {
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_SERVER_JOB_ENABLE_PERIODIC_TASKS": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def command(settings: Settings) -> list[str]:
    directory = _directory(settings)
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(settings.mlflow.port)),
        *("--workers", "1", "--no-serve-artifacts"),
        *("--backend-store-uri", _database_uri(directory)),
        *("--default-artifact-root", (directory / "artifacts").as_uri()),
    ]


def prepare(settings: Settings) -> None:
    """Make the directory, and migrate a database that another version of MLflow left. A new one is made by the server."""
    directory = private_directory(_directory(settings))
    private_directory(directory / "artifacts")
    stamp, version = directory / "version", importlib.metadata.version("mlflow")
    if (directory / "mlflow.db").exists() and (not stamp.exists() or stamp.read_text() != version):
        _migrate(settings, directory)
    write_private(stamp, version.encode())


def _migrate(settings: Settings, directory: Path) -> None:
    upgrade = [sys.executable, "-m", "mlflow", "db", "upgrade", _database_uri(directory)]
    result = subprocess.run(upgrade, env=environment(settings), capture_output=True, text=True, check=False)
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:] or ["no output"]
        raise StorageError(f"MLflow's database in {directory} could not be migrated: {last[0]}")


def _directory(settings: Settings) -> Path:
    return settings.home / "mlflow"


def _database_uri(directory: Path) -> str:
    return f"sqlite:///{directory / 'mlflow.db'}"
