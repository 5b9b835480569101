"""TCP ports for servers that must be told their port before they listen."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator

PORTS = range(20_000, 28_000)
"""Above the ports of Ray's workers, below those that the kernel hands out: nobody takes one between our choice and its use."""
RUNS = range(28_000, 32_000, 100)
"""First ports of runs as long as the gateway's replicas need (`gateway.internal_port`); the default one is a real platform's."""
DEFAULT_RUN = 30_000

_claims: list[socket.socket] = []


def free_ports(count: int) -> list[int]:
    return list(itertools.islice(_free(PORTS), count))


def free_port() -> int:
    return next(_free(PORTS))


def free_run() -> int:
    """The first of a hundred ports."""
    return next(port for port in _free(RUNS) if port != DEFAULT_RUN)


def _free(ports: range) -> Iterator[int]:
    """Ports that nobody listens on, each claimed for this process until it ends."""
    start = os.getpid() * 37 % len(ports)  # several test processes look in different places first
    for port in itertools.chain(ports[start:], ports[:start]):
        if _claim(port) and _is_free(port):
            yield port
    raise AssertionError(f"no port of {ports} is free; end what an earlier run left behind")


def _claim(port: int) -> bool:
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0mmaas-tests-port-{port}")  # a name in the kernel's memory: it goes when this process does
    except OSError:
        claim.close()
        return False
    _claims.append(claim)
    return True


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
