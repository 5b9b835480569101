"""The local Ray head: how it is started so that all of it stays on loopback, and how a process joins it.

On Linux Ray turns `--node-ip-address 127.0.0.1` into the machine's outer address, unless its "cluster" mode is off; the variable
that turns it off is named after the systems where that is the default. With it GCS, raylet, workers, agents and exporters bind
loopback. Ray's sockets lie under its temporary directory, and a socket's path holds 107 characters; HOME may be longer. So that
directory lies in /tmp/mmaas-XXXXXXXX (from user and HOME, mode 0700), and logs are found there. Ray opens its own directory to
everybody (0777): it is one level below ours, which nobody else can enter.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

from cluster import ingress
from cluster.errors import PlatformError, Unavailable
from cluster.private_files import Secrets, private_directory
from cluster.settings import Settings

_PASSED = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH")
_PASSED_PREFIXES = ("LC_", "XDG_", "CUDA", "NVIDIA_", "NCCL_", "GLOO_", "HF_", "TORCH_", "TRITON_", "DS_", "PYTHON")


def identity(settings: Settings) -> str:
    """Eight characters that tell this platform from another of the same machine: user and HOME."""
    return hashlib.sha256(f"{os.getuid()}:{settings.home}".encode()).hexdigest()[:8]


def temporary_directory(settings: Settings) -> Path:
    return Path("/tmp") / f"mmaas-{identity(settings)}"  # noqa: S108 - short on purpose; made with mode 0700, owner checked


def environment(settings: Settings) -> dict[str, str]:
    """What a process needs to be part of this cluster, drivers included. Must stand before `import ray`."""
    local = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if settings.ray.address is None else {}
    token = {"RAY_AUTH_TOKEN_PATH": str(Secrets(settings.home).ray_token_path)} if settings.ray.address is None else {}
    return {
        **local,
        **token,
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_TRACKING_URI": settings.mlflow_uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **ingress.environment(settings, _ingress_directory(settings)),
    }


def head_environment(settings: Settings) -> dict[str, str]:
    """The whole environment of the Ray head and so of every worker: an allowlist, because a shell is full of credentials."""
    passed = {key: value for key, value in os.environ.items() if key in _PASSED or key.startswith(_PASSED_PREFIXES)}
    return {
        "OMP_NUM_THREADS": "1",  # an engine sets its own number; everybody else would take all cores
        "HF_HUB_OFFLINE": "1",  # models are fetched by `mmaas up`, never by a worker
        "TOKENIZERS_PARALLELISM": "false",
        **passed,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), passed.get("PYTHONPATH")])),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), passed.get("PATH", os.defpath)]),  # a job's `python` is ours
        **environment(settings),
        "AUTOSCALER_METRIC_PORT": "0",  # 0: any free port; the fixed defaults collide with a second Ray on the machine
        "DASHBOARD_METRIC_PORT": "0",
        "MMAAS_HOME": str(settings.home),
    }


def command(settings: Settings) -> list[str]:
    """`ray start --head --block`: stays the parent of all of Ray, and ends them all when one of them or itself ends."""
    ports = {
        "--port": settings.ray.gcs_port,
        "--dashboard-port": settings.ray.dashboard_port,
        "--ray-client-server-port": settings.ray.client_port,
        "--dashboard-agent-listen-port": 0,
        "--min-worker-port": 0,  # 0: any free port
        "--max-worker-port": 0,
    }
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--include-dashboard", "true"),
        *("--temp-dir", str(_ray_directory(settings))),
        *("--object-store-memory", str(settings.ray.object_store_bytes)),
        *("--num-cpus", str(settings.ray.num_cpus or os.cpu_count() or 1)),
        *(word for option, port in ports.items() for word in (option, str(port))),
    ]


def prepare(settings: Settings) -> None:
    """Make the temporary directory and what Serve's ingress needs in it."""
    private_directory(temporary_directory(settings))
    for old in sorted(_ray_directory(settings).glob("session_2*"))[:-1]:  # the last one's logs are kept: they tell why it ended
        shutil.rmtree(old)
    shutil.rmtree(ranks_directory(settings), ignore_errors=True)  # of ranks that were killed
    private_directory(ranks_directory(settings))
    ingress.install(settings, private_directory(_ingress_directory(settings)))


def ranks_directory(settings: Settings) -> Path:
    """Where shard groups meet: sockets and rendezvous files of this node."""
    return temporary_directory(settings) / "ranks"


def join(settings: Settings) -> None:
    """Connect this process to the cluster as a driver; does nothing when it is connected.

    Raises PlatformError when `ray` was imported under another environment: it reads the token's mode once, at import.
    """
    wanted = environment(settings)
    if "ray" in sys.modules and any(os.environ.get(key) != value for key, value in wanted.items() if key.startswith("RAY_")):
        raise PlatformError("ray was imported before the platform's environment was set; call cluster.raynode.join first")
    os.environ.update(wanted)
    import ray

    if not ray.is_initialized():
        address = settings.ray.address or f"127.0.0.1:{settings.ray.gcs_port}"
        try:
            ray.init(address=address, namespace="mmaas", log_to_driver=False, logging_level="WARNING")
        except (ConnectionError, RuntimeError) as error:
            raise Unavailable(f"no Ray cluster answers at {address} ({error}); start it with: mmaas up") from None


def _ray_directory(settings: Settings) -> Path:
    return temporary_directory(settings) / "ray"


def _ingress_directory(settings: Settings) -> Path:
    return temporary_directory(settings) / "in"
