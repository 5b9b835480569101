"""TCP ports of this machine: who listens where, and whether others can reach it."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from dataclasses import dataclass

import psutil

from cluster.errors import Conflict


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket. `pid` and `name` are None for another user's process."""

    address: str
    port: int
    pid: int | None
    name: str | None

    @property
    def is_loopback(self) -> bool:
        address = ipaddress.ip_address(self.address)
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address).is_loopback

    def __str__(self) -> str:
        process = f"{self.name} (process {self.pid})" if self.pid else "a process of another user"
        return f"{self.address}:{self.port} {process}"


def listeners(pids: Collection[int] | None = None) -> list[Listener]:
    """All listening TCP sockets by port, or those of the given processes."""
    found = {
        Listener(connection.laddr.ip, connection.laddr.port, connection.pid, _name(connection.pid))
        for connection in psutil.net_connections("tcp")
        if connection.laddr and connection.status == psutil.CONN_LISTEN and (pids is None or connection.pid in pids)
    }
    return sorted(found, key=lambda listener: (listener.port, listener.address))


def require_free(port: int, setting: str) -> None:
    """Raises Conflict that names the owner, if known, and the setting that moves us to another port."""
    for taken in listeners():
        if taken.port == port:
            variable = f"MMAAS_{setting.replace('.', '__').upper()}"
            raise Conflict(f"port {port} is in use by {taken}; end it, or set {setting} ({variable}) to a free port", param=setting)


def _name(pid: int | None) -> str | None:
    try:
        return psutil.Process(pid).name() if pid else None
    except psutil.NoSuchProcess:
        return None
