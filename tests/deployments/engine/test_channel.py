"""Rank 0's end of the wire, with a replica that the test plays."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from deployments.engine.channel import LeaderEnd, Tokens, read_report
from deployments.engine.messages import Output

STEP = [Output(request, 0, 7) for request in range(1000)]


@pytest.fixture
def listening(tmp_path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()
    return listener


async def test_a_replica_that_does_not_read_keeps_no_step_waiting_and_loses_nothing(listening: socket.socket) -> None:
    with LeaderEnd(listening.getsockname()) as leader:
        replica, _ = listening.accept()
        for number in range(1, 101):  # about 700 kB, several times what a socket holds
            leader.send(Tokens([Output(number, 0, number), *STEP]))
        reader, writer = await asyncio.open_unix_connection(sock=replica)
        waiting = asyncio.get_running_loop().run_in_executor(None, leader.take, 0.1)  # idle: the rest goes now
        seen = [(await read_report(reader)).outputs[0].request_id for _ in range(100)]  # type: ignore[union-attr]
        assert await waiting == []
        writer.close()
    assert seen == list(range(1, 101))


async def test_a_replica_that_is_gone_is_noticed(listening: socket.socket) -> None:
    with LeaderEnd(listening.getsockname()) as leader:
        replica, _ = listening.accept()
        replica.close()
        assert await asyncio.to_thread(leader.take, 5.0) is None
        with pytest.raises(ConnectionError):
            leader.send(Tokens(STEP))
