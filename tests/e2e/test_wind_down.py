"""The end of a platform. Its name puts it behind every other file that shares it."""

from __future__ import annotations

import psutil
import pytest

from cluster import launch
from tests.e2e.platform import RunningPlatform

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def test_down_leaves_no_process_and_no_port(platform: RunningPlatform) -> None:
    before = launch.family(platform.settings)
    assert before
    platform.mmaas("down")
    assert launch.family(platform.settings) == []
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in before)
    busy = {connection.laddr.port for connection in psutil.net_connections("inet") if connection.status == psutil.CONN_LISTEN}
    ports = {int(value) for key, value in platform.environment.items() if key.endswith("_PORT")}
    assert not busy & ports
    assert "Nothing" in platform.mmaas("down").stdout
