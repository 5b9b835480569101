"""Ray's dashboard as a source of facts, over its HTTP interface with the cluster's token. Needs no `import ray`, so it is quick."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from cluster.errors import Unavailable
from cluster.private_files import Secrets
from cluster.settings import Settings

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of the environment can't reach our loopback


class Dashboard:
    """Read-only view of one cluster. With `ray.address` set, the dashboard is expected on this machine all the same."""

    def __init__(self, settings: Settings) -> None:
        self._base = f"http://127.0.0.1:{settings.ray.dashboard_port}"
        self._settings = settings

    def applications(self) -> dict[str, Any]:
        """Serve's applications by name, with status, message, deployments and replicas; empty while Serve is not started."""
        found: dict[str, Any] = self.get("/api/serve/applications/").get("applications", {})
        return found

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Ray's state: `nodes`, `actors`, `placement_groups` or `jobs`, with details."""
        answer = self.get(f"/api/v0/{kind}?detail=1&limit=10000")
        found: list[dict[str, Any]] = answer["data"]["result"]["result"]
        return found

    def get(self, path: str) -> dict[str, Any]:
        """Raises Unavailable when the dashboard does not answer or refuses the token."""
        request = urllib.request.Request(self._base + path, headers={"Authorization": f"Bearer {self._token()}"})  # noqa: S310
        try:
            with _DIRECT.open(request, timeout=10) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise Unavailable(f"Ray's dashboard at {self._base} does not answer: {error}") from None

    def _token(self) -> str:
        if self._settings.ray.address is None:
            return Secrets(self._settings.home).ray_token_path.read_text()
        path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path("~/.ray/auth_token").expanduser()
        return os.environ.get("RAY_AUTH_TOKEN") or Path(path).read_text().strip()
