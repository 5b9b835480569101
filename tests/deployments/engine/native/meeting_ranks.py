"""Ranks that meet in real processes, started from a server that has torch loaded already, and do what they are told."""

from __future__ import annotations

import multiprocessing
import os
import struct
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from deployments.engine.native import build
from deployments.engine.native.meeting import Meeting, Place

START_S = 60
BOARD, SEAT = 128, 128
"""Bytes of `Board` and `Seat` in meeting.cpp; a seat begins with the number of its last round."""


class Ranks:
    """`size` processes around one segment, in order of rank; all end with the `with` block."""

    def __init__(self, cache: Path, size: int, *, timeout_s: float = 60.0, first_round: int = 0) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        pairs = [context.Pipe() for _ in range(size)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=_rank, args=(cache, rank, size, timeout_s, first_round, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process, (_, theirs) in zip(self.processes, pairs, strict=True):
            process.start()
            theirs.close()
        self.place: Place = self._result(0, START_S)
        for pipe in self.pipes[1:]:
            pipe.send(self.place)
        for rank in range(1, size):
            self._result(rank, START_S)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(meeting, *arguments)` returns on each rank, or the error that it raises there."""
        self.begin(function, *arguments)
        return self.results()

    def begin(self, function: Callable[..., Any], *arguments: Any, ranks: list[int] | None = None) -> None:
        for rank in range(len(self.pipes)) if ranks is None else ranks:
            self.pipes[rank].send((function, arguments))

    def results(self, ranks: list[int] | None = None, timeout_s: float = 100.0) -> list[Any]:
        return [self._result(rank, timeout_s) for rank in (range(len(self.pipes)) if ranks is None else ranks)]

    def signal(self, rank: int, number: int) -> None:
        pid = self.processes[rank].pid
        assert pid
        os.kill(pid, number)

    def _result(self, rank: int, timeout_s: float) -> Any:
        assert self.pipes[rank].poll(timeout_s), f"rank {rank} hangs"
        return self.pipes[rank].recv()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)


def _rank(cache: Path, rank: int, size: int, timeout_s: float, first_round: int, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    library = build.library(cache)
    if rank == 0:
        place = Place.create(library, size)
        for other in range(size):
            os.pwrite(place.fd, struct.pack("I", first_round % (1 << 32)), BOARD + other * SEAT)
        meeting = Meeting(library, place, rank, size, timeout_s)
        pipe.send(place)
    else:
        meeting = Meeting(library, pipe.recv(), rank, size, timeout_s)
        pipe.send(None)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(function(meeting, *arguments))
        except Exception as error:
            pipe.send(error)
