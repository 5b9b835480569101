"""Rank 0's loop: take commands, step, deliver; when idle, ping every rank. It ends when the replica hangs up."""

from __future__ import annotations

import contextlib
import time

from cluster.errors import PlatformError
from deployments.engine.channel import Abort, Add, Beat, Do, Done, LeaderEnd, Tokens
from deployments.engine.compiling import Compiling
from deployments.engine.engine import Engine
from deployments.engine.shard import Shard
from deployments.engine.structured import Grammars

BEAT_S = 1.0
LOOK_S = 0.001
"""Between two looks whether a constraint is compiled, when there is nothing else to do."""


def lead(shard: Shard, path: str) -> None:
    """Serve the replica that listens at `path`. Raises what breaks the group; returns when the replica is gone."""
    grammars = Grammars(shard.spec.directory, threads=shard.spec.threads)
    engine = Engine.of(shard.execute, shard.spec.num_blocks, shard.spec.settings, grammars)
    compiling = Compiling(grammars)
    with LeaderEnd(path) as wire, contextlib.suppress(ConnectionError):  # which only the replica's end gives
        wire.send(Beat(engine.stats()))
        _loop(shard, engine, compiling, wire)
    compiling.close()
    shard.stop()


def _loop(shard: Shard, engine: Engine, compiling: Compiling, wire: LeaderEnd) -> None:
    last_beat = time.monotonic()
    while (commands := wire.take(0.0 if engine.has_work else LOOK_S if compiling else BEAT_S)) is not None:
        for command in commands:
            match command:
                case Add(request):
                    if not compiling.add(request):
                        engine.add(request)
                case Abort(request_id, index):
                    if not compiling.forget(request_id):
                        engine.abort(request_id, index)
                case Do():
                    wire.send(_done(shard, command))
        for request in compiling.ready():
            engine.add(request)
        if engine.has_work:
            if outputs := engine.step():
                wire.send(Tokens(outputs))
        elif not commands and not compiling:
            shard.ping()
            engine.scheduler.check_integrity()
        if commands or time.monotonic() - last_beat >= BEAT_S:
            wire.send(Beat(engine.stats()))
            last_beat = time.monotonic()


def _done(shard: Shard, command: Do) -> Done:
    try:
        shard.command(command.order)
    except PlatformError as error:
        return Done(command.id, error.message)
    return Done(command.id)
