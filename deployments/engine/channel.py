"""The wire between a replica and its rank 0: length-prefixed MessagePack frames over a Unix socket.

One frame a step carries every sequence's new tokens, so that a step costs one write however many streams there are. Both ends
see at once when the other dies: the socket closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import struct
import threading

import msgspec

from deployments.engine.messages import Output, Request, Stats
from deployments.engine.orders import ORDERS

_LENGTH = struct.Struct("<I")


class Add(msgspec.Struct, tag=True, frozen=True):
    """To rank 0: work on this."""

    request: Request


class Abort(msgspec.Struct, tag=True, frozen=True):
    """To rank 0: nobody waits for this any more."""

    request_id: int
    index: int | None = None


class Do(msgspec.Struct, tag=True, frozen=True):
    """To rank 0: have every rank obey this between two steps, and say when it is done."""

    id: int
    order: ORDERS


class Done(msgspec.Struct, tag=True, frozen=True):
    """From rank 0: an order was obeyed; or why not, with the error's public code, then the group is as before."""

    id: int
    error: str | None = None
    code: str = ""


class Tokens(msgspec.Struct, tag=True, frozen=True):
    """From rank 0: what a step gave."""

    outputs: list[Output]


class Beat(msgspec.Struct, tag=True, frozen=True):
    """From rank 0, at least every second: every rank has passed a step or a ping since the last one."""

    stats: Stats


Command = Add | Abort | Do
Report = Tokens | Beat | Done
_commands = msgspec.msgpack.Decoder(Command)
_reports = msgspec.msgpack.Decoder(Report)


def frame(message: Command | Report) -> bytes:
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


async def read_report(reader: asyncio.StreamReader) -> Report:
    """Raises asyncio.IncompleteReadError when rank 0 is gone."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    report: Report = _reports.decode(await reader.readexactly(length))
    return report


class LeaderEnd:
    """Rank 0's end: writes that never keep a step waiting, and a thread that reads commands into a queue."""

    def __init__(self, path: str) -> None:
        self._unsent = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def __enter__(self) -> LeaderEnd:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, report: Report) -> None:
        """Write as much as the socket takes now; the rest goes with the next report, or while `take` waits.

        Raises ConnectionError when the replica is gone. What a replica doesn't read is no more than the tokens of its requests.
        """
        self._unsent += frame(report)
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent, socket.MSG_DONTWAIT)]

    def take(self, wait_s: float) -> list[Command] | None:
        """All commands that have come, after waiting at most `wait_s` for the first; None when the replica is gone."""
        if wait_s and self._unsent:  # no step waits: there is time to wait for a slow reader
            self._socket.sendall(self._unsent)
            self._unsent.clear()
        commands: list[Command] = []
        try:
            while True:
                command = self._commands.get(timeout=wait_s) if wait_s and not commands else self._commands.get_nowait()
                if command is None:
                    return None
                commands.append(command)
        except queue.Empty:
            return commands

    def _read(self) -> None:
        with self._socket.makefile("rb") as stream:
            while len(head := stream.read(_LENGTH.size)) == _LENGTH.size:
                self._commands.put(_commands.decode(stream.read(_LENGTH.unpack(head)[0])))
        self._commands.put(None)
